"""Nothing that may block is called in trio's thread, where all other tasks would wait for it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from support.offloaded import nothing_blocks

import avmm
from avmm.errors import ConfigError, PeerAbortedError
from avmm.threads import in_thread

pytestmark = pytest.mark.usefixtures("kvm")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Each kind of what a guest has of its host, but for interfaces: these take a right."""
    disk, base = tmp_path / "disk", tmp_path / "base"
    disk.write_bytes(bytes(1 << 20))
    base.write_bytes(bytes(1 << 20))
    return {
        "memory": "16M",
        "disks": [f"{base},overlay", str(disk)],
        "net": [f"listen={tmp_path}/net,mac=52:54:00:00:00:01"],
        "vsock": f"cid=3,unix={tmp_path}/vsock",
    }


def links(settings: dict[str, Any]) -> dict[str, Any]:
    """What has to be given again."""
    return {name: settings[name] for name in ("disks", "net", "vsock")}


async def answers(vm: avmm.Machine, line: bytes = b"") -> None:
    await vm.console.send_all(line + b"\r")
    said = b""
    with trio.fail_after(20):
        while not said.endswith(b"avmm> "):
            said += await vm.console.receive_some()


@asynccontextmanager
async def quiet() -> AsyncIterator[None]:
    with nothing_blocks() as found:
        yield
    assert found == []


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    here, there = map(trio.socket.from_stdlib_socket, socket.socketpair())
    async with trio.SocketStream(here) as near, trio.SocketStream(there) as far:
        yield near, far


class Picky(avmm.Device):
    """Is not taken hold of, where it is told so."""

    def __init__(self, *, refuses: bool) -> None:
        self._refuses = refuses

    async def acquire(self) -> None:
        if self._refuses:
            raise ConfigError("picky")

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: object) -> None:
        assert state == {}


async def test_what_blocks_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with nothing_blocks() as found:
        path.write_bytes(b"x")
        path.rename(tmp_path / "other")
        with (tmp_path / "other").open("rb") as file:
            os.fsync(file)
        await in_thread(path.write_bytes, b"y")
    path.write_bytes(b"z")
    names = [what.partition(",")[0].partition("(")[0] for what in found]
    assert names == ["open", "os.rename", "open", "os.fsync"]


async def test_making_and_leaving(settings: dict[str, Any]) -> None:
    async with quiet(), avmm.Machine(**settings) as vm:
        await answers(vm)


async def test_a_pause(settings: dict[str, Any]) -> None:
    async with avmm.Machine(**settings) as vm:
        await answers(vm)
        async with quiet():
            async with vm.paused(deadline=20):
                pass
            await answers(vm)


async def test_a_snapshot_and_its_restore(tmp_path: Path, settings: dict[str, Any]) -> None:
    snap = tmp_path / "snap"
    async with avmm.Machine(**settings) as vm:
        await answers(vm)
        await answers(vm, b"count 5 disk")  # in the overlay
        async with quiet():
            await vm.snapshot(snap)
    async with quiet(), avmm.restore(snap, verify=True, **links(settings)) as vm:
        await answers(vm)


async def test_a_clone_and_a_clone_of_what_was_written_since(settings: dict[str, Any]) -> None:
    overlays = [settings["disks"][0]] * 2
    second = {
        "disks": overlays,
        "net": [net.replace("/net,", "/second,") for net in settings["net"]],
        "vsock": settings["vsock"] + "2",
    }
    async with avmm.Machine(**settings | {"disks": overlays}) as vm:
        await answers(vm)
        for _ in range(2):
            await answers(vm, b"burn 4000 1")
            async with quiet(), vm.clone(**second) as twin:
                await answers(twin)


async def test_a_migration(settings: dict[str, Any]) -> None:
    async with pair() as (near, far), avmm.Machine(**settings) as vm:
        await answers(vm)
        await answers(vm, b"count 5 disk")
        async with quiet(), trio.open_nursery() as nursery:
            nursery.start_soon(vm.migrate, near)
            async with avmm.receive(far, **links(settings)) as moved:
                await answers(moved)


async def test_a_migration_after_which_the_source_takes_everything_back(
    settings: dict[str, Any],
) -> None:
    async def refuse() -> None:
        devices = [avmm.pio(Picky(refuses=True), 0x5000, 1)]
        with pytest.raises(ConfigError, match="picky"):
            async with avmm.receive(far, devices=devices, **links(settings)):
                pass

    devices = [avmm.pio(Picky(refuses=False), 0x5000, 1)]
    async with pair() as (near, far), avmm.Machine(devices=devices, **settings) as vm:
        await answers(vm)
        async with quiet(), trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            with pytest.raises(PeerAbortedError, match="picky"):
                await vm.migrate(near)
        await answers(vm)


FIRST = """
import sys, trio
import avmm
from support.offloaded import nothing_blocks

async def main():
    near, far = trio.testing.memory_stream_pair()
    with nothing_blocks() as found:
        async with avmm.restore(sys.argv[1]) as vm, trio.open_nursery() as nursery:
            await vm.snapshot(sys.argv[1])
            nursery.start_soon(vm.migrate, near)
            async with avmm.receive(far):
                pass
    print(*found, sep="\\n", end="")

import trio.testing
trio.run(main)
"""


async def test_the_first_time_in_a_process(tmp_path: Path) -> None:
    """Modules that not everybody needs are imported when they are needed, from files."""
    snap = tmp_path / "snap"
    async with avmm.Machine(memory="16M") as vm:
        await vm.snapshot(snap)
    done = await trio.run_process(
        [sys.executable, "-c", FIRST, str(snap)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_stdout=True,
    )
    assert done.stdout.decode() == ""
