"""The power button: asks a guest to shut down.

ACPI's button on hardware-reduced machines is a device, and a generic event device tells the guest
by an interrupt that it was pressed (ACPI 6.5, 4.8.2.2.1.2 and 5.6.9). A guest that does not read
ACPI's tables may have a driver for the keyboard: it gets Ctrl-Alt-Del.

Pressing a button that nobody listens to would be in vain, and whoever presses it would wait. A
guest that listens has unmasked the interrupt. The reverse does not hold: a Linux that reads ACPI's
tables unmasks it even if it has no driver for the button, or nothing in user space that reacts.
"""

from __future__ import annotations

from typing import Final

from avmm.arch.x86_64 import aml, ioapic
from avmm.arch.x86_64.kvm import X86Vm
from avmm.devices.pc.i8042 import I8042
from avmm.kvm import constants

GSI: Final = 8
"""The interrupt. On a PC it is the clock's, which has none here."""
KEYBOARD_IRQ: Final = 1
_PRESSED: Final = 0x80
_PIC_IMR, _PIC_BASE = 8 + 2, 8 + 5
"""Offsets in `struct kvm_irqchip`, whose part for a PIC is `struct kvm_pic_state`."""


def press(vm: X86Vm, keyboard: I8042, *, has_acpi: bool) -> bool:
    """Press it. Returns False if the guest cannot notice. Without ACPI the button's interrupt is
    the clock's, and a guest may listen to that."""
    pins = ioapic.pins(vm)
    if has_acpi and not pins[GSI].is_masked:
        vm.irq_line(GSI, True)
        vm.irq_line(GSI, False)
        return True
    if keyboard.hears_keys and (not pins[KEYBOARD_IRQ].is_masked or _pic_listens(vm)):
        keyboard.press_ctrl_alt_del()
        return True
    return False


def _pic_listens(vm: X86Vm) -> bool:
    """Does the guest take the keyboard's interrupt from the PIC? A PIC that was never set up has
    no vectors."""
    pic = vm.irqchip(constants.KVM_IRQCHIP_PIC_MASTER)
    return bool(pic[_PIC_BASE]) and not pic[_PIC_IMR] & 1 << KEYBOARD_IRQ


def devices() -> bytes:
    """The button and its event device for the DSDT's scope `\\_SB`."""
    button = aml.name("_HID", aml.eisa_id("PNP0C0C")) + aml.name("_UID", aml.integer(0))
    return aml.device("PWRB", button) + aml.event_device("GEDB", 1, GSI, "PWRB", _PRESSED)
