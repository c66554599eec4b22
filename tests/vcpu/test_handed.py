"""Exits that a vCPU's thread hands to its task without serving them, and the gate in front of the
GIL. tests/kvm/test_gate.py has what is C's alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from support.guest import EXIT, machine

import avmm
from avmm.bus.space import Bus, pio
from avmm.kvm.claims import Way
from avmm.loop import VcpuState

pytestmark = [pytest.mark.lab(also="stock"), pytest.mark.usefixtures("kvm", "nothing_left")]

PORT: Final = 0x300
ADDRESS: Final = 0xD000_0000


class Mixed(avmm.Device):
    """Its writes need a task in any case; its reads are answered at once, or later."""

    max_width = 4

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int, int]] = []
        self.states: set[tuple[str, VcpuState]] = set()
        self.state: Any = lambda: None
        self.in_trio: set[bool] = set()
        self.trio_thread = threading.get_ident()

    def _note(self, kind: str, offset: int, size: int, value: int) -> None:
        self.log.append((kind, offset, size, value))
        self.states.add((kind, self.state()))

    def read(self, offset: int, size: int) -> Any:
        self.in_trio.add(threading.get_ident() == self.trio_thread)
        if offset == 1:
            return self._read_later(offset, size)
        self._note("read", offset, size, 7)
        return 7

    async def _read_later(self, offset: int, size: int) -> int:
        await trio.lowlevel.checkpoint()
        self._note("read later", offset, size, 9)
        return 9

    async def write(self, offset: int, size: int, value: int) -> None:
        assert threading.get_ident() == self.trio_thread
        self._note("write", offset, size, value)
        if value & 1:
            await trio.lowlevel.checkpoint()


async def test_each_access_comes_once_and_in_order_whoever_serves_it(tmp_path: Path) -> None:
    device = Mixed()
    source = f"""
        mov dx, {PORT}; mov eax, 0x11; out dx, al; in al, dx; movzx ebx, al
        inc dx; in al, dx; movzx ecx, al; add ebx, ecx
        add dx, 2; mov eax, 0x44332211; out dx, eax
        mov edx, {ADDRESS}; mov dword ptr [rdx], ebx; mov qword ptr [rdx + 8], rbx
        mov eax, dword ptr [rdx]; mov dword ptr [rdx + 0xffe], eax
        mov rsi, {0x10_0000}; mov ecx, 3; mov dx, {PORT}; cld; rep outsb
        {EXIT.format(5)}
    """
    regions = [avmm.pio(device, PORT, 4), avmm.mmio(device, ADDRESS, 4096, offset=0x100)]
    async with machine(tmp_path, source, devices=regions) as vm:
        device.state = lambda: vm._inside.parts.group.loops[0].state
        assert (await vm.wait()).status == 5
    code = (tmp_path / "guest.bin").read_bytes()
    assert (
        device.log
        == [
            ("write", 0, 1, 0x11),
            ("read", 0, 1, 7),
            ("read later", 1, 1, 9),
            ("write", 3, 1, 0x11),  # the rest is beyond its edge
            ("write", 0x100, 4, 16),
            ("write", 0x108, 4, 16),  # in parts, as it is no wider
            ("write", 0x10C, 4, 0),
            ("read", 0x100, 4, 7),
            ("write", 0x10FE, 2, 7),
            *(("write", 0, 1, byte) for byte in code[:3]),
        ]
    )
    assert device.in_trio == {False}
    # The write over the edge needs the thread, which looks for other devices.
    assert {state for kind, state in device.states if kind == "write"} == {
        VcpuState.HANDED,
        VcpuState.SERVED,
    }
    assert ("read", VcpuState.RUNNING) in device.states
    assert ("read later", VcpuState.SERVED) in device.states


async def test_a_handler_that_fails_is_named_with_its_exit(tmp_path: Path) -> None:
    class Failing(avmm.Device):
        async def write(self, offset: int, size: int, value: int) -> None:
            raise ValueError("no such thing")

    source = f"mov dx, {PORT}; out dx, al; {EXIT.format(0)}"
    with pytest.raises(ValueError, match="no such thing") as caught:
        async with machine(tmp_path, source, devices=[avmm.pio(Failing(), PORT, 1)]) as vm:
            await vm.wait()
    assert f"out of 1 bytes at port {PORT:#x}" in "".join(caught.value.__notes__)


async def test_what_it_answers_after_a_request_to_park_is_in_the_saved_state(
    tmp_path: Path,
) -> None:
    """The vCPU is asked to park while its task serves; it parks drained, with the value read."""

    class Slow(avmm.Device):
        def __init__(self) -> None:
            self.asked, self.go_on = trio.Event(), trio.Event()

        async def read(self, offset: int, size: int) -> int:
            self.asked.set()
            await self.go_on.wait()
            return 0x55

        def save(self) -> dict[str, Any]:
            return {}

        def load(self, state: object) -> None:
            pass

    source = f"mov dx, {PORT}; in al, dx; movzx ebx, al; {EXIT.format('ebx')}"
    device = Slow()
    async with machine(tmp_path, source, devices=[avmm.pio(device, PORT, 1)]) as vm:
        await device.asked.wait()
        loop = vm._inside.parts.group.loops[0]
        assert loop.state is VcpuState.HANDED
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def answer() -> None:
                while not loop._spot.asked:
                    await trio.lowlevel.checkpoint()
                assert "in of 1 bytes" in loop.waits_for(0)
                device.go_on.set()

            async with vm.paused(deadline=20):
                state = vm.save()
        vm.stop()
    other = Slow()
    async with machine(tmp_path, source, devices=[avmm.pio(other, PORT, 1)], state=state) as vm:
        assert (await vm.wait()).status == 0x55
    assert not other.asked.is_set()


async def test_a_handler_that_blocks_keeps_no_other_guest_from_its_exits(tmp_path: Path) -> None:
    """It stands behind the gate, and has let go of the GIL."""
    many = 2000
    done = threading.Event()

    class Blocking(avmm.Device):
        def write(self, offset: int, size: int, value: int) -> None:
            assert done.wait(30)

    class Counting(avmm.Device):
        count = 0

        def write(self, offset: int, size: int, value: int) -> None:
            self.count += 1
            if self.count == many:
                done.set()

    source = f"mov dx, {PORT}; mov ecx, {{}}; 1: out dx, al; dec ecx; jnz 1b; {EXIT.format(3)}"
    folders = [tmp_path / name for name in ("blocking", "counting")]
    for folder in folders:
        folder.mkdir()
    async with (
        machine(folders[0], source.format(1), devices=[avmm.pio(Blocking(), PORT, 1)]) as blocking,
        machine(
            folders[1], source.format(many), devices=[avmm.pio(Counting(), PORT, 1)]
        ) as counting,
    ):
        assert (await counting.wait()).status == 3
        assert (await blocking.wait()).status == 3


def test_a_bus_tells_which_handlers_are_coroutine_functions() -> None:
    bus = Bus("pio", 1 << 16)
    bus.add(pio(Mixed(), PORT, 4), threading.Lock())
    bus.add(pio(avmm.Device(), 0x10, 2), threading.Lock())
    assert [tuple(claim) for claim in bus.claims()] == [
        (0x10, 0x12, 8, Way(False), Way(False)),
        (PORT, PORT + 4, 4, Way(False), Way(True)),
    ]
