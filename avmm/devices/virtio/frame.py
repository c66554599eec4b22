"""Ethernet frames, and what carries them on the host's side of a network device.

An embedder's own network is a `Backend`, which needs only `receive` and `send`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import trio

MOST_BYTES: Final = 65535 + 18
"""The longest frame: an IP packet of 64 KiB, the Ethernet header, a VLAN tag."""


@dataclass(frozen=True, slots=True)
class Frame:
    """An Ethernet frame, without its check sequence.

    If `start` is set, the checksum is not complete: the field at `start + offset` holds the sum of
    the pseudo header, and the sum over everything from `start` on belongs there (5.1.6.2).
    """

    data: bytes
    start: int | None = None
    offset: int = 0
    is_valid: bool = False
    """True if somebody has already verified the frame's checksums."""

    @property
    def is_sound(self) -> bool:
        """Does the checksum's field lie within the frame?"""
        if self.start is None:
            return True
        within = self.start >= 0 and self.offset >= 0
        return within and self.start + self.offset + 2 <= len(self.data)

    def complete(self) -> bytes:
        """The frame with its checksum completed (RFC 1071). Raises `ValueError` if it is not
        `is_sound`."""
        if self.start is None:
            return self.data
        if not self.is_sound:
            raise ValueError(f"a frame of {len(self.data)} bytes has its checksum outside of it")
        summed = self.data[self.start :]
        # Adding 16-bit words with end-around carry gives the remainder modulo 0xffff of the number
        # that the words form.
        total = int.from_bytes(summed, "big") << 8 * (len(summed) % 2)
        at = self.start + self.offset
        # Never 0, because 0 means "no checksum" for UDP. 0xffff is the same number.
        return b"".join(
            (self.data[:at], (0xFFFF - total % 0xFFFF).to_bytes(2, "big"), self.data[at + 2 :])
        )


class Backend:
    """The host's end of a network. One task calls `receive`, and one calls `send`.

    Both must be checkpoints. If `receive` is cancelled, no frame may be lost. If `send` is
    cancelled, either it has not taken the frame, or it must accept a second call with the same
    frame.
    """

    completes: bool = False
    """Does `send` take frames whose checksum is not complete?"""

    @property
    def is_connected(self) -> bool:
        """Is there somebody at the other end? Until then the guest has no link."""
        return True

    async def connected(self) -> None:
        """Return when there is somebody at the other end."""

    async def gone(self) -> None:
        """Return when the other end has gone and somebody else may come, and forget what it has
        sent. Called while the guest has no driver, so that nobody calls `receive`."""
        await trio.sleep_forever()

    async def receive(self) -> Frame:
        """The next frame for the guest. Raises `trio.EndOfChannel` if the other end has gone: the
        guest's link is down from then on, or until `connected` returns if `is_connected` is now
        False."""
        raise NotImplementedError

    async def send(self, frame: Frame) -> None:
        """Send a frame of the guest. While this waits, the guest's queue fills up. Raises
        `trio.BrokenResourceError` if the other end has gone: the guest's link is then down."""
        raise NotImplementedError

    async def release(self) -> None:
        """Let go of what only one machine may hold, so that another can take over.

        Neither `send` nor `receive` is called before `acquire`."""

    async def acquire(self) -> None:
        """Take hold of it again. Does nothing if it is held. Raises `ConfigError` if that is not
        possible."""

    def close(self) -> None:
        """Release what it holds on the host. Whoever made the backend calls this, after everything
        else."""
