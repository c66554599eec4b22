"""C code that does not concern KVM: virtqueues, pages of RAM, and system calls that Python
lacks."""
