"""Makes guests from a distribution's packages: a kernel, and an initramfs for it.

Only the command uses this; `import avmm` does not. Nothing in a package is executed.
"""
