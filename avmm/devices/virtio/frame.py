"""Ethernet frames, and what carries them on the host's side of a network device.

An embedder's own network is a `Backend`: `receive` and `send`, no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MOST_BYTES: Final = 65535 + 18
"""The longest frame: an IP packet of 64 KiB, the Ethernet header, a VLAN tag."""


@dataclass(frozen=True, slots=True)
class Frame:
    """An Ethernet frame, without its check sequence.

    Where `start` is set its checksum is not complete: at `start + offset` there is what the
    pseudo header gives, and the sum of what is from `start` on belongs there (5.1.6.2).
    """

    data: bytes
    start: int | None = None
    offset: int = 0
    is_valid: bool = False
    """Somebody has verified its checksums already."""

    @property
    def is_sound(self) -> bool:
        """Do the places of its checksum lie within it?"""
        if self.start is None:
            return True
        within = self.start >= 0 and self.offset >= 0
        return within and self.start + self.offset + 2 <= len(self.data)

    def complete(self) -> bytes:
        """The frame with its checksum (RFC 1071). Raises `ValueError` where it is not sound."""
        if self.start is None:
            return self.data
        if not self.is_sound:
            raise ValueError(f"a frame of {len(self.data)} bytes has its checksum outside of it")
        summed = self.data[self.start :]
        # Words added with their carries: the remainder of the number that they are by 0xffff.
        total = int.from_bytes(summed, "big") << 8 * (len(summed) % 2)
        at = self.start + self.offset
        # Never 0, which for UDP means that there is none; 0xffff is the same number.
        return b"".join(
            (self.data[:at], (0xFFFF - total % 0xFFFF).to_bytes(2, "big"), self.data[at + 2 :])
        )


class Backend:
    """A network's end: one task calls `receive`, one `send`.

    Both must be checkpoints. Cancelled, `receive` has lost no frame, and `send` has taken none,
    or is called again with the same one.
    """

    completes: bool = False
    """Does `send` take frames whose checksum is not complete?"""

    @property
    def is_connected(self) -> bool:
        """Is there somebody at the other end? Until then the guest has no link."""
        return True

    async def connected(self) -> None:
        """Return when there is somebody at the other end."""

    async def receive(self) -> Frame:
        """The next frame for the guest. Raises `trio.EndOfChannel` where none will come any
        more: the guest's link is down from then on."""
        raise NotImplementedError

    async def send(self, frame: Frame) -> None:
        """Send a frame of the guest's. While it waits the guest's queue fills up. Raises
        `trio.BrokenResourceError` where the other end has gone: the guest's link is down."""
        raise NotImplementedError

    async def release(self) -> None:
        """Let go of what only one machine may hold, for another that takes over.

        Neither `send` nor `receive` is called before `acquire`."""

    async def acquire(self) -> None:
        """Take hold of it; does nothing where it is held. Raises `ConfigError` where that cannot
        be."""

    def close(self) -> None:
        """Give back what it holds of the host; for who has made it, after all else."""
