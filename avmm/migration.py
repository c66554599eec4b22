"""The coordinator: brings a machine to a standstill in which its state can be read.

    async with vm.paused(deadline=2.0):
        state = vm.save()

In this order, each step for all before the next begins:

1. Every vCPU is asked to pause, all at once, and then awaited, so that they drain side by side.
   Each serves what it has in hand and lets the kernel finish it (`avmm.vcpu.completion`).
2. Coalesced writes, which no exit has shown, reach their devices (`avmm.bus.coalesced`).
3. The devices are quiesced: what is in flight finishes, and after it nothing writes guest
   memory or raises an interrupt. Not earlier: both steps before still call devices.

Whatever ends it, leaving the block or a failure, timeout or cancellation at any point, the
same is undone in reverse, and the guest runs on as if nothing had been asked.

Where the machine is on that way is one `Stand`; `STANDS` is the table of what follows what.

A device that cannot go on does not keep the guest: devices are resumed side by side, each has
`RESUME_SECONDS` for it, and then the vCPUs run, whatever has become of them. A guest without one
of its devices can still be talked to and saved; one that stands still for ever cannot.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from enum import Enum
from typing import Final, Protocol

import trio

from avmm.errors import DeviceError, PauseTimeout, VcpuError

logger = logging.getLogger(__name__)

_THROTTLE_SECONDS: Final = 0.04
"""A period of throttling. A pause may have to wait that long for it."""
RESUME_SECONDS: Final = 10.0
"""How long the vCPUs wait for devices to resume; then they run on without."""


class Stand(Enum):
    """Where a machine is on its way to a standstill and back."""

    RUNS = "runs"
    STOPPING = "is on its way to a standstill"
    STILL = "stands still"
    RESUMING = "is on its way back from a standstill"
    FORSAKEN = "stands still for ever"


STANDS: Final[Mapping[Stand, Set[Stand]]] = {
    Stand.RUNS: {Stand.STOPPING},
    Stand.STOPPING: {Stand.STILL, Stand.RESUMING},
    Stand.STILL: {Stand.RESUMING, Stand.FORSAKEN},
    Stand.RESUMING: {Stand.RUNS},
    Stand.FORSAKEN: set(),
}
"""What may follow each."""


class PausableVcpus(Protocol):
    """What the coordinator needs of the vCPUs; `avmm.loop.VcpuGroup` is such."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    async def parked(self) -> None: ...
    def late(self) -> list[str]: ...


class QuiescableDevice(Protocol):
    """What it needs of a device; `avmm.devices.base.Device` is one."""

    @property
    def name(self) -> str: ...
    async def quiesce(self) -> None: ...
    async def resume(self) -> None: ...


class Coordinator:
    """Pauses one machine for whoever asks, from trio; pauses count. `devices` is gone through at
    each standstill, and may give others then than before."""

    def __init__(
        self,
        vcpus: PausableVcpus,
        devices: Iterable[QuiescableDevice],
        deliver_coalesced: Callable[[], None] = lambda: None,
    ) -> None:
        self._vcpus = vcpus
        self._deliver_coalesced = deliver_coalesced
        self._devices = devices
        self._stand = Stand.RUNS
        self._holders = 0
        self._quiesced: list[QuiescableDevice] = []
        """The devices that are to be resumed."""
        # Held while the machine is on its way to a standstill or back. Whoever else asks
        # meanwhile waits, within its own deadline; no vCPU and no device ever takes it.
        self._moving = trio.Lock()
        self._stage = ""
        """What the way to a standstill or back waits for, other than vCPUs; for a person."""
        self._stage_begun = 0.0

    @property
    def stand(self) -> Stand:
        """Where the machine is between running and standing still."""
        return self._stand

    @property
    def is_paused(self) -> bool:
        """Does the machine stand still now?"""
        return self._stand in (Stand.STILL, Stand.FORSAKEN)

    def _turn(self, to: Stand) -> None:
        if to not in STANDS[self._stand]:
            raise RuntimeError(f"a machine that {self._stand.value} cannot be: {to.name}")
        self._stand = to

    @asynccontextmanager
    async def paused(self, deadline: float | None = None) -> AsyncIterator[None]:
        """The machine stands still inside the block.

        Pauses nest and overlap: the guest runs on when the last one is left. Raises
        `PauseTimeout` where it does not stand still within `deadline` seconds, saying what it
        waited for, and what a device raises at it. Cancelling is a checkpoint's, at any
        moment on the way there; after any of these the guest runs on.

        Leaving it is shielded, and done when the guest runs. Raises then what a device raised
        at its resume, a `DeviceError` that names those not back within `RESUME_SECONDS`, or
        both in a group.
        """
        waited_for = [""]  # this call's own: others may fail at the same time, for other reasons
        with trio.move_on_after(float("inf") if deadline is None else deadline) as scope:
            await self._hold(waited_for)
        if scope.cancelled_caught:
            raise PauseTimeout(f"the pause was given up after {deadline} s: {waited_for[-1]}")
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._release()

    async def _hold(self, waited_for: list[str]) -> None:
        try:
            self._moving.acquire_nowait()  # no round of the scheduler before the first kick
        except trio.WouldBlock:
            try:
                await self._moving.acquire()
            except trio.Cancelled:
                waited_for.append(f"another pause is under way: {self._describe()}")
                raise
        try:
            if self._stand is Stand.RUNS:
                await self._stand_still(waited_for)
            self._holders += 1
        finally:
            self._moving.release()

    # -- for a guest that is handed over to another process --------------------------------------

    def forsake(self) -> None:
        """The guest runs elsewhere: this standstill is never left, whoever holds it. While
        paused."""
        self._turn(Stand.FORSAKEN)

    def retain(self) -> None:
        """Hold the standstill until `relinquish`, with nobody inside of a block. While paused."""
        self._holders += 1

    async def relinquish(self) -> None:
        """Let go of what `retain` held; the guest runs on unless somebody else holds it."""
        with trio.CancelScope(shield=True):
            await self._release()

    async def throttle(self, share: Callable[[], float]) -> None:
        """Let the vCPUs stand still for a share of their time, until cancelled: `share()` tells
        which, 0 to 1, and is asked all the time. Devices are not quiesced."""
        while True:
            part = share()
            await trio.sleep(_THROTTLE_SECONDS * (1 - part))
            if not part:
                continue
            async with self._moving:
                if self._stand is not Stand.RUNS:
                    continue
                try:
                    self._vcpus.pause()
                    await self._vcpus.parked()
                    await trio.sleep(_THROTTLE_SECONDS * part)
                except VcpuError:  # whoever pauses the machine next is told
                    return
                finally:
                    self._vcpus.resume()

    def _describe(self) -> str:
        if self._stage:
            return f"{self._stage}, since {trio.current_time() - self._stage_begun:.1f} s"
        return "; ".join(self._vcpus.late()) or "nothing keeps it any more"

    def _enter(self, stage: str) -> None:
        self._stage, self._stage_begun = stage, trio.current_time()

    async def _release(self) -> None:
        async with self._moving:
            self._holders -= 1
            if not self._holders and self._stand is Stand.STILL:
                await self._run_on()

    async def _stand_still(self, waited_for: list[str]) -> None:
        """All steps. Where one fails the machine runs on, and what it had waited for is noted."""
        self._turn(Stand.STOPPING)
        try:
            self._vcpus.pause()
            await self._vcpus.parked()
            self._deliver_coalesced()
            for device in self._devices:
                self._quiesced.append(device)
                self._enter(f"{device.name} has not finished what it has in flight")
                await device.quiesce()
        except BaseException as error:
            waited_for.append(self._describe())
            with trio.CancelScope(shield=True):
                try:
                    await self._run_on()
                except Exception as failure:
                    # The guest runs on; why it was not paused is what is to be known.
                    logger.exception("a pause was given up, and on the way back:")
                    error.add_note(f"and on the way back: {failure!r}")
                    waited_for[-1] += f"; and on the way back: {failure!r}"  # for a deadline
            raise
        finally:
            self._stage = ""
        self._turn(Stand.STILL)

    async def _run_on(self) -> None:
        """Resume the devices that were quiesced, and then the vCPUs; to be called shielded.
        Raises as `paused`."""
        self._turn(Stand.RESUMING)
        quiesced, self._quiesced = self._quiesced, []
        failures: list[Exception] = []
        try:
            if quiesced:
                await self._resume(quiesced, failures)
        finally:
            self._vcpus.resume()  # an interrupted program's, too; does nothing the second time
            self._stage = ""
            self._turn(Stand.RUNS)
        if len(failures) > 1:
            raise ExceptionGroup("devices could not go on after a pause", failures)
        if failures:
            raise failures[0]

    async def _resume(
        self, quiesced: Sequence[QuiescableDevice], failures: list[Exception]
    ) -> None:
        late = {id(device): device for device in reversed(quiesced)}
        all_back = trio.Event()

        def name_late() -> str:
            return ", ".join(device.name for device in late.values())

        async def resume(device: QuiescableDevice) -> None:
            try:
                await device.resume()
            except Exception as error:  # whatever it is, it must not cancel the others
                failures.append(error)
            late.pop(id(device), None)
            self._enter(f"not resumed yet: {name_late()}")
            if not late:
                self._vcpus.resume()  # here: the guest waits for no round of the scheduler more
                all_back.set()

        self._enter(f"not resumed yet: {name_late()}")
        async with trio.open_nursery() as nursery:
            for device in quiesced[::-1]:
                nursery.start_soon(resume, device)
            with trio.move_on_after(RESUME_SECONDS):
                await all_back.wait()
            if late:
                text = f"not resumed within {RESUME_SECONDS:g} s after a pause: {name_late()}"
                logger.error("%s; the guest runs on", text)
                failures.append(DeviceError(text))
                # Before the devices are cancelled: one that heeds no cancellation, either,
                # keeps whoever leaves the pause, but not the guest.
                self._vcpus.resume()
                nursery.cancel_scope.cancel()
