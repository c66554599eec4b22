"""Coalesced writes: taken out of the kernel's ring and delivered to their devices, in order.

A write to a coalesced region does not leave the guest: KVM appends it to one ring for the whole VM
and lets the vCPU run on (Documentation/virt/kvm/api.rst, KVM_REGISTER_COALESCED_MMIO). So when any
vCPU exits, it or another vCPU may have made such writes before, and these must reach their devices
first. The last writes may be followed by no exit, so a pause has to look for them.

Two steps keep that order without a lock that all devices share. Whoever finds writes in the ring
moves them to queues, one for each device (`avmm.bus.space.PostedWrites`), under a lock of the
ring's own, in which no handler runs. A write leaves the ring only after it is in its queue, and
leaves its queue only after the device has had it. So when both are empty, every device has had all
its writes. A device's queue is emptied under the device's lock. The same thread does that as its
second step, unless an access to the device does it before. If a device raises, the rest of its
queue stays there for the next thread that looks, and the other devices still get their writes. So
one device's error never makes another device's state incomplete.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from avmm.bus.space import Bus, PostedWrites
from avmm.kvm.ring import WriteRing


class CoalescedWrites:
    """The ring of one VM and where its writes go. Any thread may use it."""

    def __init__(
        self, ring: WriteRing, buses: Mapping[bool, Bus], posted: Sequence[PostedWrites]
    ) -> None:
        """`buses` holds the bus for port I/O (True) and the one for memory (False)."""
        self._ring = ring
        self._buses = buses
        self._posted = posted
        self._queues = tuple(one.queue for one in posted)
        self._moving = threading.Lock()

    def late(self) -> str:
        """Which device has not had its writes yet, in words. Empty if every device has."""
        return next(filter(None, (posted.late() for posted in self._posted)), "")

    def deliver(self) -> None:
        """Deliver all writes that the guest has made until now.

        If devices raise, this raises the first error, after all devices have had their writes.
        Raises `DeviceError` if a device answers with an awaitable.
        """
        # The ring is looked at first: a write that has left it is in its queue by then.
        if self._ring.is_empty and not any(self._queues):
            return
        with self._moving:
            for is_port, address, size, value in self._ring:
                self._buses[is_port].post(address, size, value)
        first: Exception | None = None
        for posted in self._posted:
            try:
                posted.deliver()
            except Exception as error:  # of any kind, so that other devices get their writes
                if first is None:
                    first = error
                else:
                    first.add_note(f"and another device: {error!r}")
        if first is not None:
            raise first
