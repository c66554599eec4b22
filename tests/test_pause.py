"""Pausing real machines: at any moment, with handlers that take their time, many times over."""

from __future__ import annotations

import argparse
import random
import re
import threading
from pathlib import Path

import pytest
import trio
import trio.testing
from support import torture
from support.guest import machine

import avmm
from avmm import Device, guests

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kvm", "nothing_left")]

PORT, ADDRESS = 0x300, 0xD000_0000
COUNTING = "xor eax, eax; mov dx, 0x300; 1: out dx, eax; inc eax; jmp 1b"


class Recorder(Device):
    """Keeps what it is written; answers when `go_on` is set."""

    def __init__(self, *, slow: bool = False) -> None:
        self.seen: list[int] = []
        self.asked, self.go_on = trio.Event(), trio.Event()
        if not slow:
            self.go_on.set()

    def write(self, offset: int, size: int, value: int) -> avmm.devices.base.WriteAnswer:
        self.seen.append(value)
        return None if self.go_on.is_set() else self._later()

    async def _later(self) -> None:
        self.asked.set()
        await self.go_on.wait()

    async def more(self) -> None:
        count = len(self.seen)
        while len(self.seen) == count:
            await trio.lowlevel.checkpoint()

    @property
    def complete(self) -> bool:
        return self.seen == list(range(len(self.seen)))


async def test_a_pause_without_deadline_waits_for_a_slow_handler(tmp_path: Path) -> None:
    device = Recorder(slow=True)
    async with machine(tmp_path, COUNTING, devices=[avmm.pio(device, PORT, 4)]) as vm:
        await device.asked.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 3)
            nursery.start_soon(_after(3, device.go_on.set))
            start = trio.current_time()
            async with vm.paused():
                assert trio.current_time() - start >= 2.5
                assert device.seen == [0]
        await device.more()
    assert device.complete


def _after(seconds: float, then: object) -> object:
    async def task() -> None:
        await trio.sleep(seconds)
        then()  # type: ignore[operator]

    return task


async def test_a_pause_with_a_deadline_fails_by_name_and_harms_nothing(tmp_path: Path) -> None:
    device = Recorder(slow=True)
    async with machine(tmp_path, COUNTING, devices=[avmm.pio(device, PORT, 4)], cpus=2) as vm:
        await device.asked.wait()
        with pytest.raises(avmm.PauseTimeout) as caught:
            async with vm.paused(deadline=0.3):
                pytest.fail("the handler has not answered")
        assert "given up after 0.3 s" in str(caught.value)
        assert "vCPU 0 waits for Recorder at KVM_EXIT_IO: out of 4 bytes" in str(caught.value)
        assert re.search(rf"port {PORT:#x}, for \d+\.\d s so far", str(caught.value))
        device.go_on.set()
        await device.more()
        async with vm.paused(deadline=20):
            pass
        await device.more()
    assert device.complete


class Blocking(Recorder):
    """A plain handler that keeps its thread."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.may_return = threading.Event(), threading.Event()

    def write(self, offset: int, size: int, value: int) -> None:
        self.entered.set()
        self.may_return.wait(20)
        self.seen.append(value)


async def test_a_handler_that_blocks_is_named_with_how_long_it_was_waited_for(
    tmp_path: Path,
) -> None:
    device = Blocking()
    async with machine(tmp_path, COUNTING, devices=[avmm.pio(device, PORT, 4)]) as vm:
        while not device.entered.is_set():
            await trio.lowlevel.checkpoint()
        with pytest.raises(avmm.PauseTimeout) as caught:
            async with vm.paused(deadline=0.6):
                pytest.fail("the handler has not returned")
        device.may_return.set()
        await device.more()
    what = "vCPU 0 has not come back from Blocking at KVM_EXIT_IO: out of 4 bytes at port 0x300,"
    late = re.search(f"{what} ([0-9.]+) s after it was asked to pause", str(caught.value))
    assert late is not None, str(caught.value)
    assert float(late[1]) >= 0.5  # it was asked a little before that is counted from
    assert device.complete


class Busy(Recorder):
    """Has a task, and something in flight that does not finish."""

    async def run(self) -> None:
        await trio.sleep_forever()

    async def quiesce(self) -> None:
        await trio.sleep_forever()


async def test_a_device_that_does_not_quiesce_fails_the_pause_by_name(tmp_path: Path) -> None:
    device = Busy()
    async with machine(tmp_path, COUNTING, devices=[avmm.pio(device, PORT, 4)]) as vm:
        with pytest.raises(avmm.PauseTimeout, match="Busy has not finished what it has in flight"):
            async with vm.paused(deadline=0.2):
                pytest.fail("it has not quiesced")
        await device.more()
    assert device.complete


class Unpausable(Recorder):
    async def run(self) -> None:
        await trio.sleep_forever()


async def test_whoever_waits_for_another_pause_is_told_what_that_waits_for(tmp_path: Path) -> None:
    device = Recorder(slow=True)
    async with machine(tmp_path, COUNTING, devices=[avmm.pio(device, PORT, 4)]) as vm:
        await device.asked.wait()
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                async with vm.paused():
                    pass

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(avmm.PauseTimeout) as caught:
                async with vm.paused(deadline=0.2):
                    pytest.fail("the other pause has not come to its end")
            device.go_on.set()
    assert "another pause is under way: vCPU 0 waits for Recorder at KVM_EXIT_IO" in str(
        caught.value
    )


class Stuck(Busy):
    async def resume(self) -> None:
        raise KeyError("on the way back")


async def test_a_deadline_tells_of_what_fails_on_the_way_back(tmp_path: Path) -> None:
    device = Stuck()
    async with machine(tmp_path, COUNTING, devices=[avmm.pio(device, PORT, 4)]) as vm:
        expected = (
            r"Stuck has not finished .*, for \d+\.\d s so far; and on the way back: KeyError"
        )
        with pytest.raises(avmm.PauseTimeout, match=expected):
            async with vm.paused(deadline=0.2):
                pytest.fail("it has not quiesced")
        await device.more()


class Unresumable(Recorder):
    async def quiesce(self) -> None:
        raise avmm.DeviceError("the reason")

    async def resume(self) -> None:
        raise KeyError("on the way back")


async def test_why_a_pause_failed_is_not_hidden_by_what_fails_on_the_way_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = Unresumable()
    async with machine(tmp_path, COUNTING, devices=[avmm.pio(device, PORT, 4)]) as vm:
        with pytest.raises(avmm.DeviceError, match="the reason") as caught:
            async with vm.paused():
                pytest.fail("it cannot be quiesced")
        assert caught.value.__notes__ == ["and on the way back: KeyError('on the way back')"]
        await device.more()
    assert "on the way back" in caplog.text


class Sneaky(Recorder):
    def write(self, offset: int, size: int, value: int) -> avmm.devices.base.WriteAnswer:
        async def begin() -> None:
            self.host.nursery.start_soon(trio.sleep_forever)

        super().write(offset, size, value)
        return begin() if value == 0 else None


async def test_a_device_with_tasks_that_lacks_quiesce_is_refused(tmp_path: Path) -> None:
    device = Sneaky()
    async with machine(tmp_path, COUNTING, devices=[avmm.pio(device, PORT, 4)]) as vm:
        while len(device.seen) < 2:
            await trio.lowlevel.checkpoint()
        with pytest.raises(avmm.DeviceError, match="Sneaky runs a task and cannot be quiesced"):
            async with vm.paused():
                pytest.fail("it cannot be quiesced")
        await device.more()


async def test_a_device_that_cannot_quiesce_says_so_and_the_guest_runs_on(tmp_path: Path) -> None:
    device = Unpausable()
    async with machine(tmp_path, COUNTING, devices=[avmm.pio(device, PORT, 4)]) as vm:
        with pytest.raises(
            avmm.DeviceError, match="Unpausable runs a task and cannot be quiesced"
        ):
            async with vm.paused():
                pytest.fail("it cannot be quiesced")
        await device.more()
    assert device.complete


async def test_cancelling_a_pause_at_any_moment_lets_the_guest_run_on(tmp_path: Path) -> None:
    device = Recorder()
    async with machine(tmp_path, COUNTING, devices=[avmm.pio(device, PORT, 4)], cpus=2) as vm:
        for microseconds in range(0, 3000, 25):
            with trio.move_on_after(microseconds / 1e6):
                async with vm.paused():
                    await trio.sleep(0.0005)
            await device.more()
    assert device.complete


async def test_only_a_paused_machine_is_saved(tmp_path: Path) -> None:
    async with machine(tmp_path, COUNTING) as vm:
        with pytest.raises(avmm.AvmmError, match=r"save it inside `vm.paused\(\)`"):
            vm.save()


async def pauses(count: int) -> None:
    """So many pauses at random moments of four vCPUs under load: each comes, none sticks."""
    moments = random.Random(count)
    config = {"kernel": guests.path("exits"), "cmdline": "kind=spin count=0", "memory": "16M"}
    async with avmm.Machine(cpus=4, **config) as vm:
        counters = vm.memory.view(0x9000, 64 * 4)
        while not all(counters[64 * cpu] for cpu in range(4)):
            await trio.lowlevel.checkpoint()
        for number in range(count):
            if number % 3 == 0:  # the others come while the vCPUs are on their way back
                await trio.sleep(moments.random() * 0.001)
            async with vm.paused(deadline=30):
                if number % 16 == 0:
                    before = bytes(counters)
                    await trio.lowlevel.checkpoint()
                    assert bytes(counters) == before
        after = bytes(counters)
        for cpu in range(4):
            word = slice(64 * cpu, 64 * cpu + 8)
            while bytes(counters[word]) == after[word]:
                await trio.lowlevel.checkpoint()
        counters.release()


async def pauses_among_exits(count: int) -> None:
    """So many pauses at random moments of four vCPUs that make exits of every shape: what each
    of them sees and does is, to the last access, what it does undisturbed.

    Every third access is answered by an awaitable, so that pauses find vCPUs in the guest, in a
    handler, and waiting for a task.
    """
    moments = random.Random(count)
    options = argparse.Namespace(cpus=4, loops=10, long=0, hypercall=False, capability=None)
    undisturbed = await torture.run(options)
    left = count

    async def disturb(vm: avmm.Machine) -> None:
        nonlocal left
        windows = [one for one in vm._inside.parts.devices if isinstance(one, torture.Recorder)]
        while left:
            await trio.sleep(moments.random() * 0.001)
            async with vm.paused(deadline=30):
                before = [len(window.log) for window in windows]
                await trio.lowlevel.checkpoint()
                assert before == [len(window.log) for window in windows]
            left -= 1

    while left:
        assert await torture.run(options, disturb=disturb) == undisturbed


async def test_a_thousand_pauses_of_four_vcpus() -> None:
    await pauses(1_000)


async def test_a_thousand_pauses_among_the_exits_of_four_vcpus() -> None:
    await pauses_among_exits(1_000)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_fifty_thousand_pauses_of_four_vcpus() -> None:
    await pauses(50_000)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_fifty_thousand_pauses_among_the_exits_of_four_vcpus() -> None:
    await pauses_among_exits(50_000)
