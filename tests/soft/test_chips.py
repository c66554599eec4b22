"""The software engine's chips: the datasheets' cases, plain models beside them, state out and in
at any moment, threads, and the same requests made of this host's KVM.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if shutil.which("cc") is None:
    pytest.skip("there is no C compiler", allow_module_level=True)

from tests.soft.chips import (
    FOLDER,
    INIT,
    INTERRUPT,
    IOAPIC,
    KHZ,
    MASTER,
    NEVER,
    NMI,
    SIPI,
    SLAVE,
    TIMER,
    UNHALT,
    Chips,
    module,
)

HZ = 1193182
MASTER_PORT, SLAVE_PORT = 0x20, 0xA0
LEVEL, MASKED, LOGICAL = 1 << 15, 1 << 16, 1 << 11
ENTRIES = [0, LEVEL, MASKED, LEVEL | MASKED]
OCW2 = [command << 5 | pin for command in range(8) for pin in range(8)]
PIC_PORTS = [0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]


@pytest.fixture
def chips() -> Iterator[Chips]:
    with Chips(2) as made:
        yield made


def pic_setup(c: Chips, icw4: int = 1) -> None:
    """As a PC does it: vectors from 0x20 and 0x28, all pins open."""
    c.out(0x20, 0x11)
    c.out(0x21, 0x20, 4, icw4)
    c.out(0xA0, 0x11)
    c.out(0xA1, 0x28, 2, icw4)
    c.out(0x21, 0)
    c.out(0xA1, 0)


def pulse(c: Chips, gsi: int) -> None:
    c.line(gsi, 1)
    c.line(gsi, 0)


# ---- the 8259s ----


def test_pic_takes_the_highest_first_and_holds_the_lower_back(chips: Chips) -> None:
    pic_setup(chips)
    assert chips.attention() == 0
    pulse(chips, 6)
    pulse(chips, 3)
    assert chips.attention() == INTERRUPT
    assert chips.take() == 0x23
    assert chips.attention() == 0  # 6 waits for the end of 3
    pulse(chips, 1)
    assert chips.take() == 0x21  # a higher one does not
    chips.out(0x20, 0x20)
    assert chips.take() == -1
    chips.out(0x20, 0x20)
    assert chips.take() == 0x26


def test_pic_slave_comes_by_the_masters_pin_2(chips: Chips) -> None:
    pic_setup(chips)
    pulse(chips, 12)
    assert chips.take() == 0x2C
    assert (chips.chip(MASTER).isr, chips.chip(SLAVE).isr) == (1 << 2, 1 << 4)
    pulse(chips, 8)
    assert chips.attention() == 0  # fully nested: the master does not look at its pin 2
    chips.out(0xA0, 0x20)
    chips.out(0x20, 0x20)
    assert chips.take() == 0x28


def test_pic_special_fully_nested_mode(chips: Chips) -> None:
    pic_setup(chips, icw4=0x11)
    pulse(chips, 12)
    assert chips.take() == 0x2C
    pulse(chips, 8)
    assert chips.take() == 0x28


def test_pic_spurious_interrupt_is_7_and_in_no_service(chips: Chips) -> None:
    pic_setup(chips)
    chips.out(0x4D0, 0x20)  # pin 5 is a level
    chips.line(5, 1)
    assert chips.attention() == INTERRUPT
    chips.line(5, 0)
    assert chips.attention() == 0
    assert chips.take() == -1
    assert chips.chip(MASTER).isr == 0


def test_pic_level_comes_again_until_its_line_falls(chips: Chips) -> None:
    pic_setup(chips)
    chips.out(0x4D0, 0xFF)
    assert chips.inp(0x4D0) == 0xF8  # 0, 1 and 2 are edges for ever
    chips.out(0x4D1, 0xFF)
    assert chips.inp(0x4D1) == 0xDE
    chips.line(5, 1)
    for _ in range(3):
        assert chips.take() == 0x25
        chips.out(0x20, 0x20)
    chips.line(5, 0)
    assert chips.take() == -1


def test_pic_automatic_end_and_rotation(chips: Chips) -> None:
    pic_setup(chips, icw4=3)
    pulse(chips, 4)
    assert chips.take() == 0x24
    assert chips.chip(MASTER).isr == 0
    chips.out(0x20, 0x80)  # rotate on automatic end
    pulse(chips, 4)
    assert chips.take() == 0x24
    pulse(chips, 4)
    pulse(chips, 5)
    assert chips.take() == 0x25  # 4 is the lowest now
    chips.out(0x20, 0x00)
    assert chips.chip(MASTER).rotate_on_auto_eoi == 0


def test_pic_rotation_on_end_and_set_priority(chips: Chips) -> None:
    pic_setup(chips)
    for irq in (3, 4):
        pulse(chips, irq)
    assert chips.take() == 0x23
    chips.out(0x20, 0xA0)  # end and rotate: 3 is the lowest, 4 the highest
    pulse(chips, 3)
    assert chips.take() == 0x24
    chips.out(0x20, 0xE4)  # specific end of 4, which is the lowest then
    pulse(chips, 5)
    assert chips.take() == 0x25
    chips.out(0x20, 0x65)  # specific end
    chips.out(0x20, 0xC7)  # 7 is the lowest: as at first
    assert chips.chip(MASTER).priority_add == 0
    assert chips.take() == 0x23


def test_pic_special_mask_mode(chips: Chips) -> None:
    pic_setup(chips)
    pulse(chips, 2 + 1)
    assert chips.take() == 0x23
    chips.out(0x21, 1 << 3)
    pulse(chips, 6)
    assert chips.attention() == 0
    chips.out(0x20, 0x68)  # the masked 3 holds nobody back
    assert chips.take() == 0x26
    chips.out(0x20, 0x20)
    assert chips.chip(MASTER).isr == 1 << 3  # a plain end does not end what is masked
    chips.out(0x20, 0x48)
    chips.out(0x20, 0x63)
    assert chips.chip(MASTER).isr == 0


def test_pic_registers_are_read_as_chosen(chips: Chips) -> None:
    pic_setup(chips)
    pulse(chips, 3)
    chips.take()
    pulse(chips, 6)
    assert chips.inp(0x20) == 1 << 6
    chips.out(0x20, 0x0B)
    assert chips.inp(0x20) == 1 << 3
    chips.out(0x20, 0x0A)
    assert chips.inp(0x20) == 1 << 6
    chips.out(0x21, 0x5A)
    assert chips.inp(0x21) == 0x5A


@pytest.mark.parametrize("port", [0x20, 0xA0])
def test_pic_poll_acknowledges(chips: Chips, port: int) -> None:
    pic_setup(chips)
    chips.out(port, 0x0C)
    assert chips.inp(port) == 0
    pulse(chips, 5 if port == 0x20 else 13)
    chips.out(port, 0x0C)
    assert chips.inp(port) == 0x85
    assert chips.chip(port >> 7).isr == 1 << 5
    assert chips.take() == -1
    assert chips.inp(port) == 0  # only one read is a poll


def test_pic_goes_to_whom_lint0_lets_it(chips: Chips) -> None:
    pic_setup(chips)
    pulse(chips, 4)
    assert chips.attention(0) == INTERRUPT  # the BSP's LINT0 is ExtINT from the start
    assert chips.attention(1) == 0
    chips.enable(0)
    chips.apic(0x350, 0x10700)
    assert chips.attention(0) == 0
    chips.apic(0x350, 0x700)
    assert chips.attention(0) == INTERRUPT
    chips.apic(0x80, 0xFF)
    assert chips.attention(0) == INTERRUPT  # the TPR does not stop ExtINT
    chips.msr(0x1B, chips.msr(0x1B, cpu=1) & ~0x800, cpu=1)
    assert chips.attention(1) == INTERRUPT  # without its LAPIC a CPU has the PIC's wire
    assert chips.take(1) == 0x24
    assert chips.attention(0) == 0


@dataclass
class Pic:
    """An 8259 as its datasheet says, with the two habits of KVM's: an edge stays in IRR, and the
    slave is latched.
    """

    fixed: int
    irr: int = 0
    isr: int = 0
    imr: int = 0
    line: int = 0
    elcr: int = 0
    lowest: int = 7
    base: int = 0
    aeoi: bool = False
    aeoi_rotates: bool = False
    special: bool = False
    nested: bool = False

    def order(self) -> list[int]:
        return [(self.lowest + 1 + i) % 8 for i in range(8)]

    def wire(self, pin: int, level: int) -> None:
        if level and (self.elcr >> pin & 1 or not self.line >> pin & 1):
            self.irr |= 1 << pin
        if not level and self.elcr >> pin & 1:
            self.irr &= ~(1 << pin)
        self.line = self.line & ~(1 << pin) | level << pin

    def wants(self) -> int | None:
        for pin in self.order():
            bit = 1 << pin
            passes = (self.special and self.imr & bit) or (
                self.nested and self.fixed == 0xF8 and pin == 2
            )
            if self.isr & bit and not passes:
                return None
            if self.irr & ~self.imr & bit:
                return pin
        return None

    def acknowledge(self, pin: int) -> int:
        if not self.elcr >> pin & 1:
            self.irr &= ~(1 << pin)
        if not self.aeoi:
            self.isr |= 1 << pin
        else:
            self.isr &= ~(1 << pin)
            if self.aeoi_rotates:
                self.lowest = pin
        return self.base + pin

    def command(self, value: int) -> None:
        ends, specific, rotates, pin = value & 0x20, value & 0x40, value & 0x80, value & 7
        if not ends and not specific:
            self.aeoi_rotates = bool(rotates)
            return
        if not specific:
            isr = self.isr & ~self.imr if self.special else self.isr
            serving = [pin for pin in self.order() if isr >> pin & 1]
            if not serving:
                return
            pin = serving[0]
        if rotates:
            self.lowest = pin
        if ends:
            self.isr &= ~(1 << pin)


@dataclass
class Pics:
    pics: list[Pic] = field(default_factory=lambda: [Pic(0xF8), Pic(0xDE)])

    def settle(self) -> None:
        if self.pics[1].wants() is not None:
            self.pics[0].wire(2, 1)
            self.pics[0].wire(2, 0)

    def take(self) -> int:
        master, slave = self.pics
        pin = master.wants()
        if pin is None:
            return -1
        vector = master.acknowledge(pin)
        if pin == 2:
            pin = slave.wants()
            vector = slave.base + 7 if pin is None else slave.acknowledge(pin)
        self.settle()
        return vector


pic_steps = st.lists(
    st.one_of(
        st.tuples(st.just("line"), st.sampled_from([0, 1, *range(3, 16)]), st.integers(0, 1)),
        st.tuples(st.just("take"), st.just(0), st.just(0)),
        st.tuples(st.just("imr"), st.integers(0, 1), st.integers(0, 255)),
        st.tuples(st.just("elcr"), st.integers(0, 1), st.integers(0, 255)),
        st.tuples(st.just("ocw2"), st.integers(0, 1), st.sampled_from([0x20, 0xA0, 0, 0x80])),
        st.tuples(st.just("ocw2"), st.integers(0, 1), st.sampled_from(OCW2)),
        st.tuples(st.just("special"), st.integers(0, 1), st.integers(0, 1)),
        st.tuples(st.just("init"), st.integers(0, 1), st.sampled_from([1, 3, 0x11, 0x13])),
        st.tuples(st.just("reload"), st.just(0), st.just(0)),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(pic_steps)
def test_pics_are_their_model(steps: list[tuple[str, int, int]]) -> None:
    with Chips(1) as c:
        model = Pics()
        for kind, which, value in [("init", 0, 1), ("init", 1, 1), *steps]:
            pic = model.pics[which & 1]
            port = SLAVE_PORT if which else MASTER_PORT
            if kind == "line":
                c.line(which, value)
                model.pics[which >> 3].wire(which & 7, value)
            elif kind == "take":
                assert c.take() == model.take()
            elif kind == "imr":
                c.out(port + 1, value)
                pic.imr = value
            elif kind == "elcr":
                c.out(0x4D0 + which, value)
                pic.elcr = value & pic.fixed
            elif kind == "ocw2":
                c.out(port, value)
                pic.command(value)
            elif kind == "special":
                c.out(port, 0x68 if value else 0x48)
                pic.special = bool(value)
            elif kind == "init":
                c.out(port, 0x11)
                c.out(port + 1, 0x20 + 8 * which, 0, value)
                pic.irr &= pic.elcr
                pic.isr = pic.imr = pic.line = 0
                pic.lowest, pic.special, pic.base = 7, False, 0x20 + 8 * which
                pic.aeoi, pic.nested = bool(value & 2), bool(value & 0x10)
            else:
                for chip in (MASTER, SLAVE):
                    state = c.vm("GET_IRQCHIP", "struct kvm_irqchip *", {"chip_id": chip})
                    c.vm("SET_IRQCHIP", "struct kvm_irqchip *", state)
            if kind not in ("elcr", "reload"):
                model.settle()
            for chip in (MASTER, SLAVE):
                state, expected = c.chip(chip), model.pics[chip]
                seen = (state.irr, state.isr, state.imr, state.priority_add)
                assert seen == (
                    expected.irr,
                    expected.isr,
                    expected.imr,
                    (expected.lowest + 1) % 8,
                )
            assert bool(c.attention() & INTERRUPT) == (model.pics[0].wants() is not None)


# ---- the I/O APIC ----


def test_ioapic_registers(chips: Chips) -> None:
    base = 0xFEC0_0000
    chips.store(base, 1)
    assert chips.load(base + 0x10) == 0x17_0011
    chips.store(base, 0)
    chips.store(base + 0x10, 0xFFFF_FFFF)
    assert chips.load(base + 0x10) == 0x0F00_0000
    assert chips.entry(5) == MASKED
    assert chips.load(base, size=1) == 0x10 + 10
    assert chips.load(base + 0x20) == 0
    value = chips.ffi.new("uint64_t *")
    assert chips.lib.soft_chips_mmio(chips.c, 0, 0, base + 0x100, 4, value) == 0


def test_ioapic_edge(chips: Chips) -> None:
    chips.enable()
    chips.entry(5, 0x45)
    assert chips.line(5, 1) == 2  # the PIC has taken it as well
    assert chips.chip(IOAPIC).irr == 0  # the line is high, and nothing waits
    chips.line(5, 1)
    assert chips.take() == 0x45
    assert chips.take() == -1
    chips.eoi()
    chips.line(5, 0)
    chips.line(5, 1)
    assert chips.take() == 0x45


def test_ioapic_edge_while_masked_is_lost_but_kept_in_state(chips: Chips) -> None:
    chips.enable()
    chips.entry(5, 0x45 | MASKED)
    chips.line(5, 1)
    assert chips.chip(IOAPIC).irr == 1 << 5
    chips.entry(5, 0x45)
    assert chips.take() == -1
    state = chips.vm("GET_IRQCHIP", "struct kvm_irqchip *", {"chip_id": IOAPIC})
    chips.vm("SET_IRQCHIP", "struct kvm_irqchip *", state)
    assert chips.take() == 0x45  # as KVM: a loaded state raises what its irr says


def test_ioapic_level_waits_for_the_end(chips: Chips) -> None:
    chips.enable()
    chips.entry(5, 0x45 | LEVEL)
    chips.line(5, 1)
    assert chips.entry(5) == 0x45 | LEVEL | 1 << 14
    assert chips.take() == 0x45
    chips.line(5, 0)
    chips.line(5, 1)
    assert chips.attention() == 0
    chips.eoi()
    assert chips.take() == 0x45  # still high: again
    chips.line(5, 0)
    chips.eoi()
    assert chips.attention() == 0
    assert chips.entry(5) == 0x45 | LEVEL


def test_ioapic_level_while_masked_comes_when_it_opens(chips: Chips) -> None:
    chips.enable()
    chips.entry(5, 0x45 | LEVEL | MASKED)
    chips.line(5, 1)
    assert chips.attention() == 0
    chips.entry(5, 0x45 | LEVEL)
    assert chips.take() == 0x45


def test_ioapic_level_that_nobody_took_comes_when_its_lapic_is_loaded(chips: Chips) -> None:
    chips.enable()
    chips.entry(5, 0x45 | LEVEL)
    on = chips.registers()
    chips.apic(0xF0, 0xFF)
    chips.line(5, 1)
    assert chips.entry(5) == 0x45 | LEVEL  # not taken: no remote IRR
    lapic = chips.ffi.new("struct kvm_lapic_state *")
    chips.ffi.memmove(lapic, on, len(on))
    chips.cpu(0, "SET_LAPIC", "struct kvm_lapic_state *", lapic)
    assert chips.take() == 0x45


def test_ioapic_edge_for_a_moment_forgets_remote_irr(chips: Chips) -> None:
    chips.enable()
    chips.entry(5, 0x45 | LEVEL)
    chips.line(5, 1)
    chips.take()
    assert chips.entry(5, 0x45 | MASKED) == 0x45 | MASKED
    assert chips.entry(5, 0x45 | LEVEL) == 0x45 | LEVEL | 1 << 14  # and it is delivered anew
    assert chips.register(0x220) == 1 << 5


def test_a_line_is_high_while_anybody_holds_it(chips: Chips) -> None:
    """A resampling irqfd and the user hold the same line."""
    chips.enable()
    chips.entry(5, 0x45 | LEVEL)
    fd, again = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
    assert chips.irqfd(fd, 5, 2, again) == 0
    chips.line(5, 1)
    os.eventfd_write(fd, 1)
    chips.lib.soft_chips_sweep(chips.c)
    chips.line(5, 0)
    assert chips.chip(IOAPIC).irr == 1 << 5
    assert chips.take() == 0x45
    chips.eoi()
    assert chips.chip(IOAPIC).irr == 0
    assert os.eventfd_read(again) == 1
    os.close(fd)
    os.close(again)


io_steps = st.lists(
    st.one_of(
        st.tuples(st.just("line"), st.integers(16, 19), st.integers(0, 1)),
        st.tuples(st.just("entry"), st.integers(16, 19), st.sampled_from(ENTRIES)),
        st.tuples(st.just("take"), st.just(0), st.just(0)),
        st.tuples(st.just("eoi"), st.just(0), st.just(0)),
        st.tuples(st.just("reload"), st.just(0), st.just(0)),
    ),
    max_size=50,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(io_steps)
def test_ioapic_and_lapic_are_their_model(  # noqa: PLR0915
    steps: list[tuple[str, int, int]],
) -> None:
    """Pins 16 to 19 with vectors 0x50, 0x60, ... (one class each), one CPU."""
    vectors = {pin: 0x50 + 0x10 * (pin - 16) for pin in range(16, 20)}
    mode = {pin: MASKED for pin in vectors}
    high: set[int] = set()
    remote: set[int] = set()
    irr: set[int] = set()
    isr: list[int] = []
    levels: set[int] = set()  # LAPIC's TMR

    def serve(pin: int) -> None:
        if mode[pin] & MASKED or (mode[pin] & LEVEL and pin in remote):
            return
        irr.add(vectors[pin])
        if mode[pin] & LEVEL:
            remote.add(pin)
            levels.add(vectors[pin])
        else:
            levels.discard(vectors[pin])

    with Chips(1) as c:
        c.enable()
        for number, vector in vectors.items():
            c.entry(number, vector | MASKED)
        for kind, pin, value in steps:
            if kind == "line":
                c.line(pin, value)
                if value and (mode[pin] & LEVEL or pin not in high):
                    high.add(pin)
                    serve(pin)
                high = high | {pin} if value else high - {pin}
            elif kind == "entry":
                # The upper half first, as `entry` does; it changes nothing, but looks at the line.
                if mode[pin] & LEVEL and pin in high:
                    serve(pin)
                mode[pin] = value
                if not value & LEVEL:
                    remote.discard(pin)
                elif pin in high:
                    serve(pin)
                c.entry(pin, vectors[pin] | value)
            elif kind == "take":
                best = max(irr, default=-1)
                if best <= (isr[-1] if isr else 0):
                    best = -1
                assert c.take() == best
                if best >= 0:
                    irr.remove(best)
                    isr.append(best)
            elif kind == "eoi":
                c.eoi()
                if isr:
                    vector = isr.pop()
                    at = next(number for number in vectors if vectors[number] == vector)
                    if vector in levels:
                        remote.discard(at)
                        if mode[at] & LEVEL and at in high:
                            serve(at)
            else:
                state = c.registers()
                lapic = c.ffi.new("struct kvm_lapic_state *")
                c.ffi.memmove(lapic, state, len(state))
                c.cpu(0, "SET_LAPIC", "struct kvm_lapic_state *", lapic)
            for number, vector in vectors.items():
                word, bit = 0x10 * (vector >> 5), vector & 31
                assert (c.register(0x200 + word) >> bit & 1) == (vector in irr)
                assert (c.register(0x100 + word) >> bit & 1) == (vector in isr)
                assert bool(c.chip(IOAPIC).redirtbl[number].bits >> 14 & 1) == (number in remote)


# ---- the LAPIC ----


def test_lapic_at_power_on(chips: Chips) -> None:
    assert chips.msr(0x1B) == 0xFEE0_0900
    assert chips.msr(0x1B, cpu=1) == 0xFEE0_0800
    values = {
        0x20: 1 << 24,
        0x30: 0x5_0014,
        0xE0: 0xFFFF_FFFF,
        0xF0: 0xFF,
        0x320: MASKED,
        0x350: MASKED,
    }
    assert {at: chips.apic(at, cpu=1) for at in values} == values
    assert chips.apic(0x350) == 0x700


def test_lapic_priorities(chips: Chips) -> None:
    chips.enable()
    for vector in (0x41, 0x83, 0x85):
        assert chips.msi(0, vector) == 1
    assert chips.take() == 0x85
    assert chips.apic(0xA0) == 0x80
    assert chips.attention() == 0  # 0x83 has the same class
    chips.msi(0, 0x91)
    assert chips.take() == 0x91
    chips.eoi()
    chips.eoi()
    assert chips.take() == 0x83
    chips.eoi()
    assert chips.take() == 0x41
    chips.eoi()
    chips.eoi()  # nothing is in service: nothing happens
    assert chips.apic(0xA0) == 0


def test_lapic_task_priority_and_cr8(chips: Chips) -> None:
    chips.enable()
    chips.lib.soft_chips_set_cr8(chips.c, 0, 5)
    assert chips.apic(0x80) == 0x50
    chips.msi(0, 0x5F)
    assert chips.attention() == 0
    assert chips.take() == -1
    chips.apic(0x80, 0x4F)
    assert chips.lib.soft_chips_cr8(chips.c, 0) == 4
    assert chips.attention() == INTERRUPT
    assert chips.take() == 0x5F
    assert chips.apic(0xA0) == 0x50


def test_lapic_that_is_off_takes_nothing(chips: Chips) -> None:
    assert chips.msi(0, 0x41) == 0
    chips.enable()
    chips.apic(0x320, 0x55)
    chips.apic(0xF0, 0xFF)
    assert chips.apic(0x320) == 0x55 | MASKED
    assert chips.msi(0, 0x41) == 0
    assert chips.msi(0, 2, 4) == 1  # an NMI is not the APIC's to refuse
    assert chips.attention() == NMI
    assert chips.lib.soft_chips_take_nmi(chips.c, 0) == 1
    assert chips.lib.soft_chips_take_nmi(chips.c, 0) == 0


def test_messages_find_their_destination() -> None:
    with Chips(4) as c:
        for cpu in range(4):
            c.enable(cpu)
            c.apic(0xD0, 1 << 24 + cpu, cpu)

        def who(*args: Any, **options: Any) -> set[int]:
            c.msi(*args, **options)
            return {cpu for cpu in range(4) if c.serve(cpu) == 0x41}

        assert who(2, 0x41) == {2}
        assert who(9, 0x41) == set()
        assert who(0xFF, 0x41) == {0, 1, 2, 3}
        assert who(0b0101, 0x41, logical=True) == {0, 2}
        assert len(who(0b1110, 0x41, 1, logical=True)) == 1
        assert len(who(0b1110, 0x41, logical=True, hint=True)) == 1
        spread = set()
        for vector in range(0x30, 0x3F):
            c.msi(0b1111, vector, 1, logical=True)
            spread |= {cpu for cpu in range(4) if c.serve(cpu) == vector}
        assert spread == {0, 1, 2, 3}
        for cpu in range(4):  # the cluster model: two clusters of two
            c.apic(0xE0, 0x0FFF_FFFF, cpu)
            c.apic(0xD0, (cpu // 2 << 4 | 1 << cpu % 2) << 24, cpu)
        assert who(0x03, 0x41, logical=True) == {0, 1}
        assert who(0x12, 0x41, logical=True) == {3}
        assert who(0x21, 0x41, logical=True) == set()


@pytest.mark.parametrize("x2", [False, True])
def test_ipis_and_shorthands(x2: bool) -> None:
    with Chips(3) as c:
        for cpu in range(3):
            c.enable(cpu, x2)

        def send(low: int, dest: int = 0) -> list[int]:
            if x2:
                c.msr(0x830, dest << 32 | low, cpu=1)
            else:
                c.apic(0x310, dest << 24, 1)
                c.apic(0x300, low, 1)
            return [cpu for cpu in range(3) if c.serve(cpu) == low & 0xFF]

        assert send(0x4041, 2) == [2]
        assert send(0x4041 | 1 << 18) == [1]
        assert send(0x4041 | 2 << 18) == [0, 1, 2]
        assert send(0x4041 | 3 << 18) == [0, 2]
        assert send(0x4041, 0xFFFF_FFFF if x2 else 0xFF) == [0, 1, 2]
        if x2:
            assert send(0x4041 | LOGICAL, 0b101) == [0, 2]
            assert send(0x4041 | LOGICAL, 1 << 16 | 1) == []
            assert c.msr(0x80D, cpu=2) == 1 << 2
            assert c.msr(0x830, cpu=1) == (1 << 16 | 1) << 32 | 0x4841
            c.msr(0x83F, 0x51, cpu=1)
            assert c.take(1) == 0x51


def test_x2apic_modes_and_refusals(chips: Chips) -> None:
    base = chips.msr(0x1B)
    assert chips.try_msr(0x802)[0] == -errno.EINVAL
    assert chips.try_msr(0x1B, base & ~0x800 | 0x400)[0] == -errno.EINVAL
    assert chips.try_msr(0x1B, base | 1 << 60)[0] == -errno.EINVAL
    assert chips.try_msr(0x1B, base | 1)[0] == -errno.EINVAL
    chips.msr(0x1B, base | 0x400)
    assert chips.load(0xFEE0_0030) == 0xFFFF_FFFF  # the page is not there any more
    assert chips.try_msr(0x1B, base)[0] == -errno.EINVAL
    assert chips.try_msr(0x802, 5)[0] == -errno.EINVAL
    assert chips.try_msr(0x80E)[0] == -errno.EINVAL
    assert chips.try_msr(0x831)[0] == -errno.EINVAL
    assert chips.try_msr(0x80B)[0] == -errno.EINVAL
    assert chips.try_msr(0x880)[0] == -errno.EINVAL
    assert chips.try_msr(0x80F, 1 << 32)[0] == -errno.EINVAL
    assert chips.try_msr(0x830, 1 << 13)[0] == -errno.EINVAL
    assert chips.try_msr(0x83F, 0x100)[0] == -errno.EINVAL
    assert chips.try_msr(0x123)[0] == -errno.ENOENT
    chips.msr(0x1B, base & ~0x800)
    assert chips.try_msr(0x1B, base | 0x400)[0] == -errno.EINVAL  # from off only to xAPIC
    chips.msr(0x1B, base)
    assert chips.apic(0x20) == 0
    assert chips.lib.soft_chips_set_apic_base(chips.c, 1, 0xFEE0_0C00) == 0
    assert chips.msr(0x802, cpu=1) == 1
    assert chips.register(0x20, 1) == 1 << 24  # KVM's older format of the state
    chips.msr(0x1B, 0xFED0_0900)
    assert chips.load(0xFED0_0030) == 0x5_0014  # the page can be elsewhere
    value = chips.ffi.new("uint64_t *")
    assert chips.lib.soft_chips_mmio(chips.c, 0, 0, 0xFEE0_0030, 4, value) == 0


def test_lapic_accesses_of_other_sizes(chips: Chips) -> None:
    chips.enable()
    assert chips.load(0xFEE0_0030, size=1) == 0x14
    assert chips.load(0xFEE0_0032, size=2) == 0x5
    assert chips.load(0xFEE0_0031, size=4) == 0
    chips.store(0xFEE0_0080, 0x50, size=1)
    chips.store(0xFEE0_0084, 0x50)
    assert chips.apic(0x80) == 0
    assert chips.load(0xFEE0_00B0) == 0


def test_init_and_startup(chips: Chips) -> None:
    chips.enable(0)
    chips.enable(1)
    chips.msi(1, 0x41)
    chips.apic(0x310, 1 << 24)
    chips.apic(0x300, 0x8500)  # INIT's de-assert means nothing
    assert chips.attention(1) == INTERRUPT
    chips.apic(0x300, 0xC500)
    assert chips.attention(1) == INIT | INTERRUPT
    chips.apic(0x300, 0x4608)
    assert chips.startup(1, INIT) == (INIT, 0)
    assert chips.attention(1) == SIPI
    assert chips.startup(1, SIPI) == (SIPI, 8)
    assert chips.apic(0xF0, cpu=1) == 0xFF
    assert chips.apic(0x20, cpu=1) == 1 << 24
    chips.apic(0x300, 0x4609)
    chips.apic(0x300, 0xC500)
    assert chips.startup(1) == (INIT, 0)  # an INIT forgets the SIPI before it
    chips.apic(0x300, 0x4300)  # a remote read: KVM takes it for the end of a halt
    assert chips.attention(1) == UNHALT
    assert chips.startup(1, UNHALT) == (UNHALT, 0)


def test_kicks_come_when_something_new_has_come(chips: Chips) -> None:
    chips.enable(0)
    chips.enable(1)
    chips.fake.kicks = 0
    chips.msi(1, 0x41)
    assert chips.fake.kicks == 0b10
    chips.fake.kicks = 0
    chips.msi(1, 0x42)
    assert chips.fake.kicks == 0  # it has not taken the first one yet
    chips.msi(0xFF, 0x51)
    assert chips.fake.kicks == 0b01


# ---- the LAPIC's timer ----


def test_timer_once(chips: Chips) -> None:
    chips.enable()
    chips.apic(0x3E0, 0b1011)  # by 1
    chips.apic(0x320, 0x61)
    chips.apic(0x380, 1_000_000)
    assert chips.next(0) == 1_000_000
    assert chips.next(1) == NEVER
    chips.at(400_000)
    assert chips.apic(0x390) == 600_000
    chips.at(999_999)
    assert chips.attention() == 0
    assert chips.apic(0x390) == 1
    chips.at(1_000_000)
    assert chips.take() == 0x61
    assert chips.apic(0x390) == 0
    assert chips.next() == NEVER


def test_timer_that_is_due_is_in_the_state(chips: Chips) -> None:
    """Nobody has run the timers; of those that are due, each LAPIC's own is in what is read."""
    for cpu in range(2):
        chips.enable(cpu)
        chips.apic(0x320, 0x61, cpu)
        chips.apic(0x380, 1000, cpu)
    chips.fake.ns += 10**6
    assert chips.register(0x230, 1) == 1 << 1
    assert chips.attention(0) == 0
    assert chips.register(0x230, 0) == 1 << 1


def test_timer_shows_0_only_when_it_is_over(chips: Chips) -> None:
    chips.enable()
    chips.apic(0x3E0, 0b1010)  # by 128
    chips.apic(0x320, 0x61)
    chips.apic(0x380, 1000)
    chips.at(127_999)
    assert chips.apic(0x390) == 1
    with Chips(2) as other:
        other.restore(chips.save())
        other.at(127)
        assert other.attention() == 0
        other.at(128)
        assert other.take() == 0x61


@pytest.mark.parametrize(
    ("bits", "by"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)]
)
def test_timer_divides(chips: Chips, bits: int, by: int) -> None:
    chips.enable()
    chips.apic(0x3E0, bits)
    chips.apic(0x320, 0x61)
    chips.apic(0x380, 100_000)
    assert chips.next() == 100_000 * by


def test_timer_divisor_changes_while_it_runs(chips: Chips) -> None:
    chips.enable()
    chips.apic(0x3E0, 0b1011)
    chips.apic(0x320, 0x61)
    chips.apic(0x380, 1_000_000)
    chips.at(500_000)
    chips.apic(0x3E0, 0b0001)
    assert chips.apic(0x390) == 500_000
    assert chips.next() == 500_000 + 4 * 500_000


def test_timer_periodic(chips: Chips) -> None:
    chips.enable()
    chips.apic(0x3E0, 0b1011)
    chips.apic(0x320, 0x61 | 1 << 17)
    chips.apic(0x380, 1_000_000)
    for n in (1, 2, 3):
        chips.at(n * 1_000_000)
        assert chips.take() == 0x61
        assert chips.next() == (n + 1) * 1_000_000
        chips.eoi()
    chips.at(7_500_000)  # several at once are one, and the phase stays
    assert chips.take() == 0x61
    assert chips.next() == 8_000_000
    chips.apic(0x320, 0x61 | 1 << 17 | MASKED)
    chips.at(8_000_000)
    chips.eoi()
    assert chips.attention() == 0
    chips.apic(0x380, 0)
    assert chips.next() == NEVER


def test_timer_deadline(chips: Chips) -> None:
    chips.enable()
    chips.lib.soft_chips_set_tsc(chips.c, 0, KHZ, (1 << 64) - 2 * 10**12 + 1000)
    assert chips.lib.soft_chips_tsc(chips.c, 0) == 1000
    chips.msr(0x6E0, 5000)
    assert chips.msr(0x6E0) == 0  # not in that mode
    chips.apic(0x320, 0x61 | 2 << 17)
    chips.msr(0x6E0, 5000)
    assert chips.next() == 2000
    assert chips.apic(0x390) == 0
    chips.at(1999)
    assert chips.attention() == 0
    assert chips.msr(0x6E0) == 5000
    chips.at(2000)
    assert chips.take() == 0x61
    assert chips.msr(0x6E0) == 0
    chips.eoi()
    chips.msr(0x6E0, 17)
    assert chips.take() == 0x61  # in the past: at once
    chips.eoi()
    chips.msr(0x6E0, (1 << 64) - 1)
    chips.at(10_000)
    assert chips.attention() == 0
    chips.msr(0x6E0, 1 << 40)
    chips.lib.soft_chips_set_tsc(chips.c, 0, KHZ, 0)
    assert chips.attention() & TIMER  # the TSC has jumped past it
    chips.lib.soft_chips_run_timers(chips.c)
    assert chips.take() == 0x61
    chips.msr(0x6E0, 1 << 50)
    chips.apic(0x320, 0x61)
    assert chips.next() == NEVER


def test_timer_deadline_with_another_frequency(chips: Chips) -> None:
    chips.enable()
    chips.lib.soft_chips_set_tsc(chips.c, 0, KHZ // 2, 0)
    chips.apic(0x320, 0x61 | 2 << 17)
    chips.msr(0x6E0, chips.lib.soft_chips_tsc(chips.c, 0) + 1000)
    assert chips.next() == 1000


# ---- the 8254 ----


def ticks(n: int) -> int:
    """The first nanosecond at which `n` ticks are over."""
    return -(-n * 10**9 // HZ)


def pit_ready(c: Chips) -> None:
    """IRQ 0 comes as vector 0x40 to CPU 0, by the I/O APIC."""
    c.enable()
    c.entry(0, 0x40)


@pytest.mark.parametrize("mode", [0, 1, 4])
def test_pit_once(chips: Chips, mode: int) -> None:
    pit_ready(chips)
    chips.out(0x43, 0x30 | mode << 1)
    assert chips.next() == NEVER
    chips.out(0x40, 0xE8, 0x03)
    assert chips.next() == ticks(1000)
    chips.at(ticks(1000) - 1)
    assert chips.attention() == 0
    chips.at(ticks(1000))
    assert chips.take() == 0x40
    assert chips.next() == NEVER


@pytest.mark.parametrize("mode", [2, 3, 6, 7])
def test_pit_periodic_does_not_drift(chips: Chips, mode: int) -> None:
    pit_ready(chips)
    chips.out(0x43, 0x30 | mode << 1)
    chips.out(0x40, 11932 & 0xFF, 11932 >> 8)
    for n in range(1, 30):
        assert chips.next() == ticks(11932 * n)
        chips.at(ticks(11932 * n))
        assert chips.take() == 0x40
        chips.eoi()
    chips.at(ticks(11932 * 40) + 5)
    assert chips.take() == 0x40
    assert chips.next() == ticks(11932 * 41)


def test_pit_counts_as_each_mode_does(chips: Chips) -> None:
    def count() -> int:
        chips.out(0x43, 0x80)  # latch channel 2
        return chips.inp(0x42) | chips.inp(0x42) << 8

    def out() -> int:
        return chips.inp(0x61) >> 5 & 1

    chips.out(0x61, 1)
    start = 0

    def begin(mode: int, value: int) -> None:
        chips.out(0x43, 0xB0 | mode << 1)
        chips.out(0x42, value & 0xFF, value >> 8)

    begin(0, 1000)
    assert (count(), out()) == (1000, 0)
    chips.at(ticks(400))
    assert (count(), out()) == (600, 0)
    chips.at(ticks(1000))
    assert (count(), out()) == (0, 1)
    chips.at(ticks(1001))
    assert (count(), out()) == (0xFFFF, 1)
    start = chips.fake.ns - 10**12
    begin(2, 1000)
    assert (count(), out()) == (1000, 1)
    chips.at(start + ticks(999))
    assert (count(), out()) == (1, 0)
    chips.at(start + ticks(1000))
    assert (count(), out()) == (1000, 1)
    start += ticks(1000)
    begin(3, 1000)
    chips.at(start + ticks(100))
    assert (count(), out()) == (800, 1)
    chips.at(start + ticks(600))
    assert (count(), out()) == (800, 0)
    start += ticks(600)
    begin(4, 1000)
    chips.at(start + ticks(999))
    assert (count(), out()) == (1, 1)
    chips.at(start + ticks(1000))
    assert out() == 0
    chips.at(start + ticks(1001))
    assert out() == 1


def test_pit_gate(chips: Chips) -> None:
    def count() -> int:
        chips.out(0x43, 0xD8)  # read back: count of channel 2
        return chips.inp(0x42) | chips.inp(0x42) << 8

    chips.out(0x61, 1)
    chips.out(0x43, 0xB0)
    chips.out(0x42, 0xE8, 0x03)
    chips.at(ticks(300))
    chips.out(0x61, 0)  # mode 0: it stands
    chips.at(ticks(500))
    assert count() == 700
    chips.out(0x61, 1)
    chips.at(ticks(501))
    assert count() in (699, 700)
    for mode in (1, 5):  # these start when the gate rises
        chips.out(0x61, 0)
        chips.out(0x43, 0xB0 | mode << 1)
        chips.out(0x42, 0xE8, 0x03)
        assert chips.inp(0x61) & 0x20
        begin = chips.fake.ns - 10**12
        chips.out(0x61, 1)
        assert bool(chips.inp(0x61) & 0x20) == (mode == 5)
        chips.at(begin + ticks(400))
        assert count() == 600
        chips.out(0x61, 0)
        chips.at(begin + ticks(500))
        assert count() == 500  # and do not stop when it falls
        chips.out(0x61, 1)
        assert count() == 1000
    chips.out(0x43, 0xB4)
    chips.out(0x42, 0xE8, 0x03)
    begin = chips.fake.ns - 10**12
    chips.at(begin + ticks(700))
    chips.out(0x61, 0)
    assert chips.inp(0x61) & 0x20
    chips.out(0x61, 3)
    assert chips.inp(0x61) & 3 == 3
    assert count() == 1000  # mode 2: it begins anew


def test_pit_latches_status_and_formats(chips: Chips) -> None:
    chips.out(0x43, 0x30)
    chips.out(0x43, 0xE2)  # status of channel 0
    assert chips.inp(0x40) == 0x70  # no count yet
    chips.out(0x40, 0x34, 0x12)
    chips.out(0x43, 0xC2)  # status and count
    chips.at(ticks(4))
    assert chips.inp(0x40) == 0x30
    assert chips.inp(0x40) == 0x34
    assert chips.inp(0x40) == 0x12
    assert chips.inp(0x40) == 0x30  # not latched any more
    assert chips.inp(0x40) == 0x12
    chips.out(0x43, 0x10)
    chips.out(0x40, 0x80)
    assert chips.inp(0x40) == 0x80
    assert chips.inp(0x40) == 0x80
    chips.out(0x43, 0x20)
    chips.out(0x40, 0x80)
    chips.out(0x43, 0)
    assert chips.inp(0x40) == 0x80
    chips.out(0x43, 0x31)  # decimal
    chips.out(0x40, 0x00, 0x10)
    chips.at(chips.fake.ns - 10**12 + ticks(1))
    chips.out(0x43, 0)
    assert chips.inp(0x40) | chips.inp(0x40) << 8 == 0x999
    assert chips.inp(0x43) == 0


def test_pit_is_loaded_in_the_midst(chips: Chips) -> None:
    pit_ready(chips)
    chips.out(0x43, 0x34)
    chips.out(0x40, 11932 & 0xFF, 11932 >> 8)
    for n in range(1, 40):  # saved and loaded more often than it ticks
        chips.at(n * 3_000_000)
        chips.vm(
            "SET_PIT2", "struct kvm_pit_state2 *", chips.vm("GET_PIT2", "struct kvm_pit_state2 *")
        )
    assert chips.next() == ticks(11932 * 12)
    state = chips.vm("GET_PIT2", "struct kvm_pit_state2 *")
    state.channels[0].count_load_time = 12345  # KVM's own: begins anew
    now = chips.fake.ns - 10**12
    chips.vm("SET_PIT2", "struct kvm_pit_state2 *", state)
    assert chips.next() == now + ticks(11932)
    state.channels[1].count = 0x10001
    assert chips.try_vm("SET_PIT2", "struct kvm_pit_state2 *", state)[0] == -errno.EINVAL


def test_pit_edge_that_is_due_at_the_save_is_not_lost(chips: Chips) -> None:
    """It came while no vCPU ran: the state says that it is still to come."""
    pit_ready(chips)
    chips.out(0x43, 0x30)
    chips.out(0x40, 0xE8, 0x03)
    chips.fake.ns += ticks(5000)
    state = chips.save()
    with Chips(2) as other:
        other.restore(state)
        assert other.next() == 1
        other.at(1)
        assert other.take() == 0x40


def test_pit_watchdog_nmis(chips: Chips) -> None:
    chips.enable()
    chips.apic(0x350, 0x400)
    chips.out(0x43, 0x30)
    chips.out(0x40, 0xE8, 0x03)
    chips.at(ticks(1000))
    assert chips.attention() == NMI


# ---- GSIs, messages, irqfds ----


def test_routing(chips: Chips) -> None:
    chips.enable()
    chips.entry(7, 0x47)
    assert chips.route((30, 1, IOAPIC, 7), (30, 1, MASTER, 3), (31, 2, 0xFEE0_0000, 0x52)) == 0
    chips.line(30, 1)
    assert chips.chip(MASTER).irr == 1 << 3
    assert chips.line(31, 1) == 1
    assert chips.line(31, 0) == -1
    assert chips.line(4, 1) == -1  # no route any more
    pic_setup(chips)
    chips.out(0x21, 0xFF)
    assert [chips.serve(), chips.serve()] == [0x52, 0x47]
    assert chips.route((5, 1, SLAVE, 8)) == -errno.EINVAL
    assert chips.route((5, 1, IOAPIC, 24)) == -errno.EINVAL
    assert chips.route((5, 1, 3, 0)) == -errno.EINVAL
    assert chips.route((5, 3, 0, 0)) == -errno.EINVAL
    assert chips.route((4096, 1, MASTER, 0)) == -errno.EINVAL
    assert chips.route((5, 1, IOAPIC, 5), (5, 1, IOAPIC, 6)) == -errno.EINVAL
    assert chips.route((5, 2, 0, 0), (5, 1, IOAPIC, 6)) == -errno.EINVAL


def test_refusals(chips: Chips) -> None:
    assert chips.try_vm("CREATE_IRQCHIP")[0] == -errno.EEXIST
    assert chips.try_vm("CREATE_PIT2", "struct kvm_pit_config *")[0] == -errno.EEXIST
    bad = {"chip_id": 3}
    assert chips.try_vm("GET_IRQCHIP", "struct kvm_irqchip *", bad)[0] == -errno.EINVAL
    assert chips.try_vm("SIGNAL_MSI", "struct kvm_msi *", {"flags": 1})[0] == -errno.EINVAL
    assert chips.try_vm("SET_CLOCK", "struct kvm_clock_data *", {"flags": 1})[0] == -errno.EINVAL
    assert chips.try_vm("CREATE_VM")[0] == -errno.ENOTTY
    assert chips.irqfd(12345, 5) == -errno.EBADF
    with Path("/dev/null").open() as other:
        assert chips.irqfd(other.fileno(), 5) == -errno.EINVAL
    fd = os.eventfd(0)
    assert chips.irqfd(fd, 5, 8) == -errno.EINVAL
    assert chips.irqfd(fd, 4096) == -errno.EINVAL
    assert chips.irqfd(fd, 5) == 0
    same = os.dup(fd)
    assert chips.irqfd(same, 6) == -errno.EBUSY
    assert chips.irqfd(fd, 6, 1) == 0  # another GSI's: nothing to take back
    assert chips.irqfd(fd, 5) == -errno.EBUSY
    assert chips.irqfd(fd, 5, 1) == 0
    assert chips.irqfd(fd, 6) == 0
    os.close(fd)
    os.close(same)


@pytest.mark.parametrize("threadless", [False, True])
@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
def test_irqfd_is_in_what_is_read(threadless: bool, flags: int) -> None:
    """What was written before the state is read is in it, whoever was faster."""
    fd = os.eventfd(0, flags)
    with Chips(1, threadless=threadless) as c:
        c.enable()
        c.entry(20, 0x60)
        c.route((50, 2, 0xFEE0_0000, 0x81), (20, 1, IOAPIC, 20))
        assert c.irqfd(fd, 50) == 0
        for _ in range(300):
            os.eventfd_write(fd, 1)
            assert c.register(0x200 + 0x40) == 1 << 1
            assert c.take() == 0x81
            c.eoi()
        assert c.irqfd(fd, 50, 1) == 0
        os.eventfd_write(fd, 1)
        assert c.registers()[0x240:0x244] == bytes(4)
        assert c.irqfd(fd, 20) == 0  # what is in it already is heard
        assert c.register(0x200 + 0x30) == 1
        assert c.take() == 0x60
        os.eventfd_write(fd, 1)
        c.irqfd(fd, 20, 1)  # and what came before it is taken back
        assert c.register(0x200 + 0x30) == 1
        c.route((5, 1, MASTER, 5))
        assert c.irqfd(fd, 5) == 0
        os.eventfd_write(fd, 1)
        assert c.chip(MASTER).irr == 1 << 5
    os.close(fd)


def test_irqfd_thread_kicks_without_being_asked() -> None:
    fd = os.eventfd(0)
    with Chips(1, threadless=False) as c:
        c.enable()
        c.route((50, 2, 0xFEE0_0000, 0x81))
        c.irqfd(fd, 50)
        for _ in range(100):
            os.eventfd_write(fd, 1)
            until(lambda: c.attention() == INTERRUPT)
            assert c.take() == 0x81
            c.eoi()
    os.close(fd)


def test_resample_asks_after_each_end(chips: Chips) -> None:
    fd, again = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
    chips.enable()
    chips.entry(21, 0x61 | LEVEL)
    assert chips.irqfd(fd, 21, 2, again) == 0
    for _ in range(3):
        os.eventfd_write(fd, 1)
        chips.lib.soft_chips_sweep(chips.c)
        assert chips.take() == 0x61
        with pytest.raises(BlockingIOError):
            os.eventfd_read(again)
        chips.eoi()
        assert os.eventfd_read(again) == 1
        assert chips.attention() == 0
        assert chips.chip(IOAPIC).irr == 0
    os.eventfd_write(fd, 1)
    chips.lib.soft_chips_sweep(chips.c)
    assert chips.irqfd(fd, 21, 1) == 0
    assert chips.chip(IOAPIC).irr == 0  # nobody holds the line any more
    os.close(fd)
    os.close(again)


def test_resample_by_the_pic(chips: Chips) -> None:
    fd, again = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
    pic_setup(chips)
    chips.out(0x4D1, 1 << 2)
    assert chips.irqfd(fd, 10, 2, again) == 0
    os.eventfd_write(fd, 1)
    chips.lib.soft_chips_sweep(chips.c)
    assert chips.take() == 0x2A
    chips.out(0xA0, 0x20)
    assert os.eventfd_read(again) == 1
    assert chips.chip(SLAVE).irr == 0
    os.close(fd)
    os.close(again)


# ---- kvmclock ----


def clock_page(c: Chips, gpa: int) -> tuple[int, ...]:
    raw = bytes(c.ffi.buffer(c.ram))[gpa : gpa + 32]
    return struct.unpack("<IIQQIbBH", raw)


def clock_of(c: Chips, gpa: int, cpu: int = 0) -> int:
    """What a guest makes of its page."""
    version, _, tsc, ns, multiplier, shift, _, _ = clock_page(c, gpa)
    assert version % 2 == 0
    passed = c.lib.soft_chips_tsc(c.c, cpu) - tsc & (1 << 64) - 1
    passed = passed << shift if shift >= 0 else passed >> -shift
    return int(ns + (passed * multiplier >> 32) & (1 << 64) - 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 10**12), min_size=1, max_size=5),
    st.integers(0, (1 << 64) - 1),
    st.integers(1, 10**15),
)
def test_kvmclock_page_and_ioctl_agree(moments: list[int], offset: int, clock: int) -> None:
    with Chips(2) as c:
        for cpu in range(2):
            c.msr(0x4B56_4D01, 0x1000 + 64 * cpu | 1, cpu)
            c.lib.soft_chips_set_tsc(c.c, cpu, KHZ, offset)
        c.vm("SET_CLOCK", "struct kvm_clock_data *", {"clock": clock})
        assert c.attention() & TIMER
        now = 0
        for moment in sorted(moments):
            now = moment
            c.at(now)
            seen = c.vm("GET_CLOCK", "struct kvm_clock_data *").clock
            assert clock_of(c, 0x1000) == clock_of(c, 0x1040, 1) == seen
            assert abs(seen - clock - now) <= 2 + now // 10**8
        assert clock_page(c, 0x1000)[6] == 1


def test_kvmclock_flags_and_wall(chips: Chips) -> None:
    chips.msr(0x12, 0x1001)
    assert chips.msr(0x4B56_4D01) == 0x1001
    before = clock_page(chips, 0x1000)
    assert before[6] == 1
    chips.cpu(0, "KVMCLOCK_CTRL")
    chips.at(5)
    after = clock_page(chips, 0x1000)
    assert (after[0] - before[0], after[6]) == (2, 3)
    chips.lib.soft_chips_set_tsc(chips.c, 1, KHZ, 99)
    chips.at(6)
    assert clock_page(chips, 0x1000)[6] == 0  # the TSCs are not the same any more
    chips.at(3_000_000_000)
    chips.msr(0x4B56_4D00, 0x2000)
    version, seconds, ns = struct.unpack("<III", bytes(chips.ffi.buffer(chips.ram))[0x2000:0x200C])
    assert version % 2 == 0
    assert seconds * 10**9 + ns == 10**18
    request = chips.lib.KVM_KVMCLOCK_CTRL
    answer = chips.lib.soft_chips_cpu_ioctl(chips.c, 1, request, chips.ffi.NULL)
    assert answer == -errno.EINVAL  # its clock is off
    chips.msr(0x4B56_4D01, 1 << 40 | 1)  # no RAM is there
    clock = {"clock": 5 * 10**9, "flags": 4, "realtime": chips.fake.wall - 10**9}
    chips.vm("SET_CLOCK", "struct kvm_clock_data *", clock)
    assert chips.vm("GET_CLOCK", "struct kvm_clock_data *").clock == 6 * 10**9


# ---- state, at any moment ----

everything = st.lists(
    st.one_of(
        st.tuples(st.just("line"), st.integers(0, 23), st.integers(0, 1)),
        st.tuples(st.just("msi"), st.integers(0, 3), st.integers(0x30, 0xFF)),
        st.tuples(st.just("entry"), st.integers(0, 23), st.sampled_from(ENTRIES)),
        st.tuples(st.just("take"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("eoi"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("tpr"), st.integers(0, 1), st.integers(0, 255)),
        st.tuples(st.just("out"), st.sampled_from(PIC_PORTS), st.integers(0, 255)),
        st.tuples(st.just("out"), st.sampled_from([0x40, 0x42, 0x43, 0x61]), st.integers(0, 255)),
        st.tuples(st.just("in"), st.sampled_from([*PIC_PORTS, 0x40, 0x42, 0x61]), st.just(0)),
        st.tuples(st.just("timer"), st.integers(0, 1), st.sampled_from([0, 1 << 17, 2 << 17])),
        st.tuples(st.just("count"), st.integers(0, 1), st.integers(200_000, 3_000_000)),
        st.tuples(st.just("deadline"), st.integers(0, 1), st.integers(1, 4_000_000)),
        st.tuples(st.just("wait"), st.just(0), st.integers(0, 3_000_000)),
    ),
    max_size=40,
)  # fmt: skip


def step(c: Chips, kind: str, a: int, b: int) -> object:
    cpu = a & 1
    if kind == "line":
        return c.line(a, b)
    if kind == "msi":
        return c.msi(a, b)
    if kind == "entry":
        return c.entry(a, 0x30 + 4 * a | b)
    if kind == "take":
        return c.take(cpu)
    if kind == "eoi":
        return c.apic(0xB0, 0, cpu)
    if kind == "tpr":
        return c.apic(0x80, b, cpu)
    if kind == "in":
        return c.inp(a) & (0xEF if a == 0x61 else 0xFF)
    if kind == "timer":
        return c.apic(0x320, 0xEE | b, cpu)
    if kind == "count":
        return c.apic(0x380, b, cpu)
    if kind == "deadline":
        return c.msr(0x6E0, c.lib.soft_chips_tsc(c.c, cpu) + b, cpu)
    if kind == "out":
        c.out(a, b)
    else:
        c.at(c.fake.ns - 10**12 + b)
    return None


def look(c: Chips) -> object:
    """All that can be seen, but for what KVM's own formats round."""
    c.lib.soft_chips_run_timers(c.c)
    state = c.save()
    return [
        [c.attention(cpu) for cpu in range(c.cpus)],
        [(cpu["base"], cpu["lapic"], cpu["deadline"]) for cpu in state["cpus"]],
        state["chips"],
        state["pit"],
    ]


@settings(max_examples=250, deadline=None)
@given(everything, everything, st.booleans())
def test_state_goes_over_at_any_moment(
    before: list[tuple[str, int, int]], after: list[tuple[str, int, int]], x2: bool
) -> None:
    with Chips(2) as c, Chips(2) as copy:
        for cpu in range(2):
            c.enable(cpu, x2)
            c.apic(0x3E0, 0b1011, cpu)
            c.apic(0x350, 0x700, cpu)
        for one in before:
            step(c, *one)
        c.lib.soft_chips_run_timers(c.c)
        copy.fake.ns, copy.fake.tsc = c.fake.ns, c.fake.tsc
        copy.restore(c.save())
        # A line that is high is its device's to raise again, as with KVM.
        for gsi in range(24):
            c.line(gsi, 0)
            copy.line(gsi, 0)
        assert look(copy) == look(c)
        for one in after:
            assert step(copy, *one) == step(c, *one)
            assert look(copy) == look(c)


# ---- threads ----


def until(condition: Any, seconds: float = 20) -> None:
    """Wait, by the condition alone; the limit is for a test that fails."""
    ends = threading.Event()
    for _ in range(int(seconds * 1000)):
        if condition():
            return
        ends.wait(0.001)
    raise AssertionError("it did not come")


def test_timers_are_told_of_on_a_real_clock() -> None:
    with Chips(1, real=True, threadless=False) as c:
        c.enable()
        c.apic(0x320, 0x61 | 2 << 17)
        for _ in range(20):
            c.fake.kicks = 0
            c.msr(0x6E0, c.lib.soft_chips_tsc(c.c, 0) + 2_000_000)
            until(lambda: c.attention() & TIMER)
            assert c.fake.kicks == 1
            assert c.attention() == TIMER  # nothing has changed yet
            c.lib.soft_chips_run_timers(c.c)
            assert c.attention() == INTERRUPT
            assert c.take() == 0x61
            c.eoi()
        c.apic(0x320, 0x62 | 1 << 17)
        c.apic(0x3E0, 0b1011)
        c.apic(0x380, 1_000_000)
        for _ in range(20):
            until(lambda: c.attention() & TIMER)
            c.lib.soft_chips_run_timers(c.c)
            until(lambda: c.take() == 0x62)
            c.eoi()


def test_a_timer_that_nobody_runs_does_not_keep_the_thread_busy() -> None:
    def ran() -> float:
        words = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    before = {task.name for task in Path("/proc/self/task").iterdir()}
    with Chips(1, real=True, threadless=False) as c:
        (thread,) = {task.name for task in Path("/proc/self/task").iterdir()} - before
        c.enable()
        c.apic(0x320, 0x61 | 1 << 17)
        c.apic(0x380, 500_000)
        until(lambda: c.attention() & TIMER)
        was = ran()
        threading.Event().wait(0.1)
        c.msi(0, 0x55)  # something else goes on
        threading.Event().wait(0.2)
        assert ran() - was < 0.1


def test_many_threads_lose_nothing() -> None:
    """Each sender raises its vector and waits until it was taken, over and over."""
    rounds, senders = 400, 4
    fds = [os.eventfd(0) for _ in range(senders)]
    with Chips(2, threadless=False) as c:
        for cpu in range(2):
            c.enable(cpu)
        c.route(*[(64 + i, 2, 0xFEE0_0000 | (i & 1) << 12, 0x50 + 16 * i) for i in range(senders)])
        for i, fd in enumerate(fds):
            c.irqfd(fd, 64 + i)
        taken = [threading.Semaphore(0) for _ in range(2 * senders)]
        stop = threading.Event()
        counts = [0] * (2 * senders)
        failures: list[BaseException] = []

        def serve(cpu: int) -> None:
            with reported(failures, stop):
                while not stop.is_set():
                    vector = c.take(cpu)
                    if vector < 0:
                        continue
                    which = (
                        (vector - 0x50) // 16
                        if vector & 1 == 0
                        else senders + (vector - 0x51) // 16
                    )
                    counts[which] += 1
                    c.eoi(cpu)
                    taken[which].release()

        def send(i: int) -> None:
            with reported(failures, stop):
                for _ in range(rounds):
                    if i < senders:
                        os.eventfd_write(fds[i], 1)
                    else:
                        c.msi(i & 1, 0x51 + 16 * (i - senders))
                    assert taken[i].acquire(timeout=30)

        def disturb() -> None:
            with reported(failures, stop):
                fd = os.eventfd(0)
                while not stop.is_set():
                    c.registers(0)
                    c.chip(IOAPIC)
                    assert c.irqfd(fd, 70) == 0
                    assert c.irqfd(fd, 70, 1) == 0
                    c.line(9, 1)
                    c.line(9, 0)
                os.close(fd)

        servers = [threading.Thread(target=serve, args=(cpu,)) for cpu in range(2)]
        servers.append(threading.Thread(target=disturb))
        clients = [threading.Thread(target=send, args=(i,)) for i in range(2 * senders)]
        for thread in servers + clients:
            thread.start()
        for thread in clients:
            thread.join()
        stop.set()
        for thread in servers:
            thread.join()
    for fd in fds:
        os.close(fd)
    assert not failures
    assert counts == [rounds] * (2 * senders)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_all_entries_at_once_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    here = Path(__file__).parent
    program = tmp_path / "chips_threads"
    build = ["cc", "-std=gnu11", "-g", "-O1", f"-fsanitize={sanitizer}", f"-I{FOLDER}"]
    sources = [here / "chips_threads.c", *sorted(FOLDER.glob("*.c"))]
    command = [*build, *map(str, sources), "-o", str(program), "-lpthread"]
    built = subprocess.run(command, capture_output=True, check=False)
    if built.returncode:
        pytest.skip(f"this compiler has no -fsanitize={sanitizer}")
    ran = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "done\n", "")


@contextlib.contextmanager
def reported(failures: list[BaseException], stop: threading.Event) -> Iterator[None]:
    try:
        yield
    except BaseException as failure:
        failures.append(failure)
        stop.set()


def test_the_thread_ends_with_the_vm() -> None:
    """Linux lists a thread for a moment longer than pthread_join waits for it."""
    files, running = entries("/proc/self/fd"), threads()
    fd = os.eventfd(0)
    for _ in range(20):
        with Chips(1, real=True, threadless=False) as c:
            assert c.irqfd(fd, 5) == 0
            until(lambda: threads() == running + 1)
        until(lambda: threads() == running)
    os.close(fd)
    assert entries("/proc/self/fd") == files


def threads() -> int:
    return entries("/proc/self/task")


def entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


# ---- beside this host's KVM ----


class Kvm:
    """A VM of this host's KVM: only its chips, no guest."""

    def __init__(self, cpus: int) -> None:
        self.ffi, self.lib = module().ffi, module().lib
        self.fds = [os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)]
        self.vm_fd = self.ask(self.fds[0], "CREATE_VM", 0)
        self.fds.append(self.vm_fd)
        self.ask(self.vm_fd, "CREATE_IRQCHIP", 0)
        self.ask(self.vm_fd, "CREATE_PIT2", self.ffi.new("struct kvm_pit_config *", {"flags": 1}))
        self.vcpus = [self.ask(self.vm_fd, "CREATE_VCPU", i) for i in range(cpus)]
        self.fds += self.vcpus

    def try_ask(self, fd: int, name: str, argument: Any) -> int:
        pointer = self.ffi.cast("void *", argument) if isinstance(argument, int) else argument
        return int(self.lib.sys_ioctl(fd, getattr(self.lib, f"KVM_{name}"), pointer))

    def ask(self, fd: int, name: str, argument: Any) -> int:
        answer = self.try_ask(fd, name, argument)
        if answer < 0:
            raise OSError(-answer, name)
        return answer

    def close(self) -> None:
        for fd in reversed(self.fds):
            os.close(fd)


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    try:
        made = Kvm(3)
    except OSError as error:
        pytest.skip(f"this host's KVM makes no VM with chips: {error}")
    yield made
    made.close()


def both(c: Chips, kvm: Kvm, cpu: int | None, name: str, argument: Any) -> list[int]:
    """Make one request of both."""
    ffi = c.ffi
    fd = kvm.vm_fd if cpu is None else kvm.vcpus[cpu]
    theirs = kvm.try_ask(fd, name, argument)
    request = getattr(c.lib, f"KVM_{name}")
    pointer = ffi.cast("void *", argument) if isinstance(argument, int) else argument
    if cpu is None:
        ours = c.lib.soft_chips_vm_ioctl(c.c, request, pointer)
    else:
        ours = c.lib.soft_chips_cpu_ioctl(c.c, cpu, request, pointer)
    return [ours, theirs]


def states(c: Chips, kvm: Kvm) -> list[list[Any]]:
    """(ours, KVM's) of all chips, without what is only a matter of time."""
    ffi = c.ffi
    answer: list[list[Any]] = [[], []]
    for chip in (MASTER, SLAVE, IOAPIC):
        for side, values in enumerate(answer):
            state = ffi.new("struct kvm_irqchip *", {"chip_id": chip})
            if side:
                kvm.ask(kvm.vm_fd, "GET_IRQCHIP", state)
            else:
                c.vm("GET_IRQCHIP", "struct kvm_irqchip *", state)
            kind = state.chip.ioapic if chip == IOAPIC else state.chip.pic
            values.append(bytes(ffi.buffer(ffi.addressof(kind))).hex())
    for cpu in range(len(kvm.vcpus)):
        for side, values in enumerate(answer):
            state = ffi.new("struct kvm_lapic_state *")
            if side:
                kvm.ask(kvm.vcpus[cpu], "GET_LAPIC", state)
            else:
                c.cpu(cpu, "GET_LAPIC", "struct kvm_lapic_state *", state)
            raw = bytearray(ffi.buffer(state))
            raw[0x390:0x394] = bytes(4)
            values.append(
                {at: raw[at : at + 4].hex() for at in range(0, 0x400, 16) if any(raw[at : at + 4])}
            )
    return answer


def test_fresh_chips_are_as_kvms(kvm: Kvm) -> None:
    with Chips(3) as c:
        ours, theirs = states(c, kvm)
        assert ours == theirs
        pits = [c.ffi.new("struct kvm_pit_state2 *") for _ in range(2)]
        c.vm("GET_PIT2", "struct kvm_pit_state2 *", pits[0])
        kvm.ask(kvm.vm_fd, "GET_PIT2", pits[1])
        for pit in pits:
            for channel in pit.channels:
                channel.count_load_time = 0
        assert bytes(c.ffi.buffer(pits[0])) == bytes(c.ffi.buffer(pits[1]))


@pytest.mark.parametrize("seed", range(60))
def test_the_same_requests_have_the_same_effect_on_kvm(kvm: Kvm, seed: int) -> None:
    """Lines, messages, loaded chips, routing: after each request the whole state is the same."""
    draw = random.Random(seed)
    with Chips(3) as c:
        ffi = c.ffi
        cluster = draw.random() < 0.3
        # KVM drops what goes to the lowest priority, if it would choose a CPU that is not there.
        lowest = draw.random() < 0.7
        for cpu in range(3):  # a guest's set-up, as a loaded state
            lapic = ffi.new("struct kvm_lapic_state *")
            c.cpu(cpu, "GET_LAPIC", "struct kvm_lapic_state *", lapic)
            put(ffi, lapic, 0xF0, 0x1FF if lowest or draw.random() < 0.6 else 0xFF)
            put(ffi, lapic, 0xE0, 0x0FFF_FFFF if cluster else 0xFFFF_FFFF)
            put(ffi, lapic, 0xD0, (0x10 * cluster | 1 << cpu) << 24)
            put(ffi, lapic, 0x80, draw.choice([0, 0x40, 0xFF]))
            put(ffi, lapic, 0x320, 0x1_0000)
            assert both(c, kvm, cpu, "SET_LAPIC", lapic) == [0, 0]
        history = []
        for _ in range(60):
            request, argument, text = draw_request(ffi, draw, cluster, lowest)
            history.append(text)
            ours, theirs = both(c, kvm, None, request, argument)
            if request == "SIGNAL_MSI":
                theirs = max(theirs, 0)  # KVM says 0 or -1 if nobody took it
            assert ours == theirs, history
            left, right = states(c, kvm)
            assert left == right, history


def put(ffi: Any, lapic: Any, at: int, value: int) -> None:
    ffi.buffer(lapic)[at : at + 4] = value.to_bytes(4, "little")


def draw_request(
    ffi: Any, draw: random.Random, cluster: bool, lowest: bool
) -> tuple[str, Any, object]:
    dests = [0x11, 0x13, 0x17] if cluster else [1, 2, 3, 5, 7]
    if not lowest:
        dests += [0, 0x11, 0x13, 3, 0xFF]
    kind = draw.choice(["line", "line", "line", "msi", "msi", "pic", "ioapic", "route"])
    if kind == "line":
        gsi, level = draw.randrange(26), draw.randrange(2)
        return (
            "IRQ_LINE",
            ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": level}),
            (gsi, level),
        )
    if kind == "msi":
        physical = draw.random() < 0.5
        dest = draw.choice([0, 1, 2, 3, 0xFF] if physical else dests)
        address = (
            0xFEE0_0000 | dest << 12 | 4 * (not physical) | 8 * (lowest and draw.randrange(2))
        )
        data = (
            draw.randrange(0x30, 0x100)
            | draw.choice([0, 0, 0, lowest]) << 8
            | draw.choice([0, 0, 0xC000])
        )
        value = ffi.new("struct kvm_msi *", {"address_lo": address, "data": data})
        return "SIGNAL_MSI", value, (hex(address), hex(data))
    if kind == "pic":
        chip = draw.randrange(2)
        state = ffi.new("struct kvm_irqchip *", {"chip_id": chip})
        pic = state.chip.pic
        for name in ("irr", "isr", "imr", "last_irr"):
            setattr(pic, name, draw.randrange(256) & draw.randrange(256))
        pic.irq_base, pic.priority_add = 0x20 + 8 * chip, draw.randrange(8)
        pic.elcr_mask = (0xF8, 0xDE)[chip]
        pic.elcr = draw.randrange(256) & pic.elcr_mask
        return "SET_IRQCHIP", state, ("pic", chip, bytes(ffi.buffer(ffi.addressof(pic))).hex())
    if kind == "ioapic":
        state = ffi.new("struct kvm_irqchip *", {"chip_id": IOAPIC})
        chip = state.chip.ioapic
        chip.base_address = 0xFEC0_0000
        chip.irr = draw.randrange(1 << 24) & draw.randrange(1 << 24)
        for pin in range(24):
            physical = draw.random() < 0.5
            dest = draw.choice([0, 1, 2, 3, 0xFF] if physical else dests)
            level = draw.choice([0, LEVEL])
            bits = (
                0x30 + 8 * pin | level | draw.choice([0, 0, MASKED]) | (0 if physical else LOGICAL)
            )
            if level:
                bits |= draw.choice([0, 0, 1 << 14])
            chip.redirtbl[pin].bits = bits | draw.choice([0, 0, lowest]) << 8 | dest << 56
        return "SET_IRQCHIP", state, ("ioapic", bytes(ffi.buffer(ffi.addressof(chip))).hex())
    count = draw.randrange(30)
    table = ffi.new("struct kvm_irq_routing *", {"nr": count, "entries": count})
    for entry in table.entries[0:count]:
        entry.gsi, entry.type = draw.randrange(200), draw.choice([1, 1, 1, 2])
        if entry.type == 1:
            entry.gsi = draw.randrange(26)
            entry.u.irqchip.irqchip, entry.u.irqchip.pin = draw.randrange(3), draw.randrange(8)
        else:
            entry.u.msi.address_lo, entry.u.msi.data = 0xFEE0_0000, draw.randrange(0x30, 0x100)
    return "SET_GSI_ROUTING", table, ("route", bytes(ffi.buffer(table)).hex())
