"""Coalesced writes: none lost, none twice, none before or after its time."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from support.engines import open_system
from support.guest import machine

import avmm
from avmm import Device
from avmm.bus.coalesced import CoalescedWrites
from avmm.bus.space import Bus, PostedWrites
from avmm.bus.wakeup import device_lock
from avmm.devices.base import Host, ReadAnswer, WriteAnswer
from avmm.errors import DeviceError

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kvm", "nothing_left")]

PORT, ADDRESS = 0x300, 0xD000_0000


class Log(Device):
    """Keeps what happens to it, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def read(self, offset: int, size: int) -> ReadAnswer:
        self.seen.append(("read", offset, size))
        return len(self.seen)

    def write(self, offset: int, size: int, value: int) -> WriteAnswer:
        self.seen.append((offset, size, value))
        return None

    def save(self) -> dict[str, Any]:
        return {"seen": json.dumps(self.seen)}


@pytest.fixture(autouse=True)
def rings() -> None:
    system = open_system()
    missing = [n for n in ("MMIO", "PIO") if not system.check(f"KVM_CAP_COALESCED_{n}")]
    system.close()
    if missing:
        pytest.skip(f"this KVM coalesces no {' and no '.join(missing)}")


def ports(log: Device, **more: Any) -> avmm.Placement:
    return avmm.pio(log, PORT, 8, coalesced=True, **more)


COUNT_TO_100 = "mov dx, 0x300; xor eax, eax; 1: out dx, eax; inc eax; cmp eax, 100; jb 1b;"
EXIT = "mov dx, 0xf8; xor eax, eax; out dx, al; 9: pause; jmp 9b"
STAY = "mov dword ptr [0x200000], 1; 9: pause; jmp 9b"


async def until_it_stays(vm: avmm.Machine) -> None:
    view = vm.memory.view(0x200000, 4)
    while not view[0]:
        await trio.lowlevel.checkpoint()
    view.release()


async def test_a_pause_brings_what_no_exit_has_shown(tmp_path: Path) -> None:
    log = Log()
    async with machine(tmp_path, COUNT_TO_100 + STAY, devices=[ports(log)]) as vm:
        await until_it_stays(vm)
        assert len(log.seen) < 100  # else this test shows nothing
        async with vm.paused():
            assert log.seen == [(0, 4, n) for n in range(100)]
            assert json.loads(dict(vm.save()["devices"])["Log"]["seen"])[-1] == [0, 4, 99]


async def test_the_end_of_the_guest_brings_them(tmp_path: Path) -> None:
    log = Log()
    async with machine(tmp_path, COUNT_TO_100 + STAY, devices=[ports(log)]) as vm:
        await until_it_stays(vm)
        vm.stop()
        await vm.wait()
        assert log.seen == [(0, 4, n) for n in range(100)]


async def test_a_ring_that_is_full_loses_nothing(tmp_path: Path) -> None:
    log = Log()
    code = COUNT_TO_100.replace("100", "100000") + EXIT
    async with machine(tmp_path, code, devices=[ports(log)]) as vm:
        await vm.wait()
    assert log.seen == [(0, 4, n) for n in range(100_000)]


async def test_other_accesses_come_in_their_order(tmp_path: Path) -> None:
    """A coalesced region, another one of the same device, and another device."""
    log = Log()
    other = Log()
    other.seen = log.seen
    code = """
        mov dx, 0x300; mov al, 1; out dx, al
        mov dx, 0x310; mov al, 2; out dx, al
        mov dx, 0x304; mov ax, 3; out dx, ax
        mov dx, 0x320; in al, dx
        mov dx, 0x301; mov al, 4; out dx, al
        mov dx, 0x300; in al, dx
    """
    places = [ports(log), avmm.pio(log, 0x310, 8, offset=0x10), avmm.pio(other, 0x320, 8)]
    async with machine(tmp_path, code + EXIT, devices=places) as vm:
        await vm.wait()
    expected = [(0, 1, 1), (0x10, 1, 2), (4, 2, 3), ("read", 0, 1), (1, 1, 4), ("read", 0, 1)]
    assert log.seen == expected


async def test_memory_of_every_shape(tmp_path: Path) -> None:
    log = Log()
    code = """
        mov rbx, 0xd0000000
        mov rax, 0x1122334455667788
        mov [rbx], al; mov [rbx + 2], ax; mov [rbx + 4], eax; mov [rbx + 8], rax
        mov [rbx + 0xffd], rax
    """
    places = [avmm.mmio(log, ADDRESS, 0x2000, coalesced=True)]
    async with machine(tmp_path, code + EXIT, devices=places) as vm:
        await vm.wait()
    data = bytearray(0x1010)
    for offset, size, value in log.seen:
        assert size in (1, 2, 4, 8)
        data[offset : offset + size] = value.to_bytes(size, "little")
    word = (0x1122_3344_5566_7788).to_bytes(8, "little")
    right = bytearray(0x1010)
    right[0:1], right[2:4], right[4:8], right[8:16] = word[:1], word[:2], word[:4], word
    right[0xFFD:0x1005] = word
    assert data == right


async def test_a_hundred_pauses_in_a_stream_of_them(tmp_path: Path) -> None:
    log = Log()
    code = "mov dx, 0x300; xor eax, eax; 1: out dx, eax; inc eax; jmp 1b"
    async with machine(tmp_path, code, devices=[ports(log)]) as vm:
        for _ in range(100):
            async with vm.paused():
                count = len(log.seen)
            while len(log.seen) == count:
                await trio.lowlevel.checkpoint()
    assert log.seen == [(0, 4, n) for n in range(len(log.seen))]


class Worker(Log):
    """What it is written begins work, which its task does and `quiesce` waits for."""

    def attach(self, host: Host) -> None:
        super().attach(host)
        self.wakeup = host.wakeup()
        self.done: list[int] = []
        self.all_done = trio.Event()

    def write(self, offset: int, size: int, value: int) -> WriteAnswer:
        self.wakeup.set()
        return super().write(offset, size, value)

    async def run(self) -> None:
        while True:
            await self.wakeup.wait()
            while len(self.done) < len(self.seen):
                await trio.lowlevel.checkpoint()
                self.done.append(self.seen[len(self.done)][2])
            self.all_done.set()

    async def quiesce(self) -> None:
        while len(self.done) < len(self.seen):
            self.all_done = trio.Event()
            await self.all_done.wait()

    def save(self) -> dict[str, Any]:
        return {"done": list(self.done)}


async def test_what_they_begin_is_waited_for_and_saved(tmp_path: Path) -> None:
    """A pause delivers them before it quiesces their devices."""
    worker = Worker()
    async with machine(tmp_path, COUNT_TO_100 + STAY, devices=[ports(worker)]) as vm:
        await until_it_stays(vm)
        assert len(worker.seen) < 100  # else this test shows nothing
        async with vm.paused(deadline=20):
            assert dict(vm.save()["devices"])["Worker"]["done"] == list(range(100))


async def test_a_deadline_names_the_device_that_does_not_take_its_write(tmp_path: Path) -> None:
    class Slow(Log):
        def __init__(self) -> None:
            super().__init__()
            self.begun, self.may_end = threading.Event(), threading.Event()

        def write(self, offset: int, size: int, value: int) -> WriteAnswer:
            self.begun.set()
            self.may_end.wait(20)
            return super().write(offset, size, value)

    slow, log = Slow(), Log()
    code = "mov dx, 0x300; mov al, 1; out dx, al; mov dx, 0x320; in al, dx;"
    places = [ports(slow), avmm.pio(log, 0x320, 1)]
    async with machine(tmp_path, code + STAY, devices=places) as vm:
        assert await trio.to_thread.run_sync(slow.begun.wait, 20)
        expected = r"Slow \(a coalesced write of 1 bytes at offset 0x0\), before .* port 0x320"
        with pytest.raises(avmm.PauseTimeout, match=expected):
            async with vm.paused(deadline=0.2):
                pass
        slow.may_end.set()
        await until_it_stays(vm)
        async with vm.paused(deadline=20):
            assert (slow.seen, log.seen) == ([(0, 1, 1)], [("read", 0, 1)])


async def test_a_device_that_would_wait_is_refused_by_name(tmp_path: Path) -> None:
    class Slow(Log):
        async def write(self, offset: int, size: int, value: int) -> None:  # type: ignore[override]
            await trio.lowlevel.checkpoint()

    with pytest.raises(DeviceError, match=r"Slow answered a coalesced write of 4 bytes"):
        async with machine(tmp_path, COUNT_TO_100 + EXIT, devices=[ports(Slow())]) as vm:
            await vm.wait()


async def _later() -> None:
    await trio.lowlevel.checkpoint()


class Picky(Log):
    """Answers a write as it must not, until it has got over it."""

    refuses = True

    def write(self, offset: int, size: int, value: int) -> WriteAnswer:
        super().write(offset, size, value)
        return _later() if self.refuses else None


async def test_a_device_that_raises_keeps_no_write_from_the_others(tmp_path: Path) -> None:
    """Nor its own later ones from itself: they come with the next pause, exits or not."""
    picky, log = Picky(), Log()
    code = """
        mov dx, 0x320; mov al, 1; out dx, al; mov al, 2; out dx, al
        mov dx, 0x300; mov al, 7; out dx, al
    """
    places = [avmm.pio(picky, 0x320, 1, coalesced=True), ports(log)]
    async with machine(tmp_path, code + STAY, devices=places) as vm:
        await until_it_stays(vm)
        with pytest.raises(DeviceError, match="Picky answered a coalesced write"):
            async with vm.paused():
                pytest.fail("a device has raised")
        assert log.seen == [(0, 1, 7)]
        assert picky.seen == [(0, 1, 1)]
        picky.refuses = False
        async with vm.paused():
            assert picky.seen == [(0, 1, 1), (0, 1, 2)]
            assert log.seen == [(0, 1, 7)]


async def test_whichever_devices_raise_all_is_told(tmp_path: Path) -> None:
    places = [avmm.pio(Picky(), PORT + at, 1, coalesced=True) for at in range(3)]
    code = "mov dx, 0x300; out dx, al; inc edx; out dx, al; inc edx; out dx, al;"
    async with machine(tmp_path, code + STAY, devices=places) as vm:
        await until_it_stays(vm)
        with pytest.raises(DeviceError, match="Picky answered") as caught:
            async with vm.paused():
                pytest.fail("devices have raised")
        assert [note[:19] for note in caught.value.__notes__] == ["and another device:"] * 2
        async with vm.paused():
            pass


async def test_without_a_ring_they_are_writes_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(avmm.kvm.Vm, "coalesce", lambda *_, **__: False)
    log = Log()
    async with machine(tmp_path, COUNT_TO_100 + EXIT, devices=[ports(log)]) as vm:
        await vm.wait()
    assert log.seen == [(0, 4, n) for n in range(100)]


def test_who_comes_while_a_device_takes_its_write_waits_for_it() -> None:
    """A vCPU has written to one device and goes on to another; a second one has taken the write
    out of the ring, and the device is at it."""

    class Slow(Log):
        def write(self, offset: int, size: int, value: int) -> WriteAnswer:
            begun.set()
            assert may_end.wait(20)
            return super().write(offset, size, value)

    class Ring(deque[tuple[bool, int, int, int]]):
        is_empty = property(lambda ring: not ring)

        def __iter__(self) -> Iterator[tuple[bool, int, int, int]]:
            while self:
                yield self[0]
                self.popleft()

    begun, may_end = threading.Event(), threading.Event()
    slow, bus = Slow(), Bus("port", 1 << 16)
    lock = device_lock()
    posted = PostedWrites(slow, lock)
    bus.add(ports(slow), lock, posted)
    ring: Any = Ring([(True, PORT, 4, 7)])
    writes = CoalescedWrites(ring, {True: bus, False: bus}, [posted])
    first = threading.Thread(target=writes.deliver)
    first.start()
    assert begun.wait(20)
    seen: list[Any] = []

    def go_on() -> None:
        writes.deliver()
        seen.extend(slow.seen)

    second = threading.Thread(target=go_on)
    second.start()
    second.join(0.1)
    may_end.set()
    first.join()
    second.join()
    assert seen == [(0, 4, 7)]


def test_whoever_comes_to_the_device_first_brings_what_was_posted() -> None:
    """A write that another thread took out of the ring and has not delivered yet."""
    log = Log()
    lock = device_lock()
    bus = Bus("port", 1 << 16)
    posted = PostedWrites(log, lock)
    bus.add(ports(log), lock, posted)
    bus.post(PORT, 4, 0x11)
    assert bus.read(PORT, 1) == 2
    bus.post(PORT, 8, 0x33_0000_0022)
    assert bus.write(PORT + 1, 1, 0x44) is None
    posted.deliver()
    expected = [(0, 4, 0x11), ("read", 0, 1), (0, 8, 0x33_0000_0022), (1, 1, 0x44)]
    assert log.seen == expected
