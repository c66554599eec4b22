"""A Linux that boots on every KVM, even on one that interprets ring 0.

The kernel is Debian's source with `interpreted.patch`, configured by tinyconfig and
`kernel.config`. It is built on first use, which takes two to five minutes, and is kept in the
user's cache, like what the lab builds. User space is klibc, from Debian's packages, because this
kernel saves no AVX state and glibc uses AVX.

The project contains nothing of Linux but the patch and the configurations. They keep Linux's
license, GPL-2.0.
"""
