"""How a guest's accesses reach devices, and how devices reach the guest.

Address spaces and who answers where (`space`), writes that KVM collects (`coalesced`), interrupts,
doorbells and wake-ups.
"""

from avmm.bus.space import Bus, Placement, mmio, msr, pio

__all__ = ["Bus", "Placement", "mmio", "msr", "pio"]
