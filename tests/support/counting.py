"""The host's side of the bundled shell's `count`: each number once, in order, on every channel.

A `Counting` outlives the machines that it is attached to: what was got from one goes on with the
next that is loaded from its state, in this process or (by `save` and `load`) in another. A number
that is not the next one of its channel is an error at once.

    counting = Counting(3000, "serial", "vsock", "disk")
    async with counting.attached(vm):
        await vm.console.send_all(counting.command)
        await counting.reached(1000)
    ...
    counting.check(image)
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Self

import trio

import avmm

PORT = 5000
"""Where the guest connects to."""
SECTOR = 512
STREAMS = ("serial", "hvc", "vsock")


class Counting:
    """A count to `last`, and how far it has come on these channels."""

    def __init__(self, last: int, *channels: str) -> None:
        self.last = last
        self.channels = channels
        self.got = {channel: 0 for channel in channels if channel in STREAMS}
        """The last number of each; what is on the disk is seen at the end."""
        self._rest = dict.fromkeys(self.got, b"")
        """A line that has not ended. The next machine's output goes on with it; but a connection
        ends with its machine, and the guest says the line again."""
        self._until = last
        self._changed = trio.lowlevel.ParkingLot()
        self._talking = trio.Lock()
        self.connections = 0
        self.has_shut = False
        """Has the guest said, by the end of its connection, that there is no more to come?"""

    @property
    def command(self) -> bytes:
        """What to type into the guest's shell."""
        return f"count {self.last} {' '.join(self.channels)}\r".encode()

    def save(self) -> dict[str, Any]:
        """Plain data, as JSON has it, for `load`."""
        return {
            "last": self.last,
            "channels": list(self.channels),
            "got": dict(self.got),
            "rest": {channel: rest.decode() for channel, rest in self._rest.items()},
            "has_shut": self.has_shut,
        }

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Self:
        """One that goes on from there."""
        counting = cls(data["last"], *data["channels"])
        counting.got.update(data["got"])
        counting._rest.update({name: rest.encode() for name, rest in data["rest"].items()})
        counting.has_shut = data["has_shut"]
        return counting

    @contextlib.asynccontextmanager
    async def attached(self, vm: avmm.Machine, *, until: int | None = None) -> AsyncIterator[None]:
        """Take what this machine counts; with `until`, only so far or a little more, so that what
        follows fills the buffers on its way.

        A state that is to be loaded may be saved only after this has been left: what is read
        later is in the state as well.
        """
        self._until = self.last if until is None else until
        async with trio.open_nursery() as nursery:
            if "serial" in self.got:
                nursery.start_soon(self.read, "serial", vm.console)
            if "hvc" in self.got:
                nursery.start_soon(self.read, "hvc", vm.ports["hvc0"])
            if "vsock" in self.got:
                nursery.start_soon(self.serve, vm.vsock.listen(PORT))
            yield
            nursery.cancel_scope.cancel()

    async def read(self, channel: str, stream: trio.abc.ReceiveStream) -> None:
        """Take a channel's lines until it ends. Cancelling loses nothing."""
        async for data in stream:
            self._take(channel, data)
            if self._until < self.last and self.got[channel] >= self._until:
                await trio.sleep_forever()

    async def serve(self, listener: trio.abc.Listener[Any]) -> None:
        """Take what comes by connections, of which the newest counts, until cancelled."""
        scope = trio.CancelScope()
        async with listener, trio.open_nursery() as nursery:
            while True:
                stream = await listener.accept()
                scope.cancel()
                scope = trio.CancelScope()
                nursery.start_soon(self._talk, stream, scope)

    async def _talk(self, stream: trio.abc.Stream, scope: trio.CancelScope) -> None:
        # Whoever had an older connection must not read on while this one says what has arrived.
        with scope:
            async with stream, self._talking:
                self.connections += 1
                self._rest["vsock"] = b""
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(b"%d\n" % self.got["vsock"])
                    await self.read("vsock", stream)
                    assert not self._rest["vsock"], "vsock: ends within a line"
                    self.has_shut = True
                    self._changed.unpark_all()

    def _take(self, channel: str, data: bytes | bytearray) -> None:
        *lines, self._rest[channel] = (self._rest[channel] + data).split(b"\n")
        for line in lines:
            text = line.rstrip(b"\r")
            assert not text.startswith(b"count: "), text
            if text.isdigit():
                expected = self.got[channel] + 1
                assert int(text) == expected, f"{channel}: {text.decode()}, expected {expected}"
                self.got[channel] = expected
        self._changed.unpark_all()

    async def reached(self, number: int) -> None:
        """Wait until all streams have come that far."""
        while min(self.got.values()) < number:
            await self._changed.park()

    async def finished(self) -> None:
        """Wait until all streams have all numbers, and the connection's end."""
        while min(self.got.values()) < self.last or not ("vsock" not in self.got or self.has_shut):
            await self._changed.park()

    def check(self, disk: Path | None = None) -> None:
        """All numbers are there, and no others, on the disk, too."""
        assert self.got == dict.fromkeys(self.got, self.last)
        assert "vsock" not in self.got or self.has_shut
        if disk is not None:
            data = disk.read_bytes()
            texts = [b"%d\n" % number for number in range(1, self.last + 1)]
            found = [data[at : at + SECTOR] for at in range(0, len(data), SECTOR)]
            assert found[: self.last] == [text.ljust(SECTOR, b"\0") for text in texts]
            assert not any(data[self.last * SECTOR :])
