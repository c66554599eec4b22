"""The model's parking lot: the contract of avmm/kvm/parking.h, one lock and no shortcut.

A real spot's `run` may park by itself, in C; the model's never does, so that all that a loop
can be at when it is asked goes by production's Python. (The C is tested by test_parking.py.)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from avmm.kvm import constants
from avmm.kvm.bridge import Bridge, eventfd
from avmm.kvm.parking import SERVED
from model.vcpu import ModelVcpu

WATCHDOG: Final = 20.0


class ModelSpot:
    """One vCPU's place; the face of `avmm.kvm.parking.Spot`."""

    def __init__(self, lot: ModelLot, model: ModelVcpu) -> None:
        self.runs = False
        """Is it in `KVM_RUN`, or about to be? Then a kick is worth a signal."""
        self.model = model
        self.gone = False
        self.standing = False
        """Does its thread stand in the lot now?"""
        self.on_standing: Callable[[], None] = lambda: None
        """The tests': called when `standing` has changed."""
        self._lot = lot
        self._parked = 0
        self.stopping = False
        self._bridge: Bridge | None = None
        model.wanted = lambda: lot.asked or self.stopping

    @property
    def asked(self) -> bool:
        return self._lot.asked

    @property
    def is_parked(self) -> bool:
        return self.gone or self._parked == self._lot.round

    def enter(self) -> None:
        pass

    def hand_over_to(self, bridge: Bridge, claims: object) -> None:
        """MMIO exits are handed to the task."""
        self._bridge = bridge

    def run(self) -> int:
        while True:
            self.runs = True
            try:
                answer = self.model.run()
            finally:
                self.runs = False
            if self._bridge is None or answer != constants.KVM_EXIT_MMIO:
                return answer
            self._bridge.call(handed=True)
            if self.model.page.immediate_exit or self.stopping:
                return SERVED

    def park(self) -> None:
        self.model.rest()
        lot = self._lot
        with lot.changed:
            number = lot.round
            if not lot.asked or self.stopping:
                return
            self._parked = number
            lot.ring_if_complete()
            self._stand(True)
            done = lot.changed.wait_for(lambda: not self.standing, timeout=WATCHDOG)
        if not done:
            raise RuntimeError("nobody let the vCPU leave the lot")

    def _stand(self, standing: bool) -> None:
        """Said for the thread by whoever lets it go, so that it never seems to stand on."""
        self.standing = standing
        self.on_standing()

    def let_go(self) -> None:
        """Let the thread leave, if it stands here. With the lot's lock held."""
        if self.standing:
            self._stand(False)
            self._lot.changed.notify_all()

    def leave(self) -> None:
        with self._lot.changed:
            self.gone = True
            self._lot.ring_if_complete()

    def stop(self) -> None:
        with self._lot.changed:
            self.stopping = True
        if not self.gone:
            self._lot.kick(self)
        with self._lot.changed:
            self.let_go()
        self.model.asked = True


class ModelLot:
    """The face of `avmm.kvm.parking.ParkingLot`."""

    def __init__(self, models: Sequence[ModelVcpu]) -> None:
        self.bell = eventfd()
        self.asked = False
        self.round = 0
        self.changed = threading.Condition(threading.RLock())
        self.sounding = False
        """The tests': the bell has rung, and the task has not seen it."""
        self.on_kick: Callable[[ModelSpot], None] = lambda spot: None
        """The tests': called before and after a kick's signal."""
        self.spots = [ModelSpot(self, model) for model in models]
        self._sleeps = False

    def ask(self) -> None:
        with self.changed:
            self.asked = True
            self.round |= 1
        for spot in self.spots:
            if not spot.gone:
                self.kick(spot)
        for spot in self.spots:
            spot.model.asked = True

    def kick(self, spot: ModelSpot) -> None:
        """`immediate_exit`, then the signal, to a thread that runs."""
        spot.model.page.immediate_exit = 1
        self.on_kick(spot)
        if spot.runs:
            spot.model.signal()
        self.on_kick(spot)

    def release(self) -> None:
        for spot in self.spots:
            spot.model.asked = spot.stopping
        with self.changed:
            self.asked = False
            self.round += self.round & 1
            for spot in self.spots:
                spot.let_go()

    @property
    def complete(self) -> bool:
        """Have all parked that are not gone?"""
        return all(spot.is_parked for spot in self.spots)

    def ring_if_complete(self) -> None:
        if self._sleeps and self.complete:
            self.sounding = True
            os.eventfd_write(self.bell, 1)

    def poll(self, linger: bool) -> bool:
        with self.changed:
            self._sleeps = not self.complete
            return not self._sleeps

    def woken(self) -> None:
        with self.changed:
            self._sleeps = self.sounding = False
            with suppress(BlockingIOError):  # it did not ring
                os.eventfd_read(self.bell)

    def close(self) -> None:
        if self.bell >= 0:
            os.close(self.bell)
            self.bell = -1
