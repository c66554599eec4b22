"""Code in C that is not KVM's: virtqueues, pages of RAM, calls of Linux that Python lacks."""
