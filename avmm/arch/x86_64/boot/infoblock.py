"""A block of guest memory that holds structures which point at each other."""

from __future__ import annotations

from typing import Final

from avmm.arch.x86_64 import layout
from avmm.errors import ConfigError
from avmm.memory.ram import GuestMemory

_ALIGN: Final = 8


class InfoBlock:
    """The bytes of the boot information, which are put together on the host and written in one go.

    Room for the first structure is reserved at the beginning. Its contents are known last, because
    it contains the addresses of all others.
    """

    def __init__(self, first_size: int) -> None:
        self._first_size = first_size
        self._data = bytearray(first_size)

    def add(self, data: bytes) -> int:
        """Append `data`, aligned. Returns its guest-physical address."""
        self._data += bytes(-len(self._data) % _ALIGN)
        gpa = layout.BOOT_INFO + len(self._data)
        self._data += data
        return gpa

    def add_string(self, text: str) -> int:
        """Append `text` with a NUL. Returns its guest-physical address."""
        return self.add(text.encode("utf-8", "surrogateescape") + b"\0")

    def write(self, memory: GuestMemory, first: bytes) -> int:
        """Write the whole block, with `first` at its beginning. Returns its guest-physical
        address.

        Raises `ConfigError` if the block is too small, which happens only with hundreds of
        modules.
        """
        assert len(first) == self._first_size, (len(first), self._first_size)
        self._data[: len(first)] = first
        if len(self._data) > layout.BOOT_INFO_SIZE:
            raise ConfigError(
                f"the boot information has {len(self._data)} bytes, but at most "
                f"{layout.BOOT_INFO_SIZE} fit: expected fewer modules, or shorter names"
            )
        memory.write(layout.BOOT_INFO, bytes(self._data))
        return layout.BOOT_INFO
