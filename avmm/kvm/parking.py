"""Python's side of the parking lot (parking.h): where a paused machine's vCPUs stand."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from avmm.forks import closed_in_child
from avmm.kvm._kvm import ffi, lib
from avmm.kvm.bridge import Bridge, eventfd
from avmm.kvm.claims import DeviceClaims
from avmm.kvm.errors import KvmError
from avmm.kvm.kick import accept_kicks, install_kick
from avmm.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from avmm.kvm import _kvm


SERVED: Final = lib.AVMM_SERVED
"""Instead of an exit reason: the exit is served, by C or by the vCPU's task."""


class Spot:
    """One vCPU's place. Any thread may use `stop`, `stopping` and `is_parked`; everything else is
    for the vCPU's own thread."""

    def __init__(self, lot: ParkingLot, struct: _kvm.AvmmSpotPointer) -> None:
        self._lot = lot  # which owns the memory of `struct`
        self._struct = struct
        self.asked = False
        """Are the vCPUs to be parked now? The lot writes it, so that no exit pays for a call."""
        self.stopping = False
        """Is the vCPU to end?"""
        self.run: Callable[[], int] = partial(lib.avmm_spot_run, struct)
        """KVM_RUN without the GIL. Returns the exit reason, or -errno: -EINTR if it was
        interrupted, and the thread has to find out why.

        If the vCPU is asked to park while it has nothing in hand, it parks inside this call. If it
        is stopped there, the result is -ECANCELED. After `hand_over_to`, it may be `SERVED`."""
        self._claims: DeviceClaims | None = None

    def hand_over_to(self, bridge: Bridge, claims: DeviceClaims) -> None:
        """From now on, `run` serves the exits that `claims` names without coming back: in C, or
        by the bridge's task. It returns `SERVED` if somebody wants something of the vCPU then."""
        self._claims = claims
        self._struct.claims = claims.struct
        self._struct.bridge = bridge.struct

    @property
    def is_parked(self) -> bool:
        """Has it parked since the vCPUs were last asked to park, or has it ended?"""
        return bool(lib.avmm_spot_is_parked(self._struct))

    def enter(self) -> None:
        """Make the calling thread the vCPU's thread, which gets its kicks."""
        accept_kicks()
        lib.avmm_spot_enter(self._struct)

    def park(self) -> None:
        """Stand still until the vCPUs are released or this one is stopped.

        Returns at once if the request to park has been taken back. The vCPU must be drained.
        """
        lib.avmm_spot_park(self._struct)

    def leave(self) -> None:
        """Say that the vCPU never runs again: nobody waits for it or kicks its thread.
        Idempotent."""
        lib.avmm_spot_leave(self._struct)

    def stop(self) -> None:
        """Make `run` return a negative number, now or as soon as it is called, parked or not."""
        self.stopping = True
        if (answer := lib.avmm_spot_stop(self._struct)) < 0:
            raise KvmError("tgkill", -answer)


class ParkingLot:
    """The places of all vCPUs of a machine. One task may use it. Raises `KvmError`."""

    def __init__(self, vcpus: Sequence[Vcpu], always: bool = False) -> None:
        """With `always`, even an interrupted `KVM_RUN` is completed, although it leaves nothing
        pending."""
        install_kick()
        self.bell = eventfd()
        closed_in_child(self, ParkingLot.close)
        """Readable when all have parked while the task slept."""
        self.asked = False
        """Are the vCPUs to be parked now?"""
        places: list[_kvm.AvmmSpotInit] = [
            {"fd": vcpu.fd, "run": vcpu.page.struct} for vcpu in vcpus
        ]
        self._spots = ffi.new("struct avmm_spot[]", places)
        self._struct = ffi.new(
            "struct avmm_lot *",
            {"bell": self.bell, "always": always, "count": len(places), "spots": self._spots},
        )
        lib.avmm_lot_init(self._struct)
        self.spots = [Spot(self, ffi.addressof(self._spots, at)) for at in range(len(places))]

    def ask(self) -> None:
        """Ask all vCPUs to park."""
        self._set_asked(True)
        if (answer := lib.avmm_lot_ask(self._struct)) < 0:
            raise KvmError("tgkill", -answer)

    def release(self) -> None:
        """Let all vCPUs run on, whether they have parked or not."""
        self._set_asked(False)
        lib.avmm_lot_release(self._struct)

    def _set_asked(self, asked: bool) -> None:
        self.asked = asked
        for spot in self.spots:
            spot.asked = asked

    def poll(self, linger: bool) -> bool:
        """Have all parked? If not, the caller waits until `bell` is readable, and then calls
        `woken`.

        With `linger` this blocks, without the GIL, for up to some tenths of a millisecond. That is
        how long vCPUs with nothing in hand take to park.
        """
        return bool(lib.avmm_lot_poll(self._struct, linger))

    def woken(self) -> None:
        """Say that the task no longer waits for the bell, whether it rang or not."""
        lib.avmm_lot_woken(self._struct)

    def close(self) -> None:
        """Close the bell, after all have left; idempotent."""
        if self.bell >= 0:
            os.close(self.bell)
            self.bell = -1
