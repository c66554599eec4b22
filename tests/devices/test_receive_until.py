"""`receive_until`: a console's output up to what is looked for."""

from __future__ import annotations

import os
import re

import pytest
import trio
import trio.testing

import avmm
from avmm.devices.console import ConsoleStream

pytestmark = pytest.mark.timeout(60)


class Waiters:
    async def wait(self) -> None:
        await trio.sleep_forever()


class Output:
    """The guest's side of a console: what it writes, in the pieces in which it comes."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._output = Waiters()
        self._ended = False
        self.stream = ConsoleStream(self)  # type: ignore[arg-type]

    def write(self, *pieces: bytes) -> None:
        self._pieces += pieces

    def end(self) -> None:
        self._ended = True

    def _take(self, most: int | None) -> bytes | None:
        if not self._pieces:
            return b"" if self._ended else None
        piece = self._pieces.pop(0)
        if most is not None and len(piece) > most:
            self._pieces.insert(0, piece[most:])
            piece = piece[:most]
        return piece

    def _close(self) -> None:
        self._ended = True


PATTERNS = [b"> ", re.compile(rb"\w> "), re.compile(rb">\s")]


@pytest.mark.parametrize("pattern", PATTERNS)
async def test_all_up_to_the_end_of_the_first_match(pattern: bytes | re.Pattern[bytes]) -> None:
    output = Output()
    output.write(b"one", b"\r\navmm>", b" two\r\navmm> three")
    assert await output.stream.receive_until(pattern) == b"one\r\navmm> "
    assert await output.stream.receive_until(pattern) == b"two\r\navmm> "
    assert await output.stream.receive_some(3) == b"thr"
    assert await output.stream.receive_some() == b"ee"


async def test_a_match_in_single_bytes() -> None:
    output = Output()
    output.write(*(bytes([byte]) for byte in b"aaab aab"))
    assert await output.stream.receive_until(b"aab") == b"aaab"
    assert await output.stream.receive_until(b"aab") == b" aab"


async def test_cancelling_loses_nothing() -> None:
    output = Output()
    output.write(b"half of ")
    with trio.move_on_after(0.05):
        await output.stream.receive_until(b"$ ")
    output.write(b"it $ rest")
    assert await output.stream.receive_until(b"$ ") == b"half of it $ "
    assert await output.stream.receive_some() == b"rest"


async def test_output_that_ends_before() -> None:
    output = Output()
    output.write(b"only this")
    output.end()
    with pytest.raises(avmm.AvmmError, match=r"ended without b'\$ '; its last bytes: b'only thi"):
        await output.stream.receive_until(b"$ ")
    assert await output.stream.receive_some() == b"only this"
    assert await output.stream.receive_some() == b""


async def test_too_much_output() -> None:
    output = Output()
    output.write(b"x" * 100, b"y" * 100)
    with pytest.raises(avmm.AvmmError, match=r"no b'\$ ' in 200 bytes"):
        await output.stream.receive_until(b"$ ", max_bytes=150)
    assert await output.stream.receive_some() == b"x" * 100 + b"y" * 100


async def test_what_was_read_ahead_is_discarded_and_closed_with_the_rest() -> None:
    output = Output()
    output.write(b"one $ two", b"three")
    await output.stream.receive_until(b"$ ")
    assert output.stream.discard_output() == len(b"twothree")
    output.write(b"one $ two")
    await output.stream.receive_until(b"$ ")
    await output.stream.aclose()
    assert await output.stream.receive_some() == b""


@pytest.mark.parametrize("pattern", ["> ", b"", re.compile("> "), None, 5])
async def test_what_is_no_pattern(pattern: object) -> None:
    with pytest.raises(avmm.ConfigError, match="expected bytes, or a compiled pattern for bytes"):
        await Output().stream.receive_until(pattern)  # type: ignore[arg-type]


@pytest.mark.usefixtures("kvm", "nothing_left")
async def test_a_conversation_with_a_guest() -> None:
    async with avmm.Machine(memory="64M") as vm:
        await vm.console.receive_until(b"avmm> ")
        for number in range(20):
            await vm.console.send_all(b"echo %d\r" % number)
            said = await vm.console.receive_until(b"avmm> ")
            assert said == b"echo %d\r\n%d\r\navmm> " % (number, number)


@pytest.mark.usefixtures("kvm", "nothing_left")
async def test_the_rest_is_written_to_a_file_first() -> None:
    """A port that is read until something, and then written to a descriptor."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as file:
        async with avmm.Machine(memory="64M", devices=[avmm.virtio(avmm.Console())]) as vm:
            port = vm.ports["hvc0"]
            await vm.console.receive_until(b"avmm> ")
            await vm.console.send_all(b"count 2000 hvc\rexit\r")
            assert (await port.receive_until(b"7\r\n")).split()[-1] == b"7"
            await port.write_to(writing)
        os.close(writing)
        assert [int(line) for line in file.read().split()] == list(range(8, 2001))


async def test_what_was_read_ahead_goes_before_what_comes() -> None:
    """A guest that writes while a slow reader takes what was read ahead does not overtake it."""
    port = avmm.Port("data", output_size=1 << 20)
    first, second = b"a" * 200_000, b"b" * 1000
    port.give(first)
    with pytest.raises(avmm.AvmmError, match="in 200000 bytes of the guest's output"):
        await port.receive_until(b"never", max_bytes=1)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as file:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.write_to, writing)
            await trio.testing.wait_all_tasks_blocked()
            got = os.read(reading, 100_000)
            assert 0 < len(got) < len(first)
            assert port.sink is None, "the guest's output may not go there directly yet"
            assert not port.write_now([memoryview(second)])
            port.give(second)
            while len(got) < len(first) + len(second):
                await trio.lowlevel.wait_readable(reading)
                got += os.read(reading, 100_000)
            assert got == first + second
            assert port.sink is not None
            nursery.cancel_scope.cancel()
        os.close(writing)
        assert file.read() == b""


async def test_a_port_is_closed_while_what_was_read_ahead_is_written() -> None:
    port = avmm.Port("data", output_size=1 << 20)
    port.give(b"a" * 200_000)
    with pytest.raises(avmm.AvmmError, match="in 200000 bytes of the guest's output"):
        await port.receive_until(b"never", max_bytes=1)
    reading, writing = os.pipe()
    try:
        with pytest.RaisesGroup(trio.ClosedResourceError), trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(port.write_to, writing)
                await trio.testing.wait_all_tasks_blocked()
                await port.aclose()
                os.read(reading, 100_000)
    finally:
        os.close(reading)
        os.close(writing)
