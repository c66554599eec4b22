"""Guest images out of a distribution's packages: a kernel, and an initramfs to go with it.

Only the command uses this; `import avmm` does not. Nothing of a package is executed.
"""
