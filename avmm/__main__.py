"""`python -m avmm`."""

from avmm_early import main

main()
