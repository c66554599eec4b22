"""The bundled shell counts on several channels at once, and is stopped and moved meanwhile: each
number comes once, in order, on each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.counting import PORT, SECTOR, Counting

import avmm
from avmm.devices.virtio import vsock, vsock_stream
from avmm.devices.virtio.vsock_stream import Op, VsockStream

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("kvm", "nothing_left"),
]

ALL = ("serial", "hvc", "vsock", "disk")
CONSOLES = pytest.mark.parametrize("console", ["ttyS0", "hvc0"])


def empty_disk(folder: Path, sectors: int) -> Path:
    path = folder / "disk"
    path.write_bytes(bytes(sectors * SECTOR))
    return path


def machine(disk: Path | None = None, *, cid: int = 3, **settings: Any) -> avmm.Machine:
    """One with a device for each channel; without a disk, with the serial one alone."""
    if disk is not None:
        settings.setdefault("disks", [str(disk)])
        settings |= {"vsock": f"cid={cid}", "devices": [avmm.virtio(avmm.Console())]}
    return avmm.Machine(memory="16M", **settings)


def keyboard(vm: avmm.Machine, console: str) -> trio.abc.Stream:
    return vm.ports["hvc0"] if console == "hvc0" else vm.console


async def said_until(stream: trio.abc.ReceiveStream, end: bytes) -> str:
    said = b""
    while not said.endswith(end):
        said += await stream.receive_some()
    return said.decode().replace("\r", "")


async def conversation(vm: avmm.Machine, *commands: str) -> str:
    """What a guest with a serial console says to these, and its end."""
    lines = [f"{command}\r".encode() for command in (*commands, "exit 0")]
    await vm.console.send_all(b"".join(lines))
    return b"".join([data async for data in vm.console]).decode().replace("\r", "")


def is_on_disk(disk: Path, number: int) -> bool:
    with disk.open("rb") as file:
        file.seek((number - 1) * SECTOR)
        return file.read(1) != b"\0"


async def saved(
    vm: avmm.Machine, counting: Counting, number: int, disk: Path, ahead: int = 0
) -> dict[str, Any]:
    """A state from the midst of it, with the connection open and everything under way; and with
    so many numbers in the buffers that nobody has read. The disk of that moment is kept for
    `put_back`, because the guest runs on for a moment afterwards."""
    async with contextlib.AsyncExitStack() as pause:
        async with counting.attached(vm, until=number if ahead else None):
            await counting.reached(number)
            while ahead and not is_on_disk(disk, number + ahead):  # noqa: ASYNC110 - no event
                await trio.sleep(0.002)
            await pause.enter_async_context(vm.paused(deadline=10))
        kept(disk).write_bytes(disk.read_bytes())
        return dict(vm.save())


def kept(disk: Path) -> Path:
    return disk.with_suffix(".kept")


def put_back(disk: Path) -> None:
    """The disk as it was when the state was saved. Call it when the machine has ended."""
    disk.write_bytes(kept(disk).read_bytes())


@CONSOLES
async def test_saved_and_loaded_in_the_midst_of_counting(tmp_path: Path, console: str) -> None:
    """Each machine's guest has another number; what the host has got goes along as text."""
    counting = Counting(3000, *ALL)
    disk = empty_disk(tmp_path, 3003)
    settings: dict[str, Any] = {"cmdline": f"console={console}"}
    for turn in range(16):
        async with machine(disk, cid=3 + turn, **settings) as vm:
            if turn == 0:
                await keyboard(vm, console).send_all(counting.command)
            number, ahead = 11 + 173 * turn, turn % 4 * 20
            settings["state"] = await saved(vm, counting, number, disk, ahead)
        put_back(disk)
        counting = Counting.load(json.loads(json.dumps(counting.save())))
    async with machine(disk, **settings) as vm, counting.attached(vm):
        await counting.finished()
        await keyboard(vm, console).send_all(b"exit 7\r")
        assert (await vm.wait()).status == 7
    counting.check(disk)


@pytest.mark.lab
async def test_saved_and_loaded_at_the_end_of_counting(tmp_path: Path) -> None:
    """The last numbers are under way, or the end of the connection is, or neither."""
    counting = Counting(200, *ALL)
    disk = empty_disk(tmp_path, 200)
    state = None
    for turn in range(12):
        async with machine(disk, state=state) as vm:
            if turn == 0:
                await vm.console.send_all(counting.command)
            number = min(182 + 2 * turn, 200)
            state = await saved(vm, counting, number, disk, (200 - number) * (turn % 2))
        put_back(disk)
    async with machine(disk, state=state) as vm, counting.attached(vm):
        await counting.finished()
        await vm.console.send_all(b"exit 7\r")
        assert (await vm.wait()).status == 7
    counting.check(disk)


async def test_clones_go_on_each_for_itself(tmp_path: Path) -> None:
    counting = Counting(600, *ALL)
    disk = empty_disk(tmp_path, 600)
    async with machine(disk) as vm:
        await vm.console.send_all(counting.command)
        state = await saved(vm, counting, 300, disk, 50)
    progress, data = counting.save(), kept(disk).read_bytes()

    async def go_on(name: str) -> None:
        mine = Counting.load(progress)
        copy = tmp_path / name
        copy.write_bytes(data)
        async with machine(copy, state=state) as vm, mine.attached(vm):
            await mine.finished()
            await vm.console.send_all(b"exit 7\r")
            assert (await vm.wait()).status == 7
        mine.check(copy)

    async with trio.open_nursery() as nursery:
        for name in ("one", "two", "three"):
            nursery.start_soon(go_on, name)


@pytest.mark.lab
async def test_pauses_in_the_midst_of_counting(tmp_path: Path) -> None:
    """A pause breaks no connection."""
    counting = Counting(600, *ALL)
    disk = empty_disk(tmp_path, 600)
    async with machine(disk) as vm, counting.attached(vm):
        await vm.console.send_all(counting.command)
        for turn in range(30):
            await counting.reached(1 + 19 * turn)
            async with vm.paused(deadline=10):
                pass
        await counting.finished()
        await vm.console.send_all(b"exit 7\r")
        assert (await vm.wait()).status == 7
    counting.check(disk)
    assert counting.connections == 1


async def test_a_host_program_that_comes_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes the connection with numbers in it that it has not read, or resets it, and does
    not listen for a while; only at the end it reads to the end. Once the guest's own end may be
    on its way to it, it closes none: that would say that it has read all."""
    for module in (vsock, vsock_stream):
        monkeypatch.setattr(module, "BUFFER", 1000)  # so the guest is 500 numbers ahead at most
    got: list[int] = []
    turns = 0
    async with machine(empty_disk(tmp_path, 8)) as vm:
        await vm.console.send_all(b"count 1000 vsock\r")
        while len(got) < 1000:
            async with vm.vsock.listen(PORT) as listener:
                stream = await listener.accept()
            async with stream:
                await stream.send_all(b"%d\n" % len(got))
                data = b""
                while data.count(b"\n") < min(70, 1000 - len(got)):
                    data += await stream.receive_some(7)
                got += [int(line) for line in data.split(b"\n")[:-1]]
                if len(got) == 1000:
                    assert await stream.receive_some() == b""
                elif turns % 2 or len(got) > 500:
                    stream.refuse()
            turns += 1
        await said_until(vm.console, b"vsock\r\navmm> ")
    assert got == list(range(1, 1001))
    assert turns > 10


async def test_an_end_that_is_lost_is_said_again() -> None:
    """A host that has got every number waits for the end, so that the guest may not leave without
    one: this host loses its first connection just before."""
    async with avmm.Machine(memory="16M", vsock="cid=3") as vm, vm.vsock.listen(PORT) as listener:
        await vm.console.send_all(b"count 5 vsock\r")
        for is_lost in (True, False):
            async with await listener.accept() as stream:
                await stream.send_all(b"5\n")
                assert await stream.receive_some() == b""
                if is_lost:
                    stream.refuse()
        await said_until(vm.console, b"vsock\r\navmm> ")


class Arrivals(trio.abc.Listener[Any]):
    """A listener whose connections come by a channel."""

    def __init__(self, source: trio.MemoryReceiveChannel[Any]) -> None:
        self._source = source

    async def accept(self) -> Any:
        return await self._source.receive()

    async def aclose(self) -> None:
        await self._source.aclose()


async def test_of_two_connections_the_newer_counts() -> None:
    """A guest may leave one without a word; what is read of it after that would come twice."""
    counting = Counting(20, "vsock")
    arrive, source = trio.open_memory_channel[Any](0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(counting.serve, Arrivals(source))
        old, its_end = trio.testing.memory_stream_pair()
        await arrive.send(its_end)
        assert await old.receive_some() == b"0\n"
        await old.send_all(b"1\n2\n3\n1")
        await counting.reached(3)
        new, its_end = trio.testing.memory_stream_pair()
        await arrive.send(its_end)
        assert await new.receive_some() == b"3\n"
        with contextlib.suppress(trio.BrokenResourceError):
            await old.send_all(b"\n4\n")
        await new.send_all(b"4\n5\n")
        await counting.reached(5)
        nursery.cancel_scope.cancel()


async def test_a_number_that_is_not_the_next_is_an_error() -> None:
    line = trio.testing.MemoryReceiveStream()
    line.put_data(b"1\r\n3\r\n")
    with pytest.raises(AssertionError, match="serial: 3, expected 2"):
        await Counting(20, "serial").read("serial", line)


async def test_a_host_that_has_little_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that sent more than there is credit for would lose the connection."""
    packets: list[int] = []
    take, receive = VsockStream.take, VsockStream.receive_some
    requested = trio.Event()

    def noted(stream: VsockStream, op: int, *rest: Any) -> bool:
        packets.append(op)
        if op == Op.CREDIT_REQUEST:
            requested.set()
        return take(stream, op, *rest)

    async def receive_late(stream: VsockStream, most: int | None = None) -> bytes:
        await requested.wait()
        return await receive(stream, most)

    monkeypatch.setattr(VsockStream, "receive_some", receive_late)
    monkeypatch.setattr(VsockStream, "take", noted)
    for module in (vsock, vsock_stream):
        monkeypatch.setattr(module, "BUFFER", 60)
    counting = Counting(1500, "vsock")
    async with machine(empty_disk(tmp_path, 8)) as vm, counting.attached(vm):
        await vm.console.send_all(counting.command)
        await counting.finished()
        await said_until(vm.console, b"vsock\r\navmm> ")
    assert counting.connections == 1
    assert packets.count(Op.RW) == 1500
    assert packets.count(Op.SHUTDOWN) == 1
    assert Op.CREDIT_REQUEST in packets


async def test_a_key_ends_it_in_order(tmp_path: Path) -> None:
    """Twice: the device is there for another count."""
    disk = empty_disk(tmp_path, 10_000)
    async with machine(disk) as vm, vm.vsock.listen(PORT) as listener:
        for first in (0, 1_000_000_000_000):
            await vm.console.send_all(b"count vsock hvc\r")
            stream = await listener.accept()
            await stream.send_all(b"%d\n" % first)
            data = b""
            while data.count(b"\n") < 20:
                data += await stream.receive_some()
            await vm.console.send_all(b"q")
            data += b"".join([more async for more in stream])
            await stream.aclose()
            await said_until(vm.console, b"hvc\r\navmm> ")
            lines = [int(line) for line in data.split(b"\n")[:-1]]
            assert lines == list(range(first + 1, first + 1 + len(lines)))
            assert data.endswith(b"\n")
    assert not any(disk.read_bytes())


async def test_ctrl_c_ends_a_count_that_nobody_listens_to(tmp_path: Path) -> None:
    async with machine(empty_disk(tmp_path, 8)) as vm:
        await vm.console.send_all(b"count 10 vsock disk\r")
        await said_until(vm.console, b"count 10 vsock disk\r\n")
        await vm.console.send_all(b"\x03")
        assert "^C" in await said_until(vm.console, b"avmm> ")


async def test_a_host_that_says_no_number(tmp_path: Path) -> None:
    for line in (b"one\n", b"0" * 100):
        async with machine(empty_disk(tmp_path, 8)) as vm, vm.vsock.listen(PORT) as listener:
            await vm.console.send_all(b"count 10 vsock\r")
            async with await listener.accept() as stream:
                await said_until(vm.console, b"avmm> count 10 vsock\r\n")
                await stream.send_all(line)
                said = await said_until(vm.console, b"avmm> ")
        assert "count: the host at vsock port 5000 sent no number" in said


async def test_a_disk_that_holds_something(tmp_path: Path) -> None:
    disk = empty_disk(tmp_path, 8)
    disk.write_bytes(bytes(5 * SECTOR - 1) + b"\1" + bytes(3 * SECTOR))
    async with machine(disk) as vm:
        said = await conversation(vm, "count 8 disk", "count 8 disk")
    assert 'count: sector 4 holds ""' in said
    assert 'count: sector 0 holds "1"' in said
    assert disk.read_bytes()[: 4 * SECTOR] == b"".join(
        b"%d\n".ljust(SECTOR + 1, b"\0") % number for number in range(1, 5)
    )


async def test_disks_that_cannot_be_counted_on(tmp_path: Path) -> None:
    disk = empty_disk(tmp_path, 8)
    async with machine(disk, disks=[f"{disk},ro"]) as vm:
        assert "count: sector 0 cannot be written" in await conversation(vm, "count 8 disk")
    async with machine(disk) as vm:
        said = await conversation(vm, "count 9 disk")
    assert "count: the disk is full, it has 8 sectors" in said


class Noted(avmm.Disk):
    """One in memory that writes down what it is asked for."""

    name, size, contents_stay = "noted", 8 * SECTOR, True

    def __init__(self) -> None:
        self.data = bytearray(self.size)
        self.asked: list[tuple[str, int]] = []

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.asked.append(("read", offset))
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    async def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.asked.append(("write", offset))
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    async def flush(self) -> None:
        self.asked.append(("flush", 0))


async def test_a_disk_is_asked_for_no_more_than_it_takes() -> None:
    disk = Noted()
    async with avmm.Machine(memory="16M", devices=[avmm.virtio(avmm.VirtioBlock(disk))]) as vm:
        await conversation(vm, "count 3 disk")
    each = [(what, number * SECTOR) for number in range(3) for what in ("read", "write")]
    assert disk.asked == [*each, ("flush", 0)]


async def test_what_is_not_there() -> None:
    async with machine() as vm:
        said = await conversation(
            vm, "count 2 serial disk", "count hvc", "count 2 vsock", "count 3", "count 2 two"
        )
    assert "count: there is no virtio disk\navmm> " in said
    assert "count: there is no virtio console\navmm> " in said
    assert "count: there is no virtio socket device\navmm> " in said
    assert "avmm> count 3\n1\n2\n3\navmm> " in said
    assert "two? It counts to serial, hvc, vsock and disk, once each." in said
