"""Output of a console's port that goes to a descriptor: once, in order, whatever comes between."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import socket
import tty
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from support.virtio_driver import EVENT_IDX, VERSION_1, Bench, Driver, settle

from avmm.devices.hostfd import HostFd
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.port import Port

PIPE = 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of a page, whose reading end does not block."""
    near, far = os.pipe()
    os.set_blocking(near, False)
    assert fcntl.fcntl(far, fcntl.F_SETPIPE_SZ, PIPE) == PIPE
    yield near, far
    for fd in (near, far):
        try:
            os.close(fd)
        except OSError as error:
            assert error.errno == errno.EBADF


def console(size: int = 64) -> tuple[Bench, Port]:
    port = Port("a", output_size=size)
    return Bench(Console(port), memory=None), port


class Guest:
    """Sends by the first port, each time by a chain of two parts."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.at = driver.end

    def send(self, data: bytes) -> None:
        self.driver.bench.memory.write(self.at, data)
        half = len(data) // 2
        parts = [(self.at, half, False), (self.at + half, len(data) - half, False)]
        self.driver.rings[1].add([part for part in parts if part[1]])
        self.driver.rings[1].kick()
        self.at += len(data)

    def returned(self) -> int:
        return len(self.driver.rings[1].take())


async def start(driver: Driver, features: int = VERSION_1 | EVENT_IDX) -> Guest:
    await driver.start(features)
    return Guest(driver)


def numbered(count: int) -> bytes:
    return b"".join(b"%07d\n" % n for n in range(count // 8))


def drain(fd: int) -> bytes:
    found = b""
    try:
        while data := os.read(fd, 65536):
            found += data
    except BlockingIOError:
        pass
    return found


async def test_a_file_gets_it_without_a_buffer(tmp_path: Path) -> None:
    bench, port = console()
    with (tmp_path / "log").open("wb") as file:
        async with bench.running() as driver, trio.open_nursery() as nursery:
            guest = await start(driver)
            guest.send(b"what was printed before, ")
            await settle()
            nursery.start_soon(port.write_to, file.fileno())
            await settle()
            assert guest.returned() == 1
            give = port.give
            port.give = None  # type: ignore[assignment,method-assign]
            guest.send(b"what comes now, ")
            guest.send(b"at once")
            pulses = bench.line.pulses
            await settle()
            assert guest.returned() == 2
            assert bench.line.pulses == pulses + 1  # for both
            port.give = give  # type: ignore[method-assign]
            bench.device.finish()
    printed = b"what was printed before, what comes now, at once"
    assert (tmp_path / "log").read_bytes() == printed


async def test_a_slow_reader_gets_all_of_it_in_order(pipe: tuple[int, int]) -> None:
    near, far = pipe
    bench, port = console(1000)
    data = numbered(400_000)
    got = b""
    async with bench.running() as driver, trio.open_nursery() as nursery:
        guest = await start(driver)
        nursery.start_soon(port.write_to, far)
        for begin in range(0, len(data), 40_000):
            guest.at = driver.end
            guest.send(data[begin : begin + 40_000])
            while not guest.returned():
                await settle()
                assert len(port.output) <= 1000
                got += drain(near)
        bench.device.finish()
        await settle()
        got += drain(near)
    assert got == data
    assert port.lost == 0


async def test_while_it_is_full_the_guest_waits_and_pauses_are_quick(
    pipe: tuple[int, int],
) -> None:
    """What is in the pipe, in the buffer and in the chain make the whole of it, also elsewhere."""
    near, far = pipe
    bench, port = console(1000)
    data = numbered(3 * PIPE)
    async with bench.running() as driver:
        guest = await start(driver)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.write_to, far)
            await settle()
            guest.send(data)
            await settle()
            assert guest.returned() == 0
            with trio.fail_after(5):
                await bench.device.quiesce()
            state = bench.device.save()
            nursery.cancel_scope.cancel()
        (head, done) = state["queues"][1]["in_flight"][0]
        assert (head, done) == (0, PIPE + 1000)
    got = drain(near)
    other = Bench(Console(Port("a", output_size=1000)), bench.memory)
    other.device.load(state)
    async with other.running(), trio.open_nursery() as nursery:
        nursery.start_soon(other.model.ports["a"].write_to, far)
        with trio.fail_after(5):
            while len(got) < len(data):
                await settle()
                got += drain(near)
        other.device.finish()
    assert got == data


async def test_a_reset_forgets_what_the_chain_still_held(pipe: tuple[int, int]) -> None:
    near, far = pipe
    bench, port = console(1000)
    data = numbered(3 * PIPE)
    async with bench.running() as driver, trio.open_nursery() as nursery:
        guest = await start(driver)
        nursery.start_soon(port.write_to, far)
        await settle()
        guest.send(data)
        await settle()
        guest = await start(driver)
        got = drain(near)
        await settle()
        guest.send(b"after the reset")
        await settle()
        got += drain(near)
        assert guest.returned() == 1
        bench.device.finish()
    assert got == data[: PIPE + 1000] + b"after the reset"


async def test_cancelled_it_leaves_the_rest_to_who_comes_next(pipe: tuple[int, int]) -> None:
    near, far = pipe
    bench, port = console(1000)
    data = numbered(2 * PIPE)
    async with bench.running() as driver:
        guest = await start(driver)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.write_to, far)
            await settle()
            with pytest.raises(trio.BusyResourceError):
                await port.receive_some()
            guest.send(data)
            await settle()
            nursery.cancel_scope.cancel()
        got = drain(near)
        while len(got) < len(data):
            got += await port.receive_some()
        assert got == data


async def test_a_reader_that_has_gone_is_an_error_and_loses_nothing(pipe: tuple[int, int]) -> None:
    near, far = pipe
    bench, port = console(1000)
    async with bench.running() as driver:
        guest = await start(driver)
        with pytest.raises(BrokenPipeError):
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(port.write_to, far)
                    await settle()
                    os.close(near)
                    guest.send(b"who hears this?")
                    await trio.sleep_forever()
            except* BrokenPipeError as group:
                raise group.exceptions[0] from None
        assert await port.receive_some() == b"who hears this?"
        assert guest.returned() == 1


async def test_closing_the_port_ends_it(pipe: tuple[int, int]) -> None:
    _, far = pipe
    bench, port = console()
    async with bench.running() as driver, trio.open_nursery() as nursery:
        guest = await start(driver)

        async def write() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await port.write_to(far)

        nursery.start_soon(write)
        await settle()
        await port.aclose()
        guest.send(b"nobody listens")
        await settle()
        assert (guest.returned(), port.lost) == (1, 14)


async def test_a_socket_of_somebody_elses_mode() -> None:
    """It blocks, and stays so; the machine does not wait for it."""
    near, far = socket.socketpair()
    with near, far:
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        bench, port = console(1000)
        data = numbered(200_000)
        got = b""
        async with bench.running() as driver, trio.open_nursery() as nursery:
            guest = await start(driver)
            nursery.start_soon(port.write_to, far.fileno())
            guest.send(data)
            await settle()
            assert guest.returned() == 0
            assert far.getblocking()
            while len(got) < len(data):
                got += near.recv(1000)
                await settle()
            assert guest.returned() == 1
            bench.device.finish()
        assert got == data


@pytest.mark.parametrize("blocking", [False, True])
async def test_the_near_end_of_a_terminal_is_not_made_another(blocking: bool) -> None:
    near, far = pty.openpty()
    try:
        tty.setraw(far)
        os.set_blocking(far, False)
        os.set_blocking(near, blocking)
        bench, port = console(1000)
        data = numbered(200 if blocking else 50_000)
        got = b""
        async with bench.running() as driver, trio.open_nursery() as nursery:
            guest = await start(driver)
            nursery.start_soon(port.write_to, near)
            await settle()
            assert (port.sink is None) is blocking  # it could keep the machine waiting
            guest.send(data)
            with trio.fail_after(20):
                while len(got) < len(data):
                    await settle()
                    got += drain(far)
            bench.device.finish()
        assert got == data
    finally:
        os.close(near)
        os.close(far)


async def test_a_hostile_chain_of_gigabytes_keeps_nobody_waiting() -> None:
    bench, port = console()
    null = os.open(os.devnull, os.O_WRONLY)
    async with bench.running() as driver, trio.open_nursery() as nursery:
        await driver.start(VERSION_1 | EVENT_IDX)
        nursery.start_soon(port.write_to, null)
        ring = driver.rings[1]
        await settle()
        written, send = [], HostFd.write_now

        def write_now(sink: HostFd, buffers: list[memoryview]) -> int:
            written.append(sum(map(len, buffers)))
            return send(sink, buffers)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HostFd, "write_now", write_now)
            ring.add([(0, 1 << 20, False)] * 16)
            ring.kick()
            while not ring.take():
                await trio.lowlevel.checkpoint()
        assert sum(written) == (16 << 20) - (256 << 10)
        assert max(written) <= 64 << 10
        bench.device.finish()
    os.close(null)


async def test_a_guest_that_refills_for_ever_is_paused() -> None:
    """Chains of nothing: they take no time of the sink, and no room in it."""
    bench, port = console()
    null = os.open(os.devnull, os.O_WRONLY)
    async with bench.running() as driver, trio.open_nursery() as nursery:
        await driver.start(VERSION_1 | EVENT_IDX)
        nursery.start_soon(port.write_to, null)
        ring = driver.rings[1]
        await settle()
        queue = bench.device._queues[1]
        send, rounds = queue.send, 0

        def refilled(*args: int) -> object:
            nonlocal rounds
            rounds += 1
            answer = send(*args)
            ring.take()
            ring.add([(0, 0, False)])
            ring.kick()
            return answer

        queue.send = refilled  # type: ignore[method-assign,assignment]
        ring.add([(0, 0, False)])
        ring.kick()
        with trio.fail_after(5):
            while rounds < 1000:
                await trio.lowlevel.checkpoint()
            await bench.device.quiesce()
        bench.device.finish()
    os.close(null)


DATA = numbered(300_000)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 9000)),
        st.tuples(st.just("drain"), st.integers(1, 5000)),
        st.tuples(st.sampled_from(["pause", "receive", "move"]), st.integers(1, 1500)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
async def test_whatever_comes_between_each_byte_goes_once_and_in_order(
    steps: list[tuple[str, int]],
) -> None:
    near, far = os.pipe()
    os.set_blocking(near, False)
    fcntl.fcntl(far, fcntl.F_SETPIPE_SZ, PIPE)
    bench, port = console(1000)
    data, got, sent = DATA, b"", 0

    async def write(port: Port, scope: trio.CancelScope) -> None:
        with scope:
            await port.write_to(far)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.device.run)
        guest = await start(driver := Driver(bench))
        ring = driver.rings[1]
        nursery.start_soon(write, port, writing := trio.CancelScope())
        for what, size in [*steps, ("end", 0)]:
            await settle()
            ring.take()
            if what == "send" and len(ring.free) >= 2 and guest.at + size < bench.memory.size:
                guest.send(data[sent : sent + size])
                sent += size
            elif what == "drain":
                with suppress(BlockingIOError):
                    got += os.read(near, size)
            elif what == "pause":
                await bench.device.quiesce()
                await settle()
                await bench.device.resume()
            elif what in ("receive", "move"):
                writing.cancel()
                await settle()
                if what == "receive" and port.output:
                    got += drain(near)
                    got += await port.receive_some(size)
                elif what == "move":
                    await bench.device.quiesce()
                    state = bench.device.save()
                    bench = Bench(Console(port := Port("a", output_size=1000)), bench.memory)
                    bench.device.load(state)
                    nursery.start_soon(bench.device.run)
                    driver.bench = ring.bench = bench
                nursery.start_soon(write, port, writing := trio.CancelScope())
        with trio.fail_after(10):
            while len(got) < sent:
                await settle()
                got += drain(near)
        nursery.cancel_scope.cancel()
    os.close(near)
    os.close(far)
    assert got == data[:sent]
