"""The coordinator: brings a machine to a standstill in which its state can be read.

    async with vm.paused(deadline=2.0):
        state = vm.save()

It takes three steps. Each is finished for all vCPUs or devices before the next begins:

1. All vCPUs are asked to pause at the same time, and then awaited, so that they drain side by
   side. Each serves its current exit and lets the kernel finish it (`avmm.vcpu.completion`).
2. Coalesced writes, which the guest made without an exit, reach their devices
   (`avmm.bus.coalesced`).
3. The devices are quiesced: they finish what is in flight, and after that none of them writes
   guest memory or raises an interrupt. This cannot come earlier, because both steps before it
   still call devices.

When the block is left, or when a step fails, times out or is cancelled at any point, the steps are
undone in reverse order, and the guest runs on as if nothing had been asked.

A `Stand` says how far the machine is on that way. The table `STANDS` says which may follow which.

A device that cannot go on does not hold up the guest. Devices are resumed side by side, and have
`RESUME_SECONDS` for it. After that the vCPUs run, whatever the devices have done. A guest without
one of its devices can still be reached and saved; a guest that stands still for ever cannot.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence, Set
from enum import Enum
from typing import Final, Protocol

import trio

from avmm.ctrl_c import context, protected, undisturbed
from avmm.errors import DeviceError, PauseTimeout, VcpuError
from avmm.failures import raise_together

logger = logging.getLogger(__name__)

_THROTTLE_SECONDS: Final = 0.04
"""One period of throttling, if the host is not busy."""
_MOST_STILL_SECONDS: Final = 0.25
"""How long a throttled guest stands still at a time. A pause may have to wait that long."""
_GLANCE_SECONDS: Final = 0.5
"""How long a glance waits for the vCPUs to park."""
RESUME_SECONDS: Final = 10.0
"""How long the vCPUs wait for devices to resume. After that they run without them."""


class Stand(Enum):
    """How far a machine is on its way to a standstill and back."""

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
"""For each, the ones that may follow it."""


class PausableVcpus(Protocol):
    """What the coordinator needs of the vCPUs. `avmm.loop.VcpuGroup` has it."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    async def parked(self) -> None: ...
    def late(self) -> list[str]: ...


class QuiescableDevice(Protocol):
    """What the coordinator needs of a device. `avmm.devices.base.Device` has it."""

    @property
    def name(self) -> str: ...
    async def quiesce(self) -> None: ...
    async def resume(self) -> None: ...


class Coordinator:
    """Pauses one machine for any task that asks. Use it only in trio. Pauses are counted.

    `devices` is iterated at each standstill, and may yield other devices than the last time."""

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
        # Held while the machine is on its way to a standstill or back. Another task that asks
        # meanwhile waits, within its own deadline. No vCPU and no device ever takes it.
        self._moving = trio.Lock()
        self._stage = ""
        """In words for people: what the machine waits for, other than vCPUs, on its way to a
        standstill or back."""
        self._stage_begun = 0.0

    @property
    def stand(self) -> Stand:
        """How far the machine is on its way to a standstill and back."""
        return self._stand

    @property
    def is_paused(self) -> bool:
        """Does the machine stand still now?"""
        return self._stand in (Stand.STILL, Stand.FORSAKEN)

    def _turn(self, to: Stand) -> None:
        if to not in STANDS[self._stand]:
            raise RuntimeError(f"a machine that {self._stand.value} cannot become {to.name}")
        self._stand = to

    @context
    async def paused(self, deadline: float | None = None) -> AsyncIterator[None]:
        """The machine stands still inside the block.

        Pauses nest and overlap: the guest runs on when the last one is left. If the machine does
        not stand still within `deadline` seconds, this raises `PauseTimeout`, which says what it
        waited for. It also raises what a device raises when it is quiesced. It can be cancelled
        at any moment before the machine stands still. After any of these the guest runs on.

        Leaving the block is shielded from cancellation and from Ctrl-C, and returns when the guest
        runs. It raises what a device raises when it is resumed, a `DeviceError` that names the
        devices that are not resumed within `RESUME_SECONDS`, or both in a group.
        """
        waited_for = [""]  # this call's own: other calls may fail meanwhile for other reasons
        with trio.move_on_after(float("inf") if deadline is None else deadline) as scope:
            await self._hold(waited_for)
        if scope.cancelled_caught:
            raise PauseTimeout(f"the pause was given up after {deadline} s: {waited_for[-1]}")
        try:
            yield
        finally:
            await self._leave()

    async def _hold(self, waited_for: list[str]) -> None:
        try:
            self._moving.acquire_nowait()  # spares a round of the scheduler before the first kick
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
        """The guest runs elsewhere, so this standstill never ends, whoever holds it. Call it
        while paused."""
        self._turn(Stand.FORSAKEN)

    def retain(self) -> None:
        """Keep the standstill until `relinquish`, even if no task is in a block. Call it while
        paused."""
        self._holders += 1

    async def relinquish(self) -> None:
        """End what `retain` began. The guest runs on, unless somebody else keeps it paused."""
        await undisturbed(self._release)

    @protected
    async def throttle(self, share: Callable[[], float]) -> None:
        """Make the vCPUs stand still for a share of their time, until cancelled. `share()` returns
        the share, from 0 up to but not 1, and is called in each period. Devices are not quiesced.

        On a busy host this task is woken late, and the guest has run for longer than it should.
        Then it stands still for longer, too: what was measured is what counts.
        """
        while True:
            part, began = share(), trio.current_time()
            await trio.sleep(_THROTTLE_SECONDS * (1 - part))
            if not part:
                continue
            async with self._moving:
                if self._stand is not Stand.RUNS:
                    continue
                try:
                    self._vcpus.pause()
                    await self._vcpus.parked()
                    ran = trio.current_time() - began
                    await trio.sleep(min(_MOST_STILL_SECONDS, ran * part / (1 - part)))
                except VcpuError:  # the next task that pauses the machine gets this error
                    return
                finally:
                    self._vcpus.resume()

    @protected
    async def glance(self, look: Callable[[], bool]) -> bool:
        """Return what `look` returns, which is called while all vCPUs are parked, but not the
        devices quiesced. Returns False if that cannot be soon: because the machine is paused, or a
        device serves an exit.
        """
        if self._moving.locked() or self._stand is not Stand.RUNS:
            return False
        async with self._moving:
            with trio.move_on_after(_GLANCE_SECONDS):
                try:
                    self._vcpus.pause()
                    await self._vcpus.parked()
                    return look()
                except VcpuError:  # the next task that pauses the machine gets this error
                    return False
                finally:
                    self._vcpus.resume()
        return False

    def _describe(self) -> str:
        if self._stage:
            return f"{self._stage}, for {trio.current_time() - self._stage_begun:.1f} s so far"
        return "; ".join(self._vcpus.late()) or "nothing holds it up now"

    def _enter(self, stage: str) -> None:
        self._stage, self._stage_begun = stage, trio.current_time()

    async def _leave(self) -> None:
        """`_release`, which neither a cancellation nor Ctrl-C disturbs."""
        if self._moving.locked():
            await undisturbed(self._release)
            return
        # Nearly always nobody else pauses. A task for what is undisturbed would take longer than
        # the whole pause; `_run_on` needs none.
        self._moving.acquire_nowait()
        try:
            # Not after the guest runs: whoever has saved it here leaves the machine next, and what
            # the guest does until then is lost.
            await trio.lowlevel.cancel_shielded_checkpoint()
            with trio.CancelScope(shield=True):
                await self._release_one()
        finally:
            self._moving.release()

    async def _release(self) -> None:
        async with self._moving:
            await self._release_one()

    async def _release_one(self) -> None:
        self._holders -= 1
        if not self._holders and self._stand is Stand.STILL:
            await self._run_on()

    async def _stand_still(self, waited_for: list[str]) -> None:
        """Take all steps. If one fails, the machine runs on, and `waited_for` gets what it had
        waited for."""
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
                    # The guest runs on. The caller needs to know why it was not paused.
                    logger.exception("a pause failed, and on the way back:")
                    error.add_note(f"and on the way back: {failure!r}")
                    waited_for[-1] += f"; and on the way back: {failure!r}"  # for a deadline
            raise
        finally:
            self._stage = ""
        self._turn(Stand.STILL)

    async def _run_on(self) -> None:
        """Resume the devices that were quiesced, and then the vCPUs. Call it shielded. Ctrl-C does
        not disturb it. Raises what leaving `paused` raises."""
        self._turn(Stand.RESUMING)
        quiesced, self._quiesced = self._quiesced, []
        failures: list[BaseException] = []
        try:
            if quiesced:
                await self._resume(quiesced, failures)
        finally:
            self._vcpus.resume()  # also if the program is interrupted; a second call does nothing
            self._stage = ""
            self._turn(Stand.RUNS)
        raise_together(failures, "devices could not go on after a pause")

    async def _resume(
        self, quiesced: Sequence[QuiescableDevice], failures: list[BaseException]
    ) -> None:
        late = {id(device): device for device in reversed(quiesced)}
        all_back = trio.Event()
        # A scope each, because an interrupt cancels the nursery.
        scopes = [trio.CancelScope(shield=True) for _ in quiesced]

        def name_late() -> str:
            return ", ".join(device.name for device in late.values())

        @protected
        async def resume(device: QuiescableDevice, scope: trio.CancelScope) -> None:
            with scope:
                try:
                    await device.resume()
                except Exception as error:  # of any type, because it must not cancel the others
                    failures.append(error)
                late.pop(id(device), None)
                self._enter(f"not resumed yet: {name_late()}")
                if not late:
                    self._vcpus.resume()  # here: the guest need not wait for the scheduler
                    all_back.set()

        self._enter(f"not resumed yet: {name_late()}")
        try:
            async with trio.open_nursery() as nursery:
                for device, scope in zip(quiesced[::-1], scopes, strict=True):
                    nursery.start_soon(resume, device, scope)
                with trio.move_on_after(RESUME_SECONDS):
                    while not all_back.is_set():
                        try:
                            await all_back.wait()
                        except KeyboardInterrupt as interrupt:
                            failures.append(interrupt)
                if late:
                    text = f"not resumed within {RESUME_SECONDS:g} s after a pause: {name_late()}"
                    logger.error("%s; the guest runs on", text)
                    failures.append(DeviceError(text))
                    # Before the devices are cancelled: a device that ignores the cancellation as
                    # well holds up the task that leaves the pause, but not the guest.
                    self._vcpus.resume()
                    for scope in scopes:
                        scope.cancel()
        except BaseExceptionGroup as group:  # interrupts, and what is no `Exception`
            failures.extend(group.exceptions)
