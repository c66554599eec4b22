"""Deterministic runs: the same seed and the same inputs give the same run, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from lab.cache import LabError
from linux import userspace
from linux.kernel import CMDLINE, vmlinux
from support import stock
from support.guest import EXIT, machine
from support.required import not_here

import avmm
from avmm import deterministic
from avmm.devices.virtio.frame import Frame
from avmm.devices.virtio.net import Net
from avmm.errors import AvmmError, ConfigError
from avmm.kvm.kick import install_kick
from avmm.net.pair import pair
from tests.soft import bare  # noqa: F401 - skips where there is no unicorn
from tests.soft.racing import ROUNDS, TURNS, counted, racing

ROOT = Path(__file__).parents[2]
FOREVER = "1: pause; jmp 1b"
Around = Callable[[avmm.Machine], Any]


@asynccontextmanager
async def undisturbed(vm: avmm.Machine) -> AsyncIterator[None]:
    yield


async def raced(folder: Path, seed: int, around: Around = undisturbed) -> dict[str, Any]:
    """All that can be seen of a run of the racing guest."""
    async with racing(folder, seed) as vm, around(vm):
        outcome = await vm.wait()
        return {
            "outcome": outcome,
            "trail": deterministic.trail(vm),
            "time": deterministic.nanoseconds(vm),
            "memory": deterministic.digest(vm),
            "counted": counted(vm),
            "console": await vm.console.receive_some(100),
            "disk": (folder / "disk.img").read_bytes(),
        }


def run_raced(folder: Path, seed: int, around: Around = undisturbed) -> dict[str, Any]:
    return deterministic.run(raced, folder, seed, around)


def check_same(folder: Path, times: int) -> None:
    first = run_raced(folder, 7)
    assert first["outcome"] == avmm.Outcome(avmm.Cause.EXIT, 3)
    assert first["console"].count(b"r") == ROUNDS
    for _ in range(times - 1):
        assert run_raced(folder, 7) == first
    others = [run_raced(folder, seed) for seed in range(20, 20 + max(4, times // 20))]
    for part in ("trail", "memory"):
        assert len({one[part] for one in (first, *others)}) == 1 + len(others), part


def test_one_seed_gives_one_run(tmp_path: Path) -> None:
    check_same(tmp_path, 10)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_seed_gives_one_run_two_hundred_times(tmp_path: Path) -> None:
    check_same(tmp_path, 200)


def test_a_seed_can_lose_updates(tmp_path: Path) -> None:
    """Slices also end between the load and the store of an increment that has no lock."""
    found = {run_raced(tmp_path, seed)["counted"] for seed in range(12)}
    assert 2 * ROUNDS * TURNS in found
    assert min(found) < 2 * ROUNDS * TURNS


def test_another_process_gives_the_same_run(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from tests.soft.test_deterministic import run_raced; "
        "print({**run_raced(pathlib.Path(sys.argv[1]), 7), 'disk': b''})"
    )
    done = [
        subprocess.run(
            [sys.executable, "-c", code, tmp_path],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": number},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number in "12"
    ]
    assert "trail" in done[0]
    assert done[0] == done[1]


def test_a_log_says_what_has_happened(tmp_path: Path) -> None:
    @asynccontextmanager
    async def logged(vm: avmm.Machine) -> AsyncIterator[None]:
        with deterministic.logged(vm, tmp_path / "log"):
            yield

    run = run_raced(tmp_path, 7, logged)
    records = list(deterministic.records(tmp_path / "log"))
    assert len(records) == run["trail"][0]
    assert [one.nanoseconds for one in records] == sorted(one.nanoseconds for one in records)
    assert {"exit", "doorbell", "slice"} <= {one.kind for one in records}
    assert {one.cpu for one in records if one.kind == "slice"} == {0, 1}
    said = bytes(one.value for one in records if one.kind == "exit" and one.address == 0x3F8)
    assert said == run["console"]


# -- what changes nothing ------------------------------------------------------------------------


@asynccontextmanager
async def paused_often(vm: avmm.Machine) -> AsyncIterator[None]:
    async def pause() -> None:
        nonlocal pauses
        while True:
            await trio.sleep(3.7e-6)  # of the guest's time
            async with vm.paused():
                pauses += 1

    pauses = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pause)
        yield
        nursery.cancel_scope.cancel()
    assert pauses > 2


@contextmanager
def kicks() -> Iterator[None]:
    def kick() -> None:
        while not over.is_set():
            for thread in threading.enumerate():
                if thread.name.startswith("avmm vCPU") and thread.ident:
                    try:
                        signal.pthread_kill(thread.ident, number)
                    except ProcessLookupError:
                        continue
            time.sleep(0.0003)

    number, over = install_kick(), threading.Event()
    kicker = threading.Thread(target=kick)
    kicker.start()
    try:
        yield
    finally:
        over.set()
        kicker.join()


@asynccontextmanager
async def kicked(vm: avmm.Machine) -> AsyncIterator[None]:
    with kicks():
        yield


@pytest.mark.parametrize("around", [paused_often, kicked])
@pytest.mark.parametrize("seed", [7, 12])
def test_pauses_and_kicks_change_nothing(tmp_path: Path, around: Around, seed: int) -> None:
    plain = run_raced(tmp_path, seed)
    for _ in range(3):
        assert run_raced(tmp_path, seed, around) == plain


def test_load_on_the_host_changes_nothing(tmp_path: Path) -> None:
    def burn() -> None:
        while not over.is_set():
            sum(range(1000))

    plain, over = run_raced(tmp_path, 12), threading.Event()
    threads = [threading.Thread(target=burn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert run_raced(tmp_path, 12) == plain
    finally:
        over.set()
        for thread in threads:
            thread.join()


# -- time ----------------------------------------------------------------------------------------


def test_a_program_s_deadlines_are_on_the_guest_s_clock(tmp_path: Path) -> None:
    async def main() -> list[int]:
        times = []
        async with machine(tmp_path, FOREVER, deterministic=1) as vm:
            begun = trio.current_time()
            for _ in range(3):
                await trio.sleep(0.0025)
                times.append(deterministic.nanoseconds(vm))
            assert trio.current_time() - begun == pytest.approx(0.0075, abs=1e-7)
        return times

    times = deterministic.run(main)
    assert times == deterministic.run(main)
    assert times == pytest.approx([2_500_000, 5_000_000, 7_500_000], abs=10)


def test_a_guest_that_waits_lets_time_jump(tmp_path: Path) -> None:
    """An hour of the guest's and the program's time takes neither of them long."""

    async def main() -> int:
        async with machine(tmp_path, "cli; 1: hlt; jmp 1b", deterministic=1) as vm:
            with trio.move_on_after(3600):
                await vm.wait()
            return deterministic.nanoseconds(vm)

    begun = time.monotonic()
    assert deterministic.run(main) == pytest.approx(3600e9, abs=1e6)
    assert time.monotonic() - begun < 20


def test_time_goes_on_while_the_guest_stands_still(tmp_path: Path) -> None:
    """A handler or a pause that sleeps: the guest sees none of it."""

    class Slow(avmm.Device):
        async def read(self, offset: int, size: int) -> int:
            await trio.sleep(10)
            return 5

        def write(self, offset: int, size: int, value: int) -> None:
            return None

    async def main() -> tuple[float, int, int]:
        source = "mov rbx, 0xd0000000; mov eax, [rbx]; " + EXIT.format("eax")
        slow = avmm.mmio(Slow(), 0xD000_0000, 8)
        async with machine(tmp_path, source, deterministic=1, devices=[slow]) as vm:
            begun = trio.current_time()
            async with vm.paused():
                await trio.sleep(5)
            outcome = await vm.wait()
            await trio.sleep(1)
            return trio.current_time() - begun, deterministic.nanoseconds(vm), outcome.status

    seconds, guest, status = deterministic.run(main)
    assert seconds == pytest.approx(16, abs=1e-3)
    assert guest < 1_000_000
    assert status == 5


def test_the_real_clock_is_an_input(tmp_path: Path) -> None:
    """Without `run` a program may sleep as it likes, and the guest runs on meanwhile. The program
    wakes up at one of the guest's periods."""

    async def main() -> int:
        async with machine(tmp_path, FOREVER, deterministic=1) as vm:
            while deterministic.nanoseconds(vm) < 3_000_000:  # noqa: ASYNC110 - by the clock
                await trio.sleep(0.01)
            return deterministic.nanoseconds(vm)

    assert trio.run(main) % 1_000_000 < 100


def test_an_idle_guest_can_be_woken_from_outside(tmp_path: Path) -> None:
    async def main() -> avmm.Outcome:
        async with machine(tmp_path, "cli; 1: hlt; jmp 1b", deterministic=1) as vm:
            await trio.to_thread.run_sync(time.sleep, 0.05)
            vm.stop(4)
            return await vm.wait()

    assert trio.run(main) == avmm.Outcome(avmm.Cause.STOPPED, 4)


# -- a guest with interrupts, and one with a kernel ----------------------------------------------


async def typed(disk: Path) -> tuple[Any, ...]:
    """The bundled shell with two CPUs, a disk and an entropy device, and somebody who types."""
    disk.write_bytes(bytes(1 << 20))
    said = b""
    settings: Any = {"cpus": 2, "disks": [str(disk)], "rng": True, "memory": "16M"}
    async with avmm.Machine(deterministic=7, **settings) as vm:

        async def prompt() -> None:
            nonlocal said
            with trio.fail_after(20):
                while not said.endswith(b"> "):
                    said += await vm.console.receive_some(1000)

        for line in (b"cpus", b"count 50 serial disk", b"mem", b"exit 5"):
            await prompt()
            await trio.sleep(0.1)
            await vm.console.send_all(line + b"\r")
            said += b"."
        outcome = await vm.wait()
        return (
            said,
            outcome,
            deterministic.trail(vm),
            deterministic.digest(vm),
            disk.read_bytes(),
        )


def test_a_guest_with_a_console_and_interrupts(tmp_path: Path) -> None:
    first = deterministic.run(typed, tmp_path / "disk")
    assert first[1].status == 5
    assert b"cpu 1, APIC id 1: started" in first[0]
    assert deterministic.run(typed, tmp_path / "disk") == first


HELLO = "echo HELLO FROM GUEST\nreboot"


async def booted(kernel: Path, initrd: Path, around: Around = undisturbed) -> tuple[Any, ...]:
    said = b""
    async with (
        avmm.Machine(
            kernel=kernel,
            initrd=initrd,
            cmdline=CMDLINE,
            memory="32M",
            cpus=2,
            deterministic=7,
        ) as vm,
        around(vm),
    ):
        while data := await vm.console.receive_some(65536):
            said += data
        return said, await vm.wait(), deterministic.trail(vm), deterministic.digest(vm)


@pytest.mark.timeout(900)  # the kernel may have to be built
def test_linux_boots_the_same_way(tmp_path: Path) -> None:
    try:
        kernel = vmlinux(smp=True)
    except LabError as error:
        not_here(str(error))
    initrd = userspace.initrd(tmp_path / "initrd", HELLO)
    first = deterministic.run(booted, kernel, initrd)
    assert b"HELLO FROM GUEST" in first[0]
    assert deterministic.run(booted, kernel, initrd, kicked) == first


TYPED = (
    b"md5sum /dev/vda",
    b"mount /dev/vda /mnt; dd if=/dev/urandom of=/mnt/x bs=4k count=64",
    b"md5sum /mnt/x; umount /mnt",
    b"ip link set eth0 up; sleep 2; cat /sys/class/net/eth0/statistics/*_packets",
    b"cat /proc/interrupts; date; poweroff -f",
)


async def installed(around: Around = undisturbed) -> tuple[Any, ...]:
    """A stock Debian kernel with two CPUs: somebody types, and a neighbour answers each packet."""

    async def answer() -> None:
        while True:
            await here.receive()
            await here.send(Frame(b"\xff" * 6 + b"\x02" + bytes(5) + b"\x88\xb5" + bytes(50)))

    said, (here, there) = b"", pair()
    async with (
        avmm.Machine(
            **stock.boot_files(stock.GUEST),
            cmdline="console=ttyS0 quiet panic=-1",
            memory="256M",
            cpus=2,
            disks=[f"{stock.folder(stock.GUEST) / 'ext4.img'},overlay"],
            devices=[avmm.virtio(Net(there, mac="52:54:00:00:00:09"))],
            rng=True,
            deterministic=7,
        ) as vm,
        around(vm),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(answer)
        lines = iter(TYPED)
        while data := await vm.console.receive_some(65536):
            said += data
            if said.endswith(b"# "):
                await vm.console.send_all(next(lines) + b"\r")
        outcome = await vm.wait()
        nursery.cancel_scope.cancel()
        return said, outcome, deterministic.trail(vm), deterministic.digest(vm)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_debian_runs_the_same_way() -> None:
    first = deterministic.run(installed)
    assert b"64+0 records out" in first[0]
    assert b"Wed Jan  1 00:00" in first[0]
    assert deterministic.run(installed, kicked) == first


# -- what cannot be ------------------------------------------------------------------------------


def test_kvm_cannot() -> None:
    with pytest.raises(ConfigError, match=r"deterministic 7: KVM cannot .* engine 'soft'"):
        avmm.Machine(engine="kvm", deterministic=7)


def test_a_saved_state_cannot_go_on_deterministically(tmp_path: Path) -> None:
    async def main() -> None:
        async with machine(tmp_path, FOREVER, deterministic=1) as vm, vm.paused():
            state = vm.save()
        with pytest.raises(ConfigError, match=r"deterministic 1: .* a machine that boots"):
            async with machine(tmp_path, FOREVER, deterministic=1, state=state):
                pass
        async with machine(tmp_path, FOREVER, engine="soft", state=state) as vm:
            vm.stop()
            await vm.wait()

    deterministic.run(main)


def test_a_machine_of_another_kind_has_no_trail(tmp_path: Path) -> None:
    async def main() -> None:
        async with machine(tmp_path, FOREVER, engine="soft") as vm:
            with pytest.raises(AvmmError, match="expected deterministic=SEED"):
                deterministic.trail(vm)

    trio.run(main)


def test_trio_is_as_it_was(tmp_path: Path) -> None:
    import trio._core._run as scheduler  # noqa: PLC0415 - private

    names = ("_ALLOW_DETERMINISTIC_SCHEDULING", "_r")
    before = [getattr(scheduler, name) for name in names]
    run_raced(tmp_path, 7)
    assert [getattr(scheduler, name) for name in names] == before
