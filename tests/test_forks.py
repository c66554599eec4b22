"""A child that a program with a guest forks, by `os.fork` or by `multiprocessing`: it keeps
nothing of the guest alive, and the guest does not notice it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import avmm
from avmm.devices.sockets import connect
from avmm.disks import OverlayDisk
from avmm.disks.raw import RawDisk
from avmm.ends import serve_pty, serve_unix
from avmm.scrollback import Scrollback

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("kvm", "nothing_left")]


FORK: Callable[[], int] = ctypes.PyDLL(None).fork
"""`fork` as other code calls it, so that Python does not notice."""


@contextmanager
def forked(look: Callable[[], str] = lambda: "") -> Iterator[str]:
    """A forked child that calls `look`, and then lives until the block is left. Yields what `look`
    has returned there."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        found = "the child has failed"
        try:
            found = look()
        except BaseException as error:
            found = repr(error)
        finally:
            os.write(writing, found.encode())
            os.close(writing)
            signal.pause()
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as told:
            yield told.read().decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def open_files() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are enough
        try:
            found[fd] = str(Path(f"/proc/self/fd/{fd}").readlink())
        except FileNotFoundError:
            continue  # the one with which the folder was listed
    return found


def guest_maps() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line for line in lines if "avmm-ram" in line or "-vcpu" in line}


def kept(before: dict[str, str], maps: set[str]) -> Callable[[], str]:
    """What a child has of what was opened since `before` and `maps`: descriptors, except pipes,
    which are the test's own, and mappings."""

    def look() -> str:
        found = [path for fd, path in open_files().items() if before.get(fd) != path]
        found = [path for path in found if path != os.devnull and not path.startswith("pipe:")]
        found += guest_maps() - maps
        return "\n".join(found)

    return look


async def test_a_child_keeps_nothing_of_a_guest(tmp_path: Path) -> None:
    disk, base = tmp_path / "disk", tmp_path / "base"
    for path in (disk, base, tmp_path / "twin"):
        path.write_bytes(bytes(1 << 20))
    await trio.to_thread.run_sync(lambda: None)  # what is opened once is open now
    before, maps = open_files(), guest_maps()
    async with (
        avmm.Machine(
            memory="64M",
            cpus=2,
            disks=[str(disk), f"{base},overlay"],
            vsock=f"cid=5,unix={tmp_path / 'vsock'}",
            net=[f"listen={tmp_path / 'net'}"],
        ) as vm,
        await avmm.listen(f"unix:{tmp_path / 'migration'}") as listener,
        trio.open_nursery() as nursery,
    ):
        log = Scrollback(vm.console)
        announced = trio.Event()
        nursery.start_soon(log.run)
        nursery.start_soon(serve_unix, log, str(tmp_path / "console"))
        nursery.start_soon(serve_pty, log, lambda path: announced.set())
        await announced.wait()
        ours = await connect(tmp_path / "console")
        theirs = [await connect(tmp_path / "migration"), await listener.accept()]
        async with vm.clone(
            disks=[str(tmp_path / "twin"), f"{base},overlay"],
            vsock="cid=6",
            net=[f"listen={tmp_path / 'net2'},mac=52:54:00:00:00:02"],
        ):
            with forked(kept(before, maps)) as found:
                assert found == ""
                # The parent has not been touched by what the child has done.
                await log.send(b"echo still\n")
                while b"\nstill" not in log.contents:
                    await ours.receive_some()
        nursery.cancel_scope.cancel()
    for stream in (ours, *theirs):
        await stream.aclose()


async def test_a_childs_life_does_not_prolong_the_guests(tmp_path: Path) -> None:
    disk, path = tmp_path / "disk", tmp_path / "net"
    disk.write_bytes(bytes(1 << 20))
    with ExitStack() as stack:
        settings: dict[str, Any] = {"disks": [str(disk)], "net": [f"listen={path}"]}
        async with avmm.Machine(memory="64M", **settings) as vm:
            client = await connect(path)
            with trio.fail_after(30):
                await vm.nets[0].backend.connected()
            stack.enter_context(forked())
        # The disk is unlocked, and whoever was connected knows that the guest has gone.
        RawDisk(disk).close()
        assert await client.receive_some() == b""
        await client.aclose()


def test_a_child_closes_nothing_that_was_closed_before(tmp_path: Path) -> None:
    """The number of a disk's descriptor may be another file's by now."""
    for name in ("base", "disk"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    closed = [OverlayDisk(tmp_path / "base"), RawDisk(tmp_path / "disk")]
    for disk in closed:
        disk.close()
    files = [os.open(tmp_path / "base", os.O_RDONLY) for _ in range(8)]
    with forked(lambda: " ".join(str(os.pread(fd, 1, 0)) for fd in files)) as found:
        assert found == " ".join(["b'\\x00'"] * 8)
    for fd in files:
        os.close(fd)


async def test_a_child_is_told_that_the_machine_is_not_its_own() -> None:
    async with avmm.Machine(memory="64M") as vm:

        def look() -> str:
            try:
                vm.memory.read(0, 1)
            except avmm.AvmmError as error:
                return str(error)
            return "it can be read"

        with forked(look) as found:
            assert "closed" in found
        assert vm.memory.read(0, 1) is not None


async def test_a_view_that_the_child_got_stays_valid() -> None:
    async with avmm.Machine(memory="64M") as vm:
        with vm.memory.view(0x100000, 4) as view:
            view[:] = b"view"
            with forked(lambda: bytes(view).decode()) as found:
                assert found == "view"


async def test_a_lock_does_not_outlive_the_disk_in_a_child_of_other_code(tmp_path: Path) -> None:
    """A library may fork without Python's knowledge."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    disk = RawDisk(path)
    child = FORK()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        disk.close()
        RawDisk(path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)  # noqa: ASYNC222 - it has been killed


def _target(queue: Any) -> None:
    queue.put(os.getpid())


async def test_multiprocessing_beside_a_guest() -> None:
    context = multiprocessing.get_context("fork")
    async with avmm.Machine(memory="64M") as vm:
        queue = context.SimpleQueue()
        child = context.Process(target=_target, args=(queue,))
        child.start()
        await trio.to_thread.run_sync(child.join)
        assert child.exitcode == 0 and queue.get() == child.pid
        child.close()
        queue.close()
        vm.stop()
        assert (await vm.wait()).cause is avmm.Cause.STOPPED
