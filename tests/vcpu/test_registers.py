"""Registers that C serves, and pages that KVM serves: a guest, its devices, and moves between
machines while both work on them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from support.guest import EXIT, machine

import avmm
from avmm.bus.registers import DeviceRegisters
from avmm.devices.base import Host
from avmm.devices.registers import CollectedWrites, Register

pytestmark = [pytest.mark.lab(also="stock"), pytest.mark.usefixtures("kvm", "nothing_left")]

PORT: Final = 0x300
ADDRESS: Final = 0xD000_0000
STORAGE, VERSION, IGNORING, STATUS, ACK, RING = 0x00, 0x10, 0x14, 0x18, 0x1C, 0x20


class Registers(avmm.Device):
    """One of each kind. It logs the accesses that are left to it."""

    max_width = 4

    def __init__(self, capacity: int = 4) -> None:
        self.capacity = capacity
        self.log: list[tuple[str, int, int, int]] = []
        self.storage: Register
        self.version: Register
        self.status: Register
        self.ring: CollectedWrites

    def attach(self, host: Host) -> None:
        super().attach(host)
        self.storage = host.registers.storage(STORAGE, 16)
        self.version = host.registers.constant(VERSION, 4, 0x0102_0304)
        host.registers.constant(IGNORING, 4, 0x55, ignores_writes=True)
        self.status = host.registers.clearable(STATUS, 4, clear_at=ACK)
        self.ring = host.registers.collected(RING, 4, self.capacity)

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size, 0))
        return 0x77

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: object) -> None:
        pass


class Other(avmm.Device):
    """With a coalesced region, which sends all accesses of the machine through Python."""

    def write(self, offset: int, size: int, value: int) -> None:
        pass


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets of the accesses that have come to Python."""
    seen: list[int] = []
    for name in ("read", "write"):
        original: Callable[..., Any] = getattr(DeviceRegisters, name)

        def watched(
            self: Any, offset: int, *rest: Any, original: Callable[..., Any] = original
        ) -> Any:
            if isinstance(self.device, Registers):
                seen.append(offset)
            return original(self, offset, *rest)

        monkeypatch.setattr(DeviceRegisters, name, watched)
    return seen


PROGRAM = f"""
    mov rbx, {ADDRESS}
    mov dword ptr [rbx], 0x44332211; mov byte ptr [rbx + 1], 0x99; mov ax, word ptr [rbx + 1]
    cmp ax, 0x3399; jne 8f
    mov eax, dword ptr [rbx + {VERSION}]; cmp eax, 0x01020304; jne 8f
    mov dword ptr [rbx + {IGNORING}], eax; mov eax, dword ptr [rbx + {IGNORING}]
    cmp eax, 0x55; jne 8f
    mov dword ptr [rbx + {ACK}], 0x6; mov eax, dword ptr [rbx + {STATUS}]; cmp eax, 9; jne 8f
    mov dword ptr [rbx + {RING}], 0xa1; mov dword ptr [rbx + {RING}], 0xa2
    mov dx, {PORT}; mov eax, 0x11223344; out dx, eax; in al, dx; cmp al, 0x44; jne 8f
    add dx, {RING}; mov eax, 0xa3; out dx, eax
"""
LEFT = f"""
    mov eax, dword ptr [rbx + {ACK}]; cmp eax, 0x77; jne 8f
    mov al, byte ptr [rbx + {VERSION}]; cmp al, 0x77; jne 8f
    mov dword ptr [rbx + {STATUS}], 0xff; mov dword ptr [rbx + {VERSION}], 1
    mov word ptr [rbx + {RING}], 5; mov qword ptr [rbx + 8], rbx
    mov eax, dword ptr [rbx + {STATUS}]; cmp eax, 9; jne 8f
"""
TAIL = f"{EXIT.format(3)}; 8: {EXIT.format(9)}"


@pytest.mark.parametrize("whose", ["nobody's", "another's", "its own"])
async def test_each_kind_does_what_it_says(
    tmp_path: Path, in_python: list[int], whose: str
) -> None:
    """Also where a device has coalesced writes, and all accesses come to Python."""
    device, coalesced = Registers(), whose != "nobody's"
    places = [
        avmm.mmio(device, ADDRESS, 4096),
        avmm.pio(device, PORT, 64),
        avmm.pio(Other(), 0x400, 4, coalesced=whose == "another's"),
        avmm.pio(device, 0x500, 4, offset=0x80, coalesced=whose == "its own"),
    ]
    async with machine(tmp_path, PROGRAM + LEFT + TAIL, devices=places) as vm:
        device.status.value = 0xF
        assert (await vm.wait()).status == 3
    assert device.log == [
        ("read", ACK, 4, 0),
        ("read", VERSION, 1, 0),
        ("write", STATUS, 4, 0xFF),
        ("write", VERSION, 4, 1),
        ("write", RING, 2, 5),
    ]
    assert device.ring.take() == struct.pack("<3I", 0xA1, 0xA2, 0xA3)
    assert device.storage.get() == struct.pack("<IIQ", 0x11223344, 0, ADDRESS)
    assert device.status.value == 9
    # The eight bytes are split in Python, as they are wider than the device.
    expected = [ACK, VERSION, STATUS, VERSION, RING, 8, 12]
    assert (in_python == expected) is not coalesced
    assert len(in_python) == len(expected) + (14 if coalesced else 0)


async def test_a_place_that_shows_only_a_part_of_a_register(
    tmp_path: Path, in_python: list[int]
) -> None:
    device = Registers()
    source = f"""
        mov rbx, {ADDRESS}; mov dword ptr [rbx + 8], 0x42; mov dx, 0x700; in al, dx
        mov byte ptr [rbx + 9], al; mov dx, 0x704; mov al, 0x17; out dx, al; {EXIT.format(3)}
    """
    places = [avmm.mmio(device, ADDRESS, 4096), avmm.pio(device, 0x700, 8, offset=8)]
    async with machine(tmp_path, source, devices=places) as vm:
        assert (await vm.wait()).status == 3
    assert device.storage.get(8) == b"\x42\x42\0\0\x17\0\0\0"
    assert not in_python


async def test_in_a_deterministic_run(tmp_path: Path) -> None:
    device = Registers()
    places = [avmm.mmio(device, ADDRESS, 4096), avmm.pio(device, PORT, 64)]
    source = PROGRAM.replace(f"[rbx + {STATUS}]; cmp eax, 9", f"[rbx + {STATUS}]; cmp eax, 0")
    async with machine(tmp_path, source + TAIL, devices=places, deterministic=1) as vm:
        assert (await vm.wait()).status == 3
    assert device.ring.take() == struct.pack("<3I", 0xA1, 0xA2, 0xA3)


async def test_what_finds_no_room_is_the_devices(tmp_path: Path) -> None:
    class Waiting(Registers):
        """Its writer waits until there is room."""

        def __init__(self) -> None:
            super().__init__(capacity=2)
            self.full = trio.Event()
            self.taken: list[int] = []

        async def write(self, offset: int, size: int, value: int) -> None:  # type: ignore[override]
            self.full.set()
            while len(self.ring) == self.capacity:
                await trio.lowlevel.checkpoint()
            self.log.append(("write", offset, size, value))

    device = Waiting()
    writes = "".join(f"mov dword ptr [rbx], {value};" for value in range(1, 4))
    source = f"mov rbx, {ADDRESS + RING}; {writes} mov dword ptr [rbx], 4; {EXIT.format(3)}"
    async with machine(tmp_path, source, devices=[avmm.mmio(device, ADDRESS, 4096)]) as vm:
        await device.full.wait()
        assert device.ring.take(1) == struct.pack("<I", 1)
        assert (await vm.wait()).status == 3
    assert device.log == [("write", RING, 4, 3)]
    assert device.ring.take() == struct.pack("<2I", 2, 4)


async def test_who_waits_is_woken_by_one_write_and_the_others_wake_nobody(
    tmp_path: Path, in_python: list[int]
) -> None:
    device, got = Registers(capacity=100), b""
    source = f"""
        mov rbx, {ADDRESS}
        1: mov eax, dword ptr [rbx]; test eax, eax; jz 1b
        mov ecx, 50; 2: mov dword ptr [rbx + {RING}], ecx; dec ecx; jnz 2b
        3: mov eax, dword ptr [rbx + 4]; test eax, eax; jz 3b
        mov dword ptr [rbx + {RING}], 99; {EXIT.format(3)}
    """
    async with machine(tmp_path, source, devices=[avmm.mmio(device, ADDRESS, 4096)]) as vm:
        for cancelled in (True, False):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(device.ring.wait)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(trio.BusyResourceError):
                    await device.ring.wait()
                if cancelled:
                    nursery.cancel_scope.cancel()
                else:
                    device.storage.put(b"\1")
        while len(device.ring) < 50:
            await trio.lowlevel.checkpoint()
        assert in_python == [RING]
        await device.ring.wait()
        got = device.ring.take()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.ring.wait)
            await trio.testing.wait_all_tasks_blocked()
            device.storage.put(b"\1", 4)
        assert (await vm.wait()).status == 3
    assert got + device.ring.take() == struct.pack("<51I", *range(50, 0, -1), 99)
    assert in_python == [RING, RING]


class Mover(Registers):
    """What a guest counts on: it reads and writes the storage, and each number is collected."""

    def __init__(self) -> None:
        super().__init__(capacity=8)
        self.numbers: list[int] = []
        self.late: list[int] = []

    async def run(self) -> None:
        while True:
            await self.ring.wait()
            self.take()

    def take(self) -> None:
        self.numbers += (number for (number,) in struct.iter_unpack("<I", self.ring.take()))

    @property
    def count(self) -> int:
        return int.from_bytes(self.storage.get(0, 4), "little")

    async def quiesce(self) -> None:
        pass

    async def write(self, offset: int, size: int, value: int) -> None:  # type: ignore[override]
        """There was no room."""
        with self.host.lock:
            self.take()
            self.numbers.append(value)

    def save(self) -> dict[str, Any]:
        return {"numbers": list(self.numbers)}

    def load(self, state: Any) -> None:
        self.numbers = list(state["numbers"])


COUNT = 30_000
COUNTING = f"""
    mov rbx, {ADDRESS}; mov dx, {PORT + RING}
    1: mov eax, dword ptr [rbx]; inc eax; mov dword ptr [rbx], eax
    mov dword ptr [rbx + 8], eax; add dword ptr [rbx + 4], eax
    test al, 1; jz 2f; mov dword ptr [rbx + {RING}], eax; jmp 3f; 2: out dx, eax
    3: cmp eax, {COUNT}; jne 1b; {EXIT.format(3)}
"""


@pytest.mark.timeout(120)
async def test_nothing_is_lost_or_made_twice_between_machines(tmp_path: Path) -> None:
    """The guest is caught wherever it is, mostly between two accesses that C serves."""
    device, state, moves = Mover(), None, 0

    def made() -> avmm.Machine:
        places = [avmm.mmio(device, ADDRESS, 4096), avmm.pio(device, PORT, 64)]
        return machine(tmp_path, COUNTING, devices=places, state=state)

    for step in range(200, COUNT, 200):
        async with made() as vm:
            while device.count < step and vm.state is not avmm.Runstate.ENDED:
                await trio.lowlevel.checkpoint()
            if vm.state is avmm.Runstate.ENDED:
                break
            async with vm.paused(deadline=20):
                state = vm.save()
                vm.stop()
        device, moves = Mover(), moves + 1
    else:
        async with made() as vm:
            assert (await vm.wait()).status == 3
    device.take()
    assert moves > 10
    assert device.numbers == list(range(1, COUNT + 1))
    total = COUNT * (COUNT + 1) // 2
    assert device.storage.get() == struct.pack("<IIII", COUNT, total & 0xFFFF_FFFF, COUNT, 0)


@pytest.mark.timeout(120)
async def test_pauses_while_c_serves(tmp_path: Path) -> None:
    """A guest that makes nothing but such exits is paused again and again, and does not notice."""
    device = Registers()
    source = f"""
        mov rbx, {ADDRESS}; mov ecx, {COUNT}
        1: inc dword ptr [rbx]; dec ecx; jnz 1b; {EXIT.format(3)}
    """
    pauses = 0
    async with machine(tmp_path, source, devices=[avmm.mmio(device, ADDRESS, 4096)]) as vm:
        while vm.state is not avmm.Runstate.ENDED:
            async with vm.paused(deadline=20):
                before = device.storage.get()
                await trio.lowlevel.checkpoint()
                assert device.storage.get() == before
            pauses += 1
            await trio.lowlevel.checkpoint()
    assert pauses > 20
    assert device.storage.get(0, 4) == struct.pack("<I", COUNT)


class Publisher(avmm.Device):
    """Its second page is published."""

    def __init__(self) -> None:
        self.page: Register
        self.log: list[tuple[str, int, int, int]] = []

    def attach(self, host: Host) -> None:
        super().attach(host)
        self.page = host.registers.page(0x1000)

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size, 0))
        return 0x77

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))
        self.page.put(struct.pack("<I", value), offset - 0x1000)

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: object) -> None:
        pass


async def test_a_page_is_read_without_an_exit(tmp_path: Path) -> None:
    """Its writes reach the device. An access over its edge is the device's and the page's."""
    device = Publisher()
    source = f"""
        mov rbx, {ADDRESS + 0x1000}
        1: mov eax, dword ptr [rbx + 8]; test eax, eax; jz 1b
        mov dword ptr [rbx + 16], eax; mov ecx, dword ptr [rbx + 16]; cmp eax, ecx; jne 8f
        mov eax, dword ptr [rbx - 0x1000]; cmp eax, 0x77; jne 8f
        mov eax, dword ptr [rbx + 0xffe]; cmp eax, 0x00770807; jne 8f
        mov dword ptr [rbx + 20], 1; 2: mov eax, dword ptr [rbx + 24]; test eax, eax; jz 2b
        {EXIT.format("eax")}; 8: {EXIT.format(9)}
    """
    places = [avmm.mmio(device, ADDRESS, 0x3000)]
    async with machine(tmp_path, source, devices=places) as vm:
        device.page.put(b"\7\x08", 0xFFE)
        device.page.put(struct.pack("<I", 5), 8)
        while not device.page.get(20, 1)[0]:
            await trio.lowlevel.checkpoint()
        async with vm.paused(deadline=20):
            state = vm.save()
        vm.stop()
    assert device.log[:2] == [("write", 0x1010, 4, 5), ("read", 0, 4, 0)]
    assert all(entry[1] == 0x2000 for entry in device.log[2:-1])
    assert device.log[-1] == ("write", 0x1014, 4, 1)
    other = Publisher()
    places = [avmm.mmio(other, ADDRESS, 0x3000)]
    async with machine(tmp_path, source, devices=places, state=state) as vm:
        assert other.page.get(16, 8) == struct.pack("<II", 5, 1)
        other.page.put(struct.pack("<I", 6), 24)
        assert (await vm.wait()).status == 6
    assert not other.log


async def refused(tmp_path: Path, place: avmm.Placement, *more: avmm.Placement) -> str:
    with pytest.raises(avmm.ConfigError) as caught:
        async with machine(tmp_path, "hlt", devices=[place, *more]):
            pass
    return str(caught.value)


class Declaring(avmm.Device):
    max_width = 4

    def __init__(self, declare: Callable[[avmm.Registers], object]) -> None:
        self._declare = declare

    def attach(self, host: Host) -> None:
        super().attach(host)
        self._declare(host.registers)


def twice(its: avmm.Registers) -> None:
    its.storage(0, 8)
    its.constant(4, 4)


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (
            lambda its: its.storage(62, 4),
            "at offset 0x3e: it has 4 bytes; expected one within",
        ),
        (
            lambda its: its.storage(-1, 4),
            "at offset -0x1: it has 4 bytes; expected one within",
        ),
        (lambda its: its.storage(0, 0), "0 bytes, expected 1 to"),
        (lambda its: its.storage(0, "8"), "'8' bytes, expected 1 to"),
        (
            lambda its: its.constant(0, 8),
            "8 bytes, expected one of 1, 2, 4, as the device",
        ),
        (
            lambda its: its.constant(0, 1, 256),
            "0x100 does not fit a register of 1 bytes",
        ),
        (
            lambda its: its.clearable(0, 16),
            "16 bytes, expected one of 1, 2, 4, as the device",
        ),
        (
            lambda its: its.collected(0, 3, 4),
            "3 bytes, expected one of 1, 2, 4, as the device",
        ),
        (lambda its: its.collected(0, 4, 0), "capacity 0, expected 1 to"),
        (lambda its: its.collected(0, 4, 2.5), "capacity 2.5, expected 1 to"),
        (lambda its: its.page(0), "0x0: it has 4096 bytes; expected one within"),
        (twice, "at offset 0x4 overlaps the one at 0x0, which serves reads there as well"),
    ],
)
async def test_a_register_that_does_not_fit_is_refused(
    tmp_path: Path, declare: Callable[[Any], object], words: str
) -> None:
    text = await refused(tmp_path, avmm.pio(Declaring(declare), PORT, 64))
    assert text.startswith("Declaring: the register at offset")
    assert words in text


async def test_a_page_needs_a_page_of_memory(tmp_path: Path) -> None:
    device = Declaring(lambda its: its.page(0))
    assert "expected a multiple of 0x1000" in await refused(
        tmp_path, avmm.mmio(device, ADDRESS + 0x800, 0x2000)
    )
    assert "within memory at which the device is placed" in await refused(
        tmp_path, avmm.pio(device, 0x2000, 0x1000)
    )


async def test_what_is_declared_later_is_refused(tmp_path: Path) -> None:
    device = Registers()
    async with machine(tmp_path, "1: pause; jmp 1b", devices=[avmm.pio(device, PORT, 64)]) as vm:
        with pytest.raises(avmm.ConfigError, match=r"expected it to be declared in attach\(\)"):
            device.host.registers.storage(0x30, 4)
        vm.stop()


async def test_who_waits_sees_what_a_load_brings(tmp_path: Path) -> None:
    """A machine that receives a state may have been waited on before."""
    source = f"mov dx, {PORT + RING}; mov eax, 7; out dx, eax; 1: pause; jmp 1b"
    device, other = Registers(), Registers()
    async with machine(tmp_path, source, devices=[avmm.pio(device, PORT, 64)]) as vm:
        while not len(device.ring):
            await trio.lowlevel.checkpoint()
        async with vm.paused(deadline=20):
            state: Any = vm.save()
        vm.stop()
    async with machine(tmp_path, source, devices=[avmm.pio(other, PORT, 64)]) as vm:
        async with vm.paused(deadline=20):
            other.ring.take()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other.ring.wait)
                await trio.testing.wait_all_tasks_blocked()
                other.host.registers.load(state["registers"][0][1])  # type: ignore[attr-defined]
            assert other.ring.take() == struct.pack("<I", 7)
        vm.stop()


async def test_a_device_that_answers_msrs_has_none(tmp_path: Path) -> None:
    device = Declaring(lambda its: its.storage(0, 8))
    text = await refused(tmp_path, avmm.pio(device, PORT, 64), avmm.msr(device, 0x4D56_0000))
    assert "expected a device that answers no MSRs" in text


async def test_a_state_of_other_registers_is_refused(tmp_path: Path) -> None:
    places = [avmm.pio(Registers(), PORT, 64)]
    async with machine(tmp_path, "1: pause; jmp 1b", devices=places) as vm:
        async with vm.paused():
            state: Any = vm.save()
        vm.stop()
    ((number, held),) = state["registers"]
    for wrong, words in (
        ([[number, held[:-1]]], r"Registers: the state has \d registers; expected \d"),
        ([[number, [held[0][1:], *held[1:]]]], "Registers: register 0 has 15 bytes; expected 16"),
        ([[number, [*held[:-1], b"abc"]]], "expected at most 4 times 4"),
        ([[99, held]], "expected those of"),
        ([[number, held], [number, held]], "expected those of"),
        ([], "the state has 0 registers"),
    ):
        with pytest.raises(avmm.StateError, match=words):
            async with machine(
                tmp_path,
                "hlt",
                devices=[avmm.pio(Registers(), PORT, 64)],
                state={**state, "registers": wrong},
            ):
                pass
