"""The vCPUs' threads and their bridge into the nursery: run, serve, park, one and all.

Each vCPU has an OS thread of its own, in which `KVM_RUN` blocks without the GIL, and a trio
task beside it. What happens to an exit:

    thread                                          task
    ------                                          ----
    KVM_RUN returns
    Exits.serve: the device's handler is called
      it answered: back to KVM_RUN
      it returned an awaitable:
        the turn goes to the task  ------------->   await it
        (this vCPU waits, no other)                 it has written the answer
        back to KVM_RUN            <-------------   the turn goes back

**Who may touch what.** A vCPU's `kvm_run`, registers and pending exit belong to whoever has
the turn (kvm/bridge.h); there is no lock because there is no sharing. A device's state belongs
to whoever holds the device's own lock, which is held only while one handler call runs: so a
handler never waits for another vCPU, another device or the coordinator, and nothing is locked
across an await.

**Asking a vCPU for something.** Whoever asks writes down the request, then sets `immediate_exit`,
then kicks a thread that is in `KVM_RUN` (a signal with a C handler that does nothing). The thread
clears `immediate_exit` *before* it looks at the requests. In that order a request is never lost:
either the thread sees it when it looks, or `immediate_exit` is set at its next `KVM_RUN`, or the
signal interrupts the one that runs.

**Parking.** A vCPU that is to pause first lets the kernel finish what the last exit left
pending (`avmm.vcpu.completion` says why, and how: `drain`). Then its thread stands in the
machine's parking lot until the machine runs on. A vCPU that is asked while it is in the guest has
nothing in hand and does all of this in C, without the GIL (avmm/kvm/parking.h). One that is
stopped is drained in the same way before it ends: whoever pauses a machine that has just been
stopped finds nothing torn in it. Where that cannot be, its exit never answered, it counts as
failed.

**States.** What a vCPU is at is one `VcpuState`, and `TRANSITIONS` is the table of what may follow
what, and by whose hand. Only the side that has the turn writes it, so no two sides ever write at
the same time, and whoever else reads it sees a state that was true a moment ago. What is *asked*
of a vCPU, to park (`Spot.asked`) or to end (`Spot.stopping`), is no state of it: any thread may
ask at any time, and the vCPU looks when it can. Where its thread stands parked is the lot's to
say (`is_parked`): most park in C, where Python has no part in it, and are RUNNING all the while.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Final

import trio

from avmm.errors import VcpuError
from avmm.failures import Failures, raise_together
from avmm.kvm import KvmError, constants
from avmm.kvm.bridge import Bridge
from avmm.sides import anywhere, in_trio, in_vcpu_thread
from avmm.vcpu.completion import CompletionPolicy, drain, is_output

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from avmm.kvm.parking import ParkingLot, Spot
    from avmm.kvm.vcpu import Vcpu
    from avmm.vcpu.exits import Exits

_YIELD_SECONDS: Final = 0.001
"""How long handlers that never really wait may keep the other tasks of the program waiting."""


class VcpuState(Enum):
    """What one vCPU is at."""

    NEW = "has no thread yet"
    RUNNING = "is in the guest, or its thread serves an exit"
    DRAINING = "lets the kernel finish what the last exit left pending"
    PARKED = "stands in the lot, drained by Python"
    SERVED = "waits for its task, which has the turn"
    ABANDONED = "waits, and its exit will not be answered"
    FAILED = "has ended in the midst of an exit: its state is not one to be read"
    ENDED = "has ended in good order, or never had a thread"


class Writer(Enum):
    """Who writes a state."""

    THREAD = "the vCPU's thread"
    TASK = "the vCPU's task"


_RUNNING: Final = VcpuState.RUNNING
_DRAINING: Final = VcpuState.DRAINING
_PARKED: Final = VcpuState.PARKED
_SERVED: Final = VcpuState.SERVED
_ABANDONED: Final = VcpuState.ABANDONED
_FAILED: Final = VcpuState.FAILED
_ENDED: Final = VcpuState.ENDED
# Bound once: in each exit, looking a member up in its class would be paid for twice.

TRANSITIONS: Final[Mapping[VcpuState, Mapping[VcpuState, Writer]]] = {
    VcpuState.NEW: {
        _RUNNING: Writer.THREAD,
        _ENDED: Writer.TASK,  # there is no thread to be had
    },
    _RUNNING: {
        _SERVED: Writer.THREAD,
        _DRAINING: Writer.THREAD,
        _FAILED: Writer.THREAD,
        _ENDED: Writer.THREAD,  # stopped where it had parked in C
    },
    _DRAINING: {
        _SERVED: Writer.THREAD,
        _PARKED: Writer.THREAD,
        _FAILED: Writer.THREAD,
        _ENDED: Writer.THREAD,
    },
    _PARKED: {
        _RUNNING: Writer.THREAD,
        _ENDED: Writer.THREAD,
    },
    _SERVED: {
        _RUNNING: Writer.THREAD,  # as it was before
        _DRAINING: Writer.THREAD,
        _ABANDONED: Writer.TASK,
    },
    _ABANDONED: {
        _SERVED: Writer.TASK,  # it was answered although it was cancelled
        _FAILED: Writer.THREAD,
    },
    _FAILED: {},
    _ENDED: {},
}
"""From each state to those that may follow it, and which side makes that step. The code below
writes states without a look at this table, since each exit would pay for it; the model's tests
(tests/model) hold every step of every schedule against it."""

_LEFT: Final = (_FAILED, _ENDED)
"""The thread has nothing to do with the vCPU any more."""


class _AbandonedError(Exception):
    """The exit in hand will never be answered: the vCPU's thread is to end at once."""


class VcpuLoop:
    """Runs one vCPU until it is stopped, fails, or its task is cancelled.

    It is asked to park by way of the lot that `spot` belongs to (`VcpuGroup`).
    """

    def __init__(self, vcpu: Vcpu, exits: Exits, policy: CompletionPolicy, spot: Spot) -> None:
        self.index = vcpu.index
        self._vcpu = vcpu
        self._exits = exits
        self._policy = policy
        self._spot = spot
        self._state = VcpuState.NEW
        self._handed_over = 0.0
        """When it was last SERVED, in seconds of the monotonic clock."""
        self._bridge = Bridge()
        self._work: Awaitable[None] | None = None
        """What the thread wants awaited and the task has not taken yet."""
        self._errors: list[BaseException] = []
        """What the thread has ended with: one, if anything."""

    def close(self) -> None:
        """Give back what it holds, if it does not run; idempotent."""
        self._spot.leave()
        self._bridge.close()

    @anywhere
    def stop(self) -> None:
        """Ask the vCPU to end, parked or not. Any thread; does not wait; idempotent."""
        self._spot.stop()

    @property
    def state(self) -> VcpuState:
        """What it is at; any thread."""
        return self._state

    @property
    def failed(self) -> bool:
        """Has it ended in the midst of an exit, or is it about to? Then its state is not one to
        be read."""
        return self._state in (_ABANDONED, _FAILED)

    @property
    def is_parked(self) -> bool:
        """Has the vCPU parked since it was last asked to, or ended?"""
        return self._spot.is_parked

    @property
    def is_being_served(self) -> bool:
        """Is its exit with its task now, and the thread waiting?"""
        return self._state is _SERVED

    @in_trio
    def waits_for(self, seconds: float) -> str:
        """What keeps the vCPU from parking, which it was asked to so many seconds ago, for a
        person; from trio.

        When a handler was called is not written down: each exit would pay for it.
        """
        late = f"{seconds:.1f} s after it was to pause"
        if self.is_being_served:
            waiting = time.monotonic() - self._handed_over
            return f"vCPU {self.index} waits for {self._exits.owner()}, since {waiting:.1f} s"
        if self._vcpu.page.exit_reason in (constants.KVM_EXIT_UNKNOWN, constants.KVM_EXIT_INTR):
            return f"vCPU {self.index} has not left the guest, {late}"
        return f"vCPU {self.index} is at {self._exits.owner()}, not returned {late}"

    # -- the thread ----------------------------------------------------------------------

    @in_vcpu_thread
    def _main(self) -> None:
        self._state, end = _RUNNING, _FAILED
        try:
            self._spot.enter()
            self._run()
            end = _ENDED
        except _AbandonedError:
            pass
        except BaseException as error:
            self._errors.append(error)
        finally:
            self._state = end
            self._spot.leave()
            self._bridge.leave()

    @in_vcpu_thread
    def _run(self) -> None:
        spot, run, serve, page = self._spot, self._spot.run, self._exits.serve, self._vcpu.page
        while True:
            status = run()
            if status >= 0:
                pending = serve(status)
                if pending is not None:
                    self._hand_over(pending)
                if not (spot.asked or spot.stopping):
                    continue
            elif status == -errno.ECANCELED:
                return
            elif status not in (-errno.EINTR, -errno.EAGAIN):
                raise KvmError("KVM_RUN", -status)
            page.immediate_exit = 0
            if spot.asked or spot.stopping:
                self._state = _DRAINING
                if self._needs_completion(status):
                    drain(self._vcpu, self._serve_draining, self._policy)
                page.immediate_exit = 0
                if not spot.stopping:
                    self._state = _PARKED
                    spot.park()
                if spot.stopping:
                    return
                self._state = _RUNNING

    @in_vcpu_thread
    def _needs_completion(self, status: int) -> bool:
        page = self._vcpu.page
        if status == -errno.EINTR:
            return not self._policy.settles(page.exit_reason, page.flags)
        return status < 0 or self._policy.needs(status, page.flags, is_output=is_output(page))

    @in_vcpu_thread
    def _serve_draining(self, reason: int) -> None:
        pending = self._exits.serve(reason)
        if pending is not None:
            self._hand_over(pending)

    @in_vcpu_thread
    def _hand_over(self, work: Awaitable[None]) -> None:
        """Give the turn to the task, and wait for it to come back with an answer."""
        before = self._state
        self._work = work
        self._handed_over = time.monotonic()
        self._state = _SERVED
        self._bridge.call()
        if self._state is _ABANDONED:
            raise _AbandonedError
        self._state = before

    # -- the task ------------------------------------------------------------------------

    @in_trio
    async def run(self) -> None:
        """Run the vCPU, in a thread that has ended when this returns or raises.

        Raises what a handler raised, `VcpuError` for an exit that cannot be served, `KvmError`
        where `KVM_RUN` fails; each says what the vCPU was at. Cancelling stops the vCPU and
        leaves its exit unfinished: the vCPU is not to be run again.
        """
        thread = threading.Thread(target=self._main, name=f"avmm vCPU {self.index}", daemon=True)
        try:
            self._start(thread)
            await self._serve()
        except Exception as error:
            self._annotate(error)
            raise
        finally:
            await self._wind_up(thread)
        if self._errors:
            self._annotate(self._errors[0])
        raise_together(self._errors, f"vCPU {self.index} has failed")

    # No Ctrl-C interrupts this: there is a thread, which will be joined, or there is none.
    @in_trio
    @trio.lowlevel.enable_ki_protection
    def _start(self, thread: threading.Thread) -> None:
        try:
            thread.start()
        except RuntimeError as error:
            self._state = _ENDED
            raise VcpuError(f"vCPU {self.index} gets no thread: {error}") from None

    @in_trio
    async def _serve(self) -> None:
        yielded = time.perf_counter()
        mine = self._bridge.poll(True)
        while (work := await self._next(mine)) is not None:
            await work  # where it fails, `_wind_up` finds its exit without an answer
            mine = self._bridge.answer_and_poll(True)
            if (now := time.perf_counter()) - yielded > _YIELD_SECONDS:
                await trio.lowlevel.checkpoint()
                yielded = now

    @in_trio
    async def _next(self, mine: bool) -> Awaitable[None] | None:
        """What the thread wants awaited; None: nothing any more. `mine`: we have the turn."""
        while not mine:
            try:
                await trio.lowlevel.wait_readable(self._bridge.bell)
            finally:
                mine = self._bridge.woken()
            mine = mine or self._bridge.poll(True)
        work, self._work = self._work, None
        return work

    @in_trio
    @trio.lowlevel.enable_ki_protection
    async def _wind_up(self, thread: threading.Thread) -> None:
        """Stop the thread and answer it until it has ended, whoever has the turn now.

        It waits for each of its answers without end, so it gets them, whatever else goes wrong:
        what does is raised after the thread's end.
        """
        failures: list[BaseException] = []
        try:
            self.stop()
        except KvmError as error:
            failures.append(error)
        with trio.CancelScope(shield=True):
            while self._state not in _LEFT:
                work = await self._next(self._bridge.poll(False))
                if self._state is _SERVED:
                    await self._abandon(work, failures)
                self._bridge.answer()
        if thread.ident is not None:
            thread.join()
        self._bridge.poll(False)  # the last turn is taken, whoever saw the end first
        self.close()
        raise_together(failures, f"vCPU {self.index} could not be wound up")

    @in_trio
    async def _abandon(self, work: Awaitable[None] | None, failures: list[BaseException]) -> None:
        """Begin `work` and cancel it, as trio does with tasks that are started in a cancelled
        nursery. None: it was taken before, and has failed. Its exit counts as never answered,
        unless `work` comes to its end in spite of that."""
        self._state = _ABANDONED
        if work is None:
            return
        try:
            with trio.CancelScope() as scope:
                scope.cancel()
                await work
                self._state = _SERVED
        except BaseException as error:
            self._annotate(error)
            failures.append(error)

    def _annotate(self, error: BaseException) -> None:
        if isinstance(error, Exception) and not isinstance(error, VcpuError):
            error.add_note(f"vCPU {self.index} was at {self._exits.report()}")


class VcpuGroup:
    """The loops of one machine's vCPUs and the lot in which they park. From trio only."""

    def __init__(self, lot: ParkingLot, loops: Sequence[VcpuLoop]) -> None:
        self._lot = lot
        self.loops = loops
        self._asked = 0.0

    async def run(self) -> None:
        """Run all vCPUs until the last has ended. Raises as `VcpuLoop.run`, and where several
        have failed a group of that; one that fails ends the others."""
        scope = trio.CancelScope()
        failures = Failures(scope.cancel)
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    for loop in self.loops:
                        nursery.start_soon(failures.guard, loop.run, name=f"vCPU {loop.index}")
        finally:
            raise_together(failures.errors, "several vCPUs have failed")

    @anywhere
    def stop(self) -> None:
        """Ask all to end, parked or not. Any thread; does not wait; idempotent."""
        for loop in self.loops:
            loop.stop()

    def pause(self) -> None:
        """Ask all at once to drain and park; `parked` waits for it."""
        self._lot.ask()
        self._asked = trio.current_time()

    def resume(self) -> None:
        """Take a `pause` back, whether they have parked yet or not."""
        self._lot.release()

    async def parked(self) -> None:
        """Wait until all have parked after `pause`, or have ended in good order.

        Raises `VcpuError` where one has failed: its last exit is not finished, and its state
        not one to be read. Cancelling the wait leaves the request standing until `resume`.
        """
        # Nearly always they park at once: to be there is cheaper than to sleep and be woken.
        parked = self._lot.poll(not any(loop.is_being_served for loop in self.loops))
        while not parked:
            try:
                await trio.lowlevel.wait_readable(self._lot.bell)
            finally:
                self._lot.woken()
            parked = self._lot.poll(False)
        for loop in self.loops:
            if loop.failed:
                raise VcpuError(f"vCPU {loop.index} has failed in the midst of an exit")

    def late(self) -> list[str]:
        """What each vCPU waits for that has not parked, for a person."""
        seconds = trio.current_time() - self._asked
        return [loop.waits_for(seconds) for loop in self.loops if not loop.is_parked]
