"""A block of guest memory that is filled with structures which point at each other."""

from __future__ import annotations

from typing import Final

from avmm.arch.x86_64 import layout
from avmm.errors import ConfigError
from avmm.memory.ram import GuestMemory

_ALIGN: Final = 8


class InfoBlock:
    """The boot information's bytes, put together on the host and written at once.

    Room for the structure that comes first is taken at once, because it is known last: it
    holds the addresses of all others.
    """

    def __init__(self, first_size: int) -> None:
        self._first_size = first_size
        self._data = bytearray(first_size)

    def add(self, data: bytes) -> int:
        """Append `data`, aligned; return where the guest will find it."""
        self._data += bytes(-len(self._data) % _ALIGN)
        gpa = layout.BOOT_INFO + len(self._data)
        self._data += data
        return gpa

    def add_string(self, text: str) -> int:
        """Append `text` with a NUL; return where the guest will find it."""
        return self.add(text.encode("utf-8", "surrogateescape") + b"\0")

    def write(self, memory: GuestMemory, first: bytes) -> int:
        """Write all with `first` at the beginning; return its address.

        Raises `ConfigError` where there is more than the block's room, which takes hundreds
        of modules.
        """
        assert len(first) == self._first_size, (len(first), self._first_size)
        self._data[: len(first)] = first
        if len(self._data) > layout.BOOT_INFO_SIZE:
            raise ConfigError(
                f"the boot information is {len(self._data)} bytes, the most is "
                f"{layout.BOOT_INFO_SIZE}: expected fewer modules, or shorter names"
            )
        memory.write(layout.BOOT_INFO, bytes(self._data))
        return layout.BOOT_INFO
