"""What only one machine may hold goes over with a guest: disks' locks, sockets, output that nobody
has read; and comes back where the guest does."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import avmm
from avmm.devices.serial import Serial
from avmm.errors import PeerAbortedError
from avmm.outcome import Cause

pytestmark = [pytest.mark.usefixtures("kvm", "nothing_left"), pytest.mark.timeout(60)]


@asynccontextmanager
async def line() -> AsyncIterator[list[trio.SocketStream]]:
    ends = [trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in socket.socketpair()]
    async with ends[0], ends[1]:
        yield ends


async def said(vm: avmm.Machine, end: bytes) -> bytes:
    text = b""
    while not text.endswith(end):
        text += await vm.console.receive_some()
    return text


async def refused(stream: trio.abc.Stream, match: str, **settings: Any) -> None:
    with pytest.raises(avmm.ConfigError, match=match):
        async with avmm.receive(stream, **settings):
            pytest.fail("the guest is here")


def can_be_written(disk: Path) -> bool:
    try:
        avmm.RawDisk(disk).close()
    except avmm.ConfigError:
        return False
    return True


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    return path


async def test_the_lock_of_a_disk_and_the_path_of_a_socket_go_over(
    tmp_path: Path, disk: Path
) -> None:
    path = tmp_path / "vsock"
    links = {"disks": [str(disk)], "vsock": f"cid=3,unix={path}"}
    async with (
        line() as (here, there),
        avmm.Machine(memory="8M", **links) as vm,
        trio.open_nursery() as nursery,
    ):
        await said(vm, b"avmm> ")
        nursery.start_soon(vm.migrate, here)
        async with avmm.receive(there, **links) as moved:
            assert (await vm.wait()).cause is Cause.MOVED
            assert not can_be_written(disk)
            async with await trio.open_unix_socket(str(path)) as client:
                await client.send_all(b"\n")
                assert await client.receive_some() == b""
            await moved.console.send_all(b"exit 3\r")
            assert (await moved.wait()).status == 3
        assert can_be_written(disk)
        assert not path.exists()


async def test_a_destination_that_cannot_have_a_socket_does_not_get_the_guest(
    tmp_path: Path, disk: Path
) -> None:
    """It finds out before it says READY; what it had got hold of by then goes back."""
    ours, taken = tmp_path / "vsock", tmp_path / "taken"
    async with line() as (here, there), trio.open_nursery() as nursery:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(taken))
            other.listen()
            async with avmm.Machine(
                memory="8M", disks=[str(disk)], vsock=f"cid=3,unix={ours}"
            ) as vm:
                await said(vm, b"avmm> ")
                links = {"disks": [str(disk)], "vsock": f"cid=3,unix={taken}"}

                async def receive() -> None:
                    await refused(there, "vsock socket", **links)

                nursery.start_soon(receive)
                with pytest.raises(PeerAbortedError, match="vsock socket"):
                    await vm.migrate(here)
                assert not can_be_written(disk)
                with trio.fail_after(5):
                    while not ours.exists():  # noqa: ASYNC110 - a socket's path sets no event
                        await trio.sleep(0.001)
                await vm.console.send_all(b"exit 3\r")
                assert (await vm.wait()).status == 3


async def test_a_destination_says_no_before_a_network_that_comes_after_a_socket(
    tmp_path: Path,
) -> None:
    """Sockets that it has got hold of and that nobody serves yet are let go of."""
    ours, theirs, net = tmp_path / "ours", tmp_path / "theirs", tmp_path / "net"
    async with (
        line() as (here, there),
        trio.open_nursery() as nursery,
        avmm.Machine(memory="8M", vsock=f"cid=3,unix={ours}", net=[f"listen={net}"]) as vm,
    ):
        await said(vm, b"avmm> ")
        links: dict[str, Any] = {"vsock": f"cid=3,unix={theirs}", "net": [f"unix={net}-2"]}

        async def receive() -> None:
            with trio.fail_after(10):
                await refused(there, "net socket", **links)

        nursery.start_soon(receive)
        with pytest.raises(PeerAbortedError, match="net socket"):
            await vm.migrate(here)
        assert not theirs.exists()
        await vm.console.send_all(b"exit 3\r")
        assert (await vm.wait()).status == 3


async def test_a_disk_that_cannot_be_flushed_keeps_its_guest(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def flush(self: avmm.RawDisk) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with (
        line() as (here, there),
        avmm.Machine(memory="8M", disks=[str(disk)]) as vm,
        trio.open_nursery() as nursery,
    ):
        await said(vm, b"avmm> ")

        async def receive() -> None:
            with pytest.raises(PeerAbortedError, match="Input/output error"):
                async with avmm.receive(there, disks=[str(disk)]):
                    pytest.fail("the guest is here")

        nursery.start_soon(receive)
        with monkeypatch.context() as patch:
            patch.setattr(avmm.RawDisk, "flush", flush)
            with pytest.raises(avmm.MigrationError, match="Input/output error"):
                await vm.migrate(here)
        assert not can_be_written(disk)
        await vm.console.send_all(b"exit 3\r")
        assert (await vm.wait()).status == 3


class LastWord(avmm.Device):
    """Stands for what the guest writes just before it stands still."""

    def __init__(self) -> None:
        self.serial: Serial | None = None

    async def quiesce(self) -> None:
        if self.serial is not None:
            self.serial.write(0, 1, ord("x"))

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: object) -> None:
        pass


async def test_output_at_the_standstill_is_read_on_one_side_alone() -> None:
    """Its reader here has been woken, and has its turn when the state was saved; on a busy host
    before, and then it is here that it is read."""
    got: list[bytes] = []
    last_word = LastWord()
    async with (
        line() as (here, there),
        avmm.Machine(memory="8M", devices=[avmm.pio(last_word, 0x500, 1)]) as vm,
        trio.open_nursery() as nursery,
    ):
        await said(vm, b"avmm> ")
        last_word.serial = vm._inside.parts.serial

        async def read() -> None:
            got.extend([bytes(data) async for data in vm.console])

        nursery.start_soon(read)
        nursery.start_soon(vm.migrate, here)
        async with avmm.receive(there, devices=[avmm.pio(LastWord(), 0x500, 1)]) as moved:
            await moved.console.send_all(b"\x04")
            text = b"".join([data async for data in moved.console])
    here_too = b"".join(got)
    assert here_too in (b"", b"x")
    assert (here_too + text).count(b"x") == 1
