"""The host's end of a serial or virtio port, as trio sees it: a stream.

`ConsoleStream` is the outer half of `avmm.devices.serial.Serial` and of
`avmm.devices.virtio.port.Port`, whose private methods it calls: they move the bytes (and take the
lock, where there is one), the stream waits where there was nothing to move.
"""

from __future__ import annotations

import operator
from types import TracebackType
from typing import Protocol

import trio


class _Waitable(Protocol):
    async def wait(self) -> None:
        """Return once there may be something to move."""

    def set(self) -> None:
        """Let whoever waits look again."""


class Cable(Protocol):
    """What a port has for its stream; its methods raise trio's errors where it is closed."""

    _finished: bool

    @property
    def _output(self) -> _Waitable: ...
    @property
    def _room(self) -> _Waitable: ...
    def _take(self, most: int | None) -> bytes | None: ...
    def _feed(self, data: memoryview) -> int: ...
    def _has_room(self) -> bool: ...
    def _close(self) -> None: ...


class OneTask:
    """Detects a second task in the same half of the stream (as trio's own streams do it)."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._held = False

    def __enter__(self) -> None:
        if self._held:
            raise trio.BusyResourceError(f"another task is {self._doing}")
        self._held = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held = False


class ConsoleStream(trio.abc.Stream):
    """The host's end of a port: what the guest writes is received, and the reverse.

    One task may receive and one may send at a time; others get `trio.BusyResourceError`. After
    the guest has ended, what is buffered can still be received, and then comes the end
    (``b""``); sending raises `trio.BrokenResourceError`. After `aclose` every method raises
    `trio.ClosedResourceError`, and the guest's output goes nowhere (counted in the port's `lost`);
    input that was accepted still reaches the guest.

    While the guest is handed over to another process nothing goes either way (`hold`), since its
    saved state says what is buffered. Once it has gone, that is the other side's: here comes the
    end.
    """

    accepted: int
    """How many bytes of the data of the last `send_all` were accepted; see there."""

    def __init__(self, cable: Cable) -> None:
        self._cable = cable
        self._sending = OneTask("sending to this console")
        self._receiving = OneTask("receiving from this console")
        self.accepted = 0
        self._is_held = False

    def hold(self) -> None:
        """For `avmm`'s own: move nothing until `let_go`, whoever waits for it."""
        self._is_held = True

    def let_go(self) -> None:
        """Go on after `hold`; does nothing without it."""
        self._is_held = False
        self._cable._output.set()
        self._cable._room.set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` to the guest; returns when all of it is accepted for delivery.

        Accepted bytes reach the guest, in order, as soon as it wants them. If this is cancelled
        or raises, the first `accepted` bytes of `data` were accepted, and no others:
        ``send_all(data[stream.accepted:])`` goes on where it stopped.
        """
        cable = self._cable
        with self._sending, memoryview(data).cast("B") as view:
            self.accepted = 0
            await trio.lowlevel.checkpoint()
            while True:
                if not self._is_held or cable._finished:
                    self.accepted += cable._feed(view[self.accepted :])
                    if self.accepted == len(view):
                        return
                await cable._room.wait()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until at least one byte would be accepted at once. Cancelling changes nothing."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            while not self._cable._has_room() or self._is_held:
                await self._cable._room.wait()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for output of the guest: at least one byte, at most `max_bytes`, or b"" at its
        end. Cancelling loses nothing."""
        if max_bytes is not None:
            max_bytes = operator.index(max_bytes)
            if max_bytes < 1:
                raise ValueError("max_bytes must be at least 1")
        with self._receiving:
            await trio.lowlevel.checkpoint()
            while True:
                if self._is_held and self._cable._finished:
                    return b""
                if not self._is_held and (data := self._cable._take(max_bytes)) is not None:
                    return data
                await self._cable._output.wait()

    def discard_output(self) -> int:
        """Throw away what the guest has written that was not received yet: how many bytes."""
        return len(self._cable._take(None) or b"")

    async def aclose(self) -> None:
        """Close this end at once, even if cancelled; does nothing the second time."""
        self._cable._close()
        await trio.lowlevel.checkpoint()
