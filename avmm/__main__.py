"""`python -m avmm`."""

from avmm.cli import main

main()
