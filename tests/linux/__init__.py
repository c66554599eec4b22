"""A Linux that boots on every KVM, those included that interpret ring 0.

Debian's source with `interpreted.patch` and tinyconfig with `kernel.config`, built on first use
(two to five minutes) and kept in the user's cache, by the lab's means; user space is klibc's
from Debian's packages, because the kernel saves no AVX state and glibc uses AVX.

Of Linux, the project carries only the patch and the configurations, which are GPL-2.0 as Linux is.
"""
