"""The MP table tells a guest without ACPI which CPUs there are and where interrupts go.

Intel MultiProcessor Specification 1.4 (order number 242016-006), sections 4.1 to 4.3. The table
describes what KVM's in-kernel interrupt controllers form: one IOAPIC with 24 pins, and every
interrupt line *n* on pin *n*. That is KVM's default routing (arch/x86/kvm/irq.c,
`default_routing`). A PC has IRQ 0 on pin 2, and QEMU re-routes KVM for that; whoever re-routes
here must change this table too.

ISA has only 16 lines. The entries still go up to 23, as Firecracker's do, because a guest has no
other way to find the pin of a virtio-mmio device's IRQ.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Final

from avmm.arch.x86_64 import layout
from avmm.errors import ConfigError

MAX_CPUS: Final = 254
"""An APIC ID has 8 bits, 255 addresses all CPUs, and the IOAPIC needs an ID of its own."""
IRQ_PINS: Final = 24
"""The pins of KVM's IOAPIC."""

_SPEC_REVISION: Final = 4  # 1.4
_PROCESSOR, _BUS, _IOAPIC, _INTERRUPT, _LOCAL_INTERRUPT = range(5)
_ENABLED, _BSP = 1, 2
_LAPIC_VERSION: Final = 0x14
_IOAPIC_VERSION: Final = 0x11
_SIGNATURE: Final = 0x600
"""Table 4-4: a family 6 processor; guests read CPUID instead."""
_FEATURES: Final = 1 << 9 | 1 << 0
"""Table 4-6: it has an APIC and an FPU."""
_ISA_BUS: Final = 0
_INT, _NMI, _EXTINT = 0, 1, 3
"""Table 4-10. The flags after the type are 0, which means that polarity and trigger conform to the
bus.
"""
_CONFORMS: Final = 0
_ACTIVE_HIGH_LEVEL: Final = 1 << 0 | 3 << 2
"""Table 4-10: the flags, polarity and trigger."""
_ALL_LAPICS: Final = 0xFF


def _checksummed(data: bytearray, at: int) -> bytes:
    """Set the byte `at` so that all bytes add up to 0 modulo 256."""
    data[at] = 0
    data[at] = -sum(data) & 0xFF
    return bytes(data)


def _entries(cpus: int, levels: Collection[int]) -> list[bytes]:
    """The base table's entries; section 4.3 wants them in ascending order of type."""
    ioapic_id = cpus  # the first APIC ID that no CPU has
    entries = [
        struct.pack(
            "<BBBBII8x",
            _PROCESSOR,
            apic_id,
            _LAPIC_VERSION,
            _ENABLED | (_BSP if apic_id == 0 else 0),
            _SIGNATURE,
            _FEATURES,
        )
        for apic_id in range(cpus)
    ]
    entries.append(struct.pack("<BB6s", _BUS, _ISA_BUS, b"ISA   "))
    entries.append(
        struct.pack("<BBBBI", _IOAPIC, ioapic_id, _IOAPIC_VERSION, _ENABLED, layout.IOAPIC)
    )
    entries += [
        struct.pack(
            "<BBHBBBB",
            *(_INTERRUPT, _INT, _ACTIVE_HIGH_LEVEL if irq in levels else _CONFORMS),
            *(_ISA_BUS, irq, ioapic_id, irq),
        )
        for irq in range(IRQ_PINS)
    ]
    # The local inputs of KVM's LAPICs after a reset: the 8259 on LINT0 of the BSP (virtual wire
    # mode), and the NMI on LINT1 of all.
    entries += [
        struct.pack("<BBHBBBB", _LOCAL_INTERRUPT, _EXTINT, 0, _ISA_BUS, 0, 0, 0),
        struct.pack("<BBHBBBB", _LOCAL_INTERRUPT, _NMI, 0, _ISA_BUS, 0, _ALL_LAPICS, 1),
    ]
    return entries


def mp_table(
    cpus: int, base: int = layout.MP_FLOATING_POINTER, levels: Collection[int] = ()
) -> bytes:
    """The floating pointer structure for `base` (16-byte aligned), with the table right behind it.
    The interrupts `levels` are level-triggered.

    Raises `ConfigError` if an MP table cannot describe that many CPUs.
    """
    if not 1 <= cpus <= MAX_CPUS:
        raise ConfigError(f"{cpus} CPUs: expected 1 to {MAX_CPUS}")
    pointer = struct.pack("<4sIBBBB4x", b"_MP_", base + 16, 1, _SPEC_REVISION, 0, 0)
    entries = _entries(cpus, levels)
    body = b"".join(entries)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBx",
        b"PCMP",
        44 + len(body),
        _SPEC_REVISION,
        0,  # checksum
        b"AVMM    ",
        b"avmm        ",
        0,  # no OEM table
        0,
        len(entries),
        layout.LAPIC,
        0,  # no extended entries: length and checksum 0
        0,
    )
    return _checksummed(bytearray(pointer), 10) + _checksummed(bytearray(header + body), 7)
