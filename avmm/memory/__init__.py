"""Guest RAM: where it is, which of its pages are in use or written, and copies of it."""

from avmm.memory.ram import GuestMemory

__all__ = ["GuestMemory"]
