"""Consoles while a guest is handed over: what is buffered is on one side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

import avmm
from avmm import AvmmError, Cause, ConfigError, MigrationError

pytestmark = pytest.mark.usefixtures("kvm", "nothing_left")

PROMPT = b"avmm> "


async def read_until(stream: trio.abc.ReceiveStream, text: bytes) -> bytes:
    heard = b""
    while text not in heard:
        data = await stream.receive_some()
        assert data, heard
        heard += data
    return heard


async def has_printed(vm: avmm.Machine, text: bytes) -> None:
    """Wait until the guest has printed `text`, which nobody reads."""
    printed = b""
    while text not in printed:
        async with vm.paused(deadline=10):
            printed = dict(vm.save()["devices"])["Serial"]["output"]


async def test_output_that_nobody_had_read_is_the_destinations_alone() -> None:
    ours, theirs = memory_stream_pair()
    async with avmm.Machine() as vm, trio.open_nursery() as nursery:
        await read_until(vm.console, PROMPT)
        await vm.console.send_all(b"count 500\r")
        await has_printed(vm, b"500\r\n" + PROMPT)
        nursery.start_soon(vm.migrate, ours)
        async with avmm.receive(theirs) as twin:
            heard = await read_until(twin.console, b"500\r\n" + PROMPT)
        assert [int(w) for w in heard.split() if w.isdigit()] == [500, *range(1, 501)]
        assert (await vm.wait()).cause is Cause.MOVED
        assert await vm.console.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await vm.console.send_all(b"too late")
        assert vm.console.accepted == 0


async def test_a_hand_over_that_failed_leaves_the_console_as_it_was(tmp_path: Path) -> None:
    """The destination fails when it has the state already: somebody holds its disk."""
    here, there = tmp_path / "here", tmp_path / "there"
    for disk in (here, there):
        disk.write_bytes(bytes(4096))
    ours, theirs = memory_stream_pair()
    refused: list[BaseException] = []

    async def receive() -> None:
        try:
            async with avmm.receive(theirs, disks=[str(there)]):
                raise AssertionError("it must not come")
        except ConfigError as error:
            refused.append(error)

    async with avmm.Machine(disks=[str(here)]) as vm, trio.open_nursery() as nursery:
        await read_until(vm.console, PROMPT)
        await vm.console.send_all(b"echo before\r")
        await has_printed(vm, b"before\r\n" + PROMPT)
        with avmm.RawDisk(there):
            nursery.start_soon(receive)
            with pytest.raises(MigrationError, match="in use"):
                await vm.migrate(ours)
        assert b"\nbefore\r\n" in await read_until(vm.console, b"before\r\n" + PROMPT)
        await vm.console.send_all(b"echo after\r")
        await read_until(vm.console, b"\nafter\r\n")
    assert "in use" in str(refused[0])


@pytest.fixture(params=["serial", "hvc"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "serial":
        return {}
    return {"cmdline": "console=hvc0", "devices": [avmm.virtio(avmm.Console())]}


def console(vm: avmm.Machine) -> avmm.ConsoleStream:
    return next(iter(vm.ports.values()), vm.console)


async def test_a_released_console_moves_nothing_until_it_is_taken_back(
    settings: dict[str, Any],
) -> None:
    async with avmm.Machine(**settings) as vm, trio.open_nursery() as nursery:
        stream = console(vm)
        await read_until(stream, PROMPT)
        await stream.send_all(b"echo one\r")
        heard = []

        async def listen() -> None:
            heard.append(await read_until(stream, b"\ntwo\r\n"))

        async with vm.paused(deadline=10):
            await vm._inside.parts.release()
            nursery.start_soon(listen)
            nursery.start_soon(stream.send_all, b"echo two\r")
            await wait_all_tasks_blocked(0.2)
            assert stream.accepted == 0 and not heard
            await vm._inside.parts.acquire()
    assert b"\none\r\n" in heard[0]


async def test_a_console_that_is_released_when_the_guest_goes_has_ended(
    settings: dict[str, Any],
) -> None:
    async with avmm.Machine(**settings) as vm, trio.open_nursery() as nursery:
        stream = console(vm)
        await read_until(stream, PROMPT)

        async def listen() -> None:
            assert await stream.receive_some() == b""

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"echo one\r")
            assert stream.accepted == 0

        async with vm.paused(deadline=10):
            await vm._inside.parts.release()
            nursery.start_soon(listen)
            nursery.start_soon(send)
            await wait_all_tasks_blocked(0.2)
            vm._inside.coordinator.forsake()  # as when it runs elsewhere
            vm.stop()


async def test_ram_is_copied_for_one_at_a_time(tmp_path: Path) -> None:
    """Two would take written pages from each other's log."""
    async with avmm.Machine() as vm, trio.open_nursery() as nursery:
        copies = trio.Event()
        first = partial(vm.snapshot, on_progress=lambda progress: copies.set())
        nursery.start_soon(first, tmp_path / "first")
        await copies.wait()
        with pytest.raises(AvmmError, match="already being copied"):
            await vm.snapshot(tmp_path / "second")
    assert (tmp_path / "first").exists()
    async with avmm.restore(tmp_path / "first", verify=True) as twin:
        await read_until(twin.console, PROMPT)
