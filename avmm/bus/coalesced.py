"""Coalesced writes: out of the kernel's ring, to their devices, in order.

A write to a coalesced region does not leave the guest: KVM appends it to one ring for the whole
VM and lets the vCPU run on (Documentation/virt/kvm/api.rst, KVM_REGISTER_COALESCED_MMIO). So
whatever exits next may come after such writes, of any vCPU, and they must reach their devices
first. And no exit tells of the last ones: a pause has to look for them.

Two steps keep that order without a lock that devices share. Whoever finds writes in the ring moves
them to queues, one for each device (`avmm.bus.space.PostedWrites`), under a lock of the ring's
own, in which no handler runs. A write leaves the ring only when it is in its queue, and its queue
only when the device has had it, so that where both are empty all have had theirs. A device's queue
is emptied under the device's lock: by the same thread as its next step, or by any access to the
device that comes before. Where a device raises, what is left in its queue stays there for whoever
comes next, and the other devices get theirs all the same: writes are missing from no state because
of another device.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from avmm.bus.space import Bus, PostedWrites
from avmm.kvm.ring import WriteRing


class CoalescedWrites:
    """The ring of one VM and where its writes go. Any thread."""

    def __init__(
        self, ring: WriteRing, buses: Mapping[bool, Bus], posted: Sequence[PostedWrites]
    ) -> None:
        """`buses`: for port I/O (True) and for memory (False)."""
        self._ring = ring
        self._buses = buses
        self._posted = posted
        self._queues = tuple(one.queue for one in posted)
        self._moving = threading.Lock()

    def late(self) -> str:
        """Which device has not had what it was to, in words; empty where there is none."""
        return next(filter(None, (posted.late() for posted in self._posted)), "")

    def deliver(self) -> None:
        """Let the devices have all writes that the guest has made until now.

        Raises what the first of the devices to raise does, after all have had theirs; and
        `DeviceError` where one answers with an awaitable.
        """
        # In this order: what leaves the ring is in its queue by then.
        if self._ring.is_empty and not any(self._queues):
            return
        with self._moving:
            for is_port, address, size, value in self._ring:
                self._buses[is_port].post(address, size, value)
        first: Exception | None = None
        for posted in self._posted:
            try:
                posted.deliver()
            except Exception as error:  # whatever it is, the others get theirs
                if first is None:
                    first = error
                else:
                    first.add_note(f"and another device: {error!r}")
        if first is not None:
            raise first
