"""Linux with a driver for the generation id: a copy does not give the numbers of its original."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
from support import stock

import avmm

pytestmark = [
    pytest.mark.lab(also="stock"),
    pytest.mark.usefixtures("kvm", "fitting_engine", "nothing_left"),
    pytest.mark.timeout(400),
]

CMDLINE = "console=ttyS0 quiet panic=-1"
PROMPT = "avmm:/root# "
RESEEDED = "crng reseeded due to virtual machine fork"


async def until(vm: avmm.Machine, what: str) -> str:
    text = ""
    with trio.fail_after(200):
        while what not in text:
            text += (await vm.console.receive_some()).decode()
    return text


async def command(vm: avmm.Machine, line: str) -> str:
    await vm.console.send_all(line.encode() + b"\r")
    return (await until(vm, PROMPT)).partition("\n")[2].replace("\r", "")


async def reseeded(vm: avmm.Machine) -> int:
    """How often it has made new numbers of its own since it was booted."""
    return int((await command(vm, f"dmesg | grep -c '{RESEEDED}'")).split()[0])


async def count(vm: avmm.Machine) -> int:
    return int((await command(vm, "wc -l </tmp/numbers")).split()[0])


@pytest.mark.lab(also="stock", long=True)
async def test_what_is_held_reads_no_number_of_its_original() -> None:
    """A loop of reads is held around the clone. Behind that its files have no line in common."""
    guest = stock.boot_files(stock.NEWER)
    loop = "while :; do od -An -N8 -x /dev/urandom; done"
    async with avmm.Machine(**guest, cmdline=CMDLINE, memory="256M") as vm:
        await until(vm, PROMPT)
        assert "hold: nothing is held" in await command(vm, "hold thaw")
        await command(vm, "hold freeze; hold thaw")  # with nothing to hold
        await command(vm, f"hold run sh -c '{loop}' >/tmp/numbers 2>&1 &")
        await command(vm, "while [ ! -s /tmp/numbers ]; do usleep 10000; done")
        await command(vm, "hold freeze")
        before = await count(vm)
        assert await count(vm) == before
        read = f"while [ $(wc -l </tmp/numbers) -lt {before + 20} ]; do usleep 10000; done; "
        read += f"head -n {before + 20} /tmp/numbers | tail -n +{before - 1}"
        async with vm.clone() as twin:
            numbers = (await command(twin, read)).splitlines()
            assert await reseeded(twin) == 1
            await command(vm, "hold thaw")
            assert await reseeded(vm) == 0
            others = (await command(vm, read)).splitlines()
    assert numbers[:2] == others[:2], "written before it was held"
    assert not set(numbers[3:20]) & set(others[3:20])


async def test_the_time_of_a_restored_guest(tmp_path: Path) -> None:
    """With the hosts' clock it is right, and its monotonic clock has gone on."""
    guest = stock.boot_files(stock.NEWER)
    clocks = "date +%s; cut -d. -f1 /proc/uptime"
    async with avmm.Machine(**guest, cmdline=CMDLINE, memory="256M") as vm:
        await until(vm, PROMPT)
        await vm.snapshot(tmp_path / "snapshot")
        uptime = int((await command(vm, clocks)).split()[1])
    stood = time.time()
    await trio.sleep(20)  # the time that passes is what this is about
    async with avmm.restore(tmp_path / "snapshot", clock="host") as vm:
        real, up = map(int, (await command(vm, clocks)).split()[:2])
        assert abs(real - time.time()) < 5
        assert up - uptime >= time.time() - stood - 5
        assert "stall" not in await command(vm, "dmesg")
    async with avmm.restore(tmp_path / "snapshot") as vm:
        real = int((await command(vm, clocks)).split()[0])
        assert real < time.time() - 15


async def test_a_clone_and_a_restored_guest_have_their_own_random_numbers(
    tmp_path: Path,
) -> None:
    guest = stock.boot_files(stock.NEWER)
    read = "od -An -N16 -x /dev/urandom"
    async with avmm.Machine(**guest, cmdline=CMDLINE, memory="256M") as vm:
        await until(vm, PROMPT)
        await vm.snapshot(tmp_path / "snapshot")
        async with vm.clone() as twin:
            with trio.fail_after(60):
                while not await reseeded(twin):
                    pass
            numbers = [await command(twin, read)]
        assert await reseeded(vm) == 0
        numbers.append(await command(vm, read))
    for _ in range(2):
        async with avmm.restore(tmp_path / "snapshot") as vm:
            with trio.fail_after(60):
                while not await reseeded(vm):
                    pass
            numbers.append(await command(vm, read))
    assert len(set(numbers)) == 4
