"""The host's end of a serial or virtio port, as a trio stream.

`ConsoleStream` is the outer half of `avmm.devices.serial.Serial` and of
`avmm.devices.virtio.port.Port`, whose private methods it calls: these move the bytes, and take the
lock if there is one. The stream waits when there is nothing to move.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from types import TracebackType
from typing import Final, Protocol

import trio

from avmm.ctrl_c import protected
from avmm.errors import AvmmError, ConfigError

_MOST_SEARCHED: Final = 1 << 20
_MOST_SHOWN: Final = 200


class _Waitable(Protocol):
    async def wait(self) -> None:
        """Return once there may be something to move."""


class Cable(Protocol):
    """What a port offers its stream. Its methods raise trio's errors once it is closed."""

    @property
    def _output(self) -> _Waitable: ...
    @property
    def _room(self) -> _Waitable: ...
    def _take(self, most: int | None) -> bytes | None: ...
    def _has_output(self) -> bool: ...
    def _feed(self, data: memoryview) -> int: ...
    def _has_room(self) -> bool: ...
    def _close(self) -> None: ...


class OneTask:
    """Refuses a second task in the same direction of the stream, as trio's own streams do."""

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


def _finder(pattern: bytes | re.Pattern[bytes]) -> Callable[[bytearray, int], int]:
    """A function that returns where the first match of `pattern` in some data ends, or -1. It is
    told how much of the data was searched before. Raises `ConfigError` for anything else."""
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, bytes):
        search = pattern.search

        def find(data: bytearray, searched: int) -> int:
            match = search(data)
            return -1 if match is None else match.end()

        return find
    if isinstance(pattern, bytes) and pattern:
        wanted = pattern

        def find_bytes(data: bytearray, searched: int) -> int:
            at = data.find(wanted, max(0, searched - len(wanted) + 1))
            return -1 if at < 0 else at + len(wanted)

        return find_bytes
    raise ConfigError(f"pattern {pattern!r}: expected bytes, or a compiled pattern for bytes")


class ConsoleStream(trio.abc.Stream):
    """The host's end of a port: it receives what the guest writes, and sends what the guest reads.

    One task may receive and one may send at a time; others get `trio.BusyResourceError`. After the
    guest has ended, what is buffered can still be received, and then comes the end (``b""``);
    sending raises `trio.BrokenResourceError`. After `aclose` every method raises
    `trio.ClosedResourceError`. The guest's output is then dropped and counted in the port's
    `lost`. Input that was accepted before still reaches the guest.
    """

    accepted: int
    """How many bytes of the data of the last `send_all` were accepted; see there."""

    def __init__(self, cable: Cable) -> None:
        self._cable = cable
        self._sending = OneTask("sending to this console")
        self._receiving = OneTask("receiving from this console")
        self.accepted = 0
        self._ahead = bytearray()
        """Output that `receive_until` has read and not returned."""

    @protected
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` to the guest; returns when all of it is accepted for delivery.

        Accepted bytes reach the guest, in order, as soon as it wants them. If this is cancelled or
        raises, exactly the first `accepted` bytes of `data` were accepted, so
        ``send_all(data[stream.accepted:])`` continues where it stopped.
        """
        cable = self._cable
        with self._sending, memoryview(data).cast("B") as view:
            self.accepted = 0
            await trio.lowlevel.checkpoint()
            while True:
                self.accepted += cable._feed(view[self.accepted :])
                if self.accepted == len(view):
                    return
                await cable._room.wait()

    @protected
    async def wait_send_all_might_not_block(self) -> None:
        """Wait until at least one byte would be accepted at once. Cancelling changes nothing."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            while not self._cable._has_room():
                await self._cable._room.wait()

    @protected
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for output of the guest: at least one byte, at most `max_bytes`, or b"" at its
        end. Cancelling loses nothing."""
        if max_bytes is not None:
            max_bytes = operator.index(max_bytes)
            if max_bytes < 1:
                raise ValueError("max_bytes must be at least 1")
        with self._receiving:
            await trio.lowlevel.checkpoint()
            if self._ahead:
                return self._split(len(self._ahead) if max_bytes is None else max_bytes)
            return await self._receive(max_bytes)

    async def _receive(self, most: int | None) -> bytes:
        while (data := self._cable._take(most)) is None:
            await self._cable._output.wait()
        return data

    def _split(self, at: int) -> bytes:
        """The first bytes that were read ahead, which are removed."""
        data = bytes(self._ahead[:at])
        del self._ahead[:at]
        return data

    @protected
    async def receive_until(
        self, pattern: bytes | re.Pattern[bytes], *, max_bytes: int = _MOST_SEARCHED
    ) -> bytes:
        """Wait for output that contains `pattern`, and return all output up to the end of its
        first match. With it a program reads the answer to a command, up to the prompt.

        Raises `AvmmError` if the guest's output ends before that, or if `max_bytes` have come
        without it. What has come then, what comes behind the match, and what had come when this
        was cancelled, can still be received. A regular expression matches as soon as it can, so
        one that ends with `.*` gets what has come by then.
        """
        find = _finder(pattern)
        with self._receiving:
            await trio.lowlevel.checkpoint()
            searched = 0
            while (end := find(self._ahead, searched)) < 0:
                searched = len(self._ahead)
                if searched >= max_bytes:
                    raise AvmmError(f"no {pattern!r} in {searched} bytes of the guest's output")
                data = await self._receive(None)
                if not data:
                    last = bytes(self._ahead[-_MOST_SHOWN:])
                    raise AvmmError(
                        f"the guest's output ended without {pattern!r}; its last bytes: {last!r}"
                    )
                self._ahead += data
            return self._split(end)

    @property
    def has_output(self) -> bool:
        """Has the guest written something that nobody has received yet?"""
        return bool(self._ahead) or self._cable._has_output()

    def discard_output(self) -> int:
        """Throw away the guest's output that has not been received yet. Returns the number of
        bytes."""
        ahead = len(self._split(len(self._ahead)))
        return ahead + len(self._cable._take(None) or b"")

    @protected
    async def aclose(self) -> None:
        """Close this end at once, even if cancelled; does nothing the second time."""
        self._ahead.clear()
        self._cable._close()
        await trio.lowlevel.checkpoint()
