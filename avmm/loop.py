"""The vCPUs' threads and their bridge into the nursery: how one vCPU, and how all vCPUs of a
machine run, serve exits and park.

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

An exit for a register that needs no handler (`avmm.devices.registers`) never comes here: the
thread answers it in C (kvm/registers.h), without asking for the GIL.

An exit for a handler that is a coroutine function needs the task in any case. So the thread gives
the turn to the task at once, without asking for the GIL (kvm/claims.h), and the task calls the
handler. All other exits need the GIL, for which one thread of the process asks at a time
(kvm/gate.h): with several guests in one program, the threads would otherwise spend their time on
going to sleep and waking each other.

**Who may touch what.** A vCPU's `kvm_run`, registers and pending exit belong to whoever has
the turn (kvm/bridge.h). There is no lock, because nothing is shared. A device's state belongs
to whoever holds the device's own lock, which is held only while one handler call runs. So a
handler never waits for another vCPU, another device or the coordinator, and nothing is locked
across an await.

**Asking a vCPU for something.** Whoever asks writes down the request, then sets `immediate_exit`,
then kicks the thread if it is in `KVM_RUN` (a signal with a C handler that does nothing). The
thread clears `immediate_exit` *before* it looks at the requests. In that order a request is never
lost: either the thread sees it when it looks, or `immediate_exit` is set at its next `KVM_RUN`, or
the signal interrupts the `KVM_RUN` in progress.

**Parking.** A vCPU that is to pause first lets the kernel finish what the last exit left
pending (`avmm.vcpu.completion` says why, and how: `drain`). Then its thread stands in the
machine's parking lot until the machine runs on. A vCPU that is asked while it is in the guest has
no exit to serve, and does all of this in C, without the GIL (avmm/kvm/parking.h). A vCPU that is
stopped is drained in the same way before it ends, so a machine that has just been stopped can
still be paused, and its state is consistent. If a stopped vCPU cannot be drained, because its exit
is never answered, it counts as failed.

**Deterministic runs** (`avmm.lockstep`). There the task does not let trio run on after it has
answered: trio's thread stands still until a vCPU wants to be served again, parks or ends.

**States.** Each vCPU is in one `VcpuState`. The table `TRANSITIONS` says which states may follow
each state, and which side makes each step. Only the side that has the turn writes the state, so
the two sides never write at the same time; anybody else who reads it sees a state that was true a
moment ago. Requests to a vCPU, to park (`Spot.asked`) or to end (`Spot.stopping`), are not states:
any thread may make them at any time, and the vCPU looks when it can. The lot knows whether the
vCPU's thread has parked (`is_parked`): most vCPUs park in C, without Python, and stay RUNNING
meanwhile.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Mapping
from enum import Enum
from time import clock_gettime, pthread_getcpuclockid
from typing import TYPE_CHECKING, Final

import trio

from avmm.ctrl_c import interruptible
from avmm.errors import VcpuError
from avmm.failures import Failures, raise_together
from avmm.kvm import KvmError, constants
from avmm.kvm.bridge import Bridge
from avmm.kvm.parking import SERVED
from avmm.sides import anywhere, in_trio, in_vcpu_thread
from avmm.vcpu.completion import CompletionPolicy, drain, is_output

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from avmm.kvm.claims import DeviceClaims
    from avmm.kvm.parking import ParkingLot, Spot
    from avmm.kvm.vcpu import Vcpu
    from avmm.lockstep import Lockstep
    from avmm.vcpu.exits import Exits

_YIELD_SECONDS: Final = 0.001
"""For how many seconds handlers that never really wait may keep the program's other tasks
waiting."""


class VcpuState(Enum):
    """What one vCPU does now."""

    NEW = "has no thread yet"
    RUNNING = "is in the guest, or its thread serves an exit"
    DRAINING = "lets the kernel finish what the last exit left pending"
    PARKED = "stands in the lot, drained by Python"
    SERVED = "waits for its task, which awaits the answer that the thread was given"
    HANDED = "waits for its task, which serves the exit itself"
    ABANDONED = "waits, and its exit will not be answered"
    FAILED = "has ended in the middle of an exit: its state must not be read"
    ENDED = "has ended in good order, or never had a thread"


class Writer(Enum):
    """The side that writes a state."""

    THREAD = "the vCPU's thread"
    TASK = "the vCPU's task"


_RUNNING: Final = VcpuState.RUNNING
_DRAINING: Final = VcpuState.DRAINING
_PARKED: Final = VcpuState.PARKED
_SERVED: Final = VcpuState.SERVED
_HANDED: Final = VcpuState.HANDED
_ABANDONED: Final = VcpuState.ABANDONED
_FAILED: Final = VcpuState.FAILED
_ENDED: Final = VcpuState.ENDED
# Bound once, because looking a member up in its class would slow down each exit twice.

TRANSITIONS: Final[Mapping[VcpuState, Mapping[VcpuState, Writer]]] = {
    VcpuState.NEW: {
        _RUNNING: Writer.THREAD,
        _ENDED: Writer.TASK,  # no thread could be started
    },
    _RUNNING: {
        _SERVED: Writer.THREAD,
        _HANDED: Writer.TASK,
        _DRAINING: Writer.THREAD,
        _FAILED: Writer.THREAD,
        _ENDED: Writer.THREAD,  # it was stopped while it was parked in C
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
    _HANDED: {
        _RUNNING: Writer.TASK,
        _ABANDONED: Writer.TASK,
    },
    _ABANDONED: {
        _SERVED: Writer.TASK,  # it was answered although it was cancelled
        _HANDED: Writer.TASK,
        _FAILED: Writer.THREAD,
    },
    _FAILED: {},
    _ENDED: {},
}
"""For each state, the states that may follow it, and the side that makes the step. The code below
does not look at this table when it writes a state, because that would slow down each exit. The
model's tests (tests/model) check every step of every schedule against it."""

_LEFT: Final = (_FAILED, _ENDED)
"""The thread no longer uses the vCPU."""


class _AbandonedError(Exception):
    """The current exit will never be answered, so the vCPU's thread must end at once."""


class VcpuLoop:
    """Runs one vCPU until it is stopped, fails, or its task is cancelled.

    To pause it, ask the lot to which `spot` belongs (`VcpuGroup`).
    """

    def __init__(
        self,
        vcpu: Vcpu,
        exits: Exits,
        policy: CompletionPolicy,
        spot: Spot,
        lockstep: Lockstep | None = None,
        claims: DeviceClaims | None = None,
    ) -> None:
        """`claims` says which exits the thread hands over without serving them; None: no exit."""
        self.index = vcpu.index
        self._vcpu = vcpu
        self._exits = exits
        self._policy = policy
        self._spot = spot
        self._lockstep = lockstep
        self._state = VcpuState.NEW
        self._handed_over = 0.0
        """When it last became SERVED or HANDED, in seconds of the monotonic clock."""
        self._bridge = Bridge()
        self._work: Awaitable[None] | None = None
        """The awaitable that the thread has handed over and the task has not taken yet."""
        self._clock: int | None = None
        """The thread's CPU clock."""
        self.task: trio.lowlevel.Task | None = None
        """The task in which `run` runs."""
        self._errors: list[BaseException] = []
        """The error with which the thread has ended: at most one."""
        if claims is not None:
            spot.hand_over_to(self._bridge, claims)

    def close(self) -> None:
        """Release what it holds. Call it while the vCPU does not run. Idempotent."""
        self._spot.leave()
        self._bridge.close()

    @anywhere
    def stop(self) -> None:
        """Ask the vCPU to end, parked or not. Any thread; does not wait; idempotent."""
        self._spot.stop()

    @property
    def state(self) -> VcpuState:
        """What it does now. Any thread may read it."""
        return self._state

    @property
    def failed(self) -> bool:
        """Has it ended in the middle of an exit, or is it about to? Then its state must not be
        read."""
        return self._state in (_ABANDONED, _FAILED)

    @property
    def is_parked(self) -> bool:
        """Has the vCPU parked since it was last asked to, or ended?"""
        return self._spot.is_parked

    @property
    def is_being_served(self) -> bool:
        """Is its task serving its exit now, while its thread waits?"""
        return self._state in (_SERVED, _HANDED)

    @in_trio
    def waits_for(self, seconds: float) -> str:
        """In words for people: what keeps the vCPU from parking. It was asked to park `seconds`
        ago. Call it in trio.

        The time at which a handler is called is not recorded, because that would slow down each
        exit.
        """
        late = f"{seconds:.1f} s after it was asked to pause"
        if self.is_being_served:
            waiting = time.monotonic() - self._handed_over
            return f"vCPU {self.index} waits for {self._exits.owner()}, for {waiting:.1f} s so far"
        if self._vcpu.page.exit_reason in (constants.KVM_EXIT_UNKNOWN, constants.KVM_EXIT_INTR):
            return f"vCPU {self.index} has not left the guest {late}"
        return f"vCPU {self.index} has not come back from {self._exits.owner()}, {late}"

    @property
    def cpu_seconds(self) -> float | None:
        """How much CPU time the thread has taken. None if it does not run, or its exit is being
        served."""
        if self._state is not _RUNNING or self._clock is None:
            return None
        try:
            return clock_gettime(self._clock)
        except OSError:  # it has just ended
            return None

    # -- the thread ----------------------------------------------------------------------

    @in_vcpu_thread
    def _main(self) -> None:
        self._state, end = _RUNNING, _FAILED
        try:
            self._clock = pthread_getcpuclockid(threading.get_ident())
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
            self._call()
            self._bridge.leave()

    @in_vcpu_thread
    def _run(self) -> None:
        spot, run, serve, page = self._spot, self._spot.run, self._exits.serve, self._vcpu.page
        lockstep = self._lockstep
        while True:
            status = run()
            if status == SERVED:
                if self._state is _ABANDONED:
                    raise _AbandonedError
                status = page.exit_reason
            elif status >= 0:
                pending = serve(status)
                if pending is not None:
                    self._hand_over(pending)
                elif lockstep is not None:
                    lockstep.served(self._vcpu.fd)
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
        self._call()
        self._bridge.call()
        if self._state is _ABANDONED:
            raise _AbandonedError
        self._state = before

    @in_vcpu_thread
    def _call(self) -> None:
        if self._lockstep is not None:
            self._lockstep.call()

    # -- the task ------------------------------------------------------------------------

    @in_trio
    async def run(self) -> None:
        """Run the vCPU in a thread of its own. The thread has ended when this returns or raises.

        Raises what a handler raises, `VcpuError` for an exit that cannot be served, and `KvmError`
        if `KVM_RUN` fails. Each says what the vCPU was doing. Cancelling stops the vCPU and leaves
        its exit unfinished, so the vCPU must not be run again.
        """
        self.task = trio.lowlevel.current_task()
        thread = threading.Thread(target=self._main, name=f"avmm vCPU {self.index}", daemon=True)
        try:
            self._start(thread)
            await self._serve()
        except Exception as error:
            self._annotate(error)
            raise
        finally:
            self.task = None
            await self._wind_up(thread)
        if self._errors:
            self._annotate(self._errors[0])
        raise_together(self._errors, f"vCPU {self.index} has failed")

    # Ctrl-C cannot interrupt this, so either there is a thread, which will be joined, or there
    # is none.
    @in_trio
    @trio.lowlevel.enable_ki_protection
    def _start(self, thread: threading.Thread) -> None:
        try:
            thread.start()
        except RuntimeError as error:
            self._state = _ENDED
            raise VcpuError(f"vCPU {self.index} could not get a thread: {error}") from None

    @in_trio
    async def _serve(self) -> None:
        yielded = time.perf_counter()
        mine = self._bridge.poll(True)
        while True:
            if not mine:
                await self._turn()
            if (work := self._taken()) is None:
                return
            if self._lockstep is not None:
                mine = await self._serve_in_lockstep(self._lockstep, work)
                continue
            # If it fails, `_wind_up` finds the exit without an answer.
            await interruptible(work)
            if self._state is _HANDED:
                self._state = _RUNNING
            mine = self._bridge.answer_and_poll(True)
            if (now := time.perf_counter()) - yielded > _YIELD_SECONDS:
                await trio.lowlevel.checkpoint()
                yielded = now

    @in_trio
    async def _serve_in_lockstep(self, lockstep: Lockstep, work: Awaitable[None]) -> bool:
        """In a deterministic run: serve an exit, and stand still while the guest runs. Returns
        whether the thread has handed over the next one."""
        lockstep.moves(False)
        await interruptible(work)
        # A vCPU that is to park, or to end, does that next, and does not run.
        lockstep.prepare(not (self._spot.asked or self._spot.stopping))
        self._bridge.answer()
        lockstep.hold()
        return self._bridge.poll(False)

    @in_trio
    async def _turn(self) -> None:
        """Wait for the turn."""
        mine = False
        while not mine:
            try:
                await trio.lowlevel.wait_readable(self._bridge.bell)
            finally:
                mine = self._bridge.woken()
            mine = mine or self._bridge.poll(True)

    @in_trio
    def _taken(self) -> Awaitable[None] | None:
        """What the thread has given the turn for. None if it has ended. Raises what a handler
        raises that is called here."""
        if self._bridge.is_handed:
            self._handed_over = time.monotonic()
            self._state = _HANDED
            return self._exits.serve(self._vcpu.page.exit_reason) or _done()
        work, self._work = self._work, None
        return work

    @in_trio
    @trio.lowlevel.enable_ki_protection
    async def _wind_up(self, thread: threading.Thread) -> None:
        """Stop the thread, and answer it until it has ended. Either side may have the turn now.

        The thread waits for each answer without a time limit, so it gets all of them, whatever
        else goes wrong. Errors on the way are raised after the thread has ended.
        """
        failures: list[BaseException] = []
        try:
            self.stop()
        except KvmError as error:
            failures.append(error)
        with trio.CancelScope(shield=True):
            while self._state not in _LEFT:
                work = None
                if self._state is not _HANDED:  # else it was taken before and has failed
                    if not self._bridge.poll(False):
                        await self._turn()
                    try:
                        work = self._taken()
                    except BaseException as error:
                        self._annotate(error)
                        failures.append(error)
                if self._state in (_SERVED, _HANDED):
                    await self._abandon(work, failures)
                if self._state is _HANDED:
                    self._state = _RUNNING
                self._bridge.answer()
        if thread.ident is not None:
            thread.join()
        self._bridge.poll(False)  # take the last turn, whichever side saw the end first
        self.close()
        raise_together(failures, f"vCPU {self.index} could not be wound up")

    @in_trio
    async def _abandon(self, work: Awaitable[None] | None, failures: list[BaseException]) -> None:
        """Begin `work` and cancel it, as trio does with tasks that are started in a cancelled
        nursery. If it is None, it was taken before and has failed. The exit counts as never
        answered, unless `work` finishes although it was cancelled."""
        before, self._state = self._state, _ABANDONED
        if work is None:
            return
        try:
            with trio.CancelScope() as scope:
                scope.cancel()
                await work
                self._state = before
        except BaseException as error:
            self._annotate(error)
            failures.append(error)

    def _annotate(self, error: BaseException) -> None:
        if isinstance(error, Exception) and not isinstance(error, VcpuError):
            error.add_note(f"vCPU {self.index} was serving {self._exits.report()}")


async def _done() -> None:
    """What is awaited of an exit that was answered at once."""


class VcpuGroup:
    """The loops of one machine's vCPUs and the lot in which they park. Use it only in trio."""

    def __init__(
        self, lot: ParkingLot, loops: Sequence[VcpuLoop], lockstep: Lockstep | None = None
    ) -> None:
        self._lot = lot
        self._lockstep = lockstep
        self.loops = loops
        self._asked = 0.0

    async def run(self) -> None:
        """Run all vCPUs until the last one has ended. If one fails, the others end too. Raises
        what `VcpuLoop.run` raises, in a group if several have failed."""
        scope = trio.CancelScope()
        failures = Failures(scope.cancel)
        self._moves(True)
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    for loop in self.loops:
                        nursery.start_soon(failures.guard, loop.run, name=f"vCPU {loop.index}")
        finally:
            self._moves(False)
            raise_together(failures.errors, "several vCPUs have failed")

    def _moves(self, moves: bool) -> None:
        if self._lockstep is not None:
            self._lockstep.moves(moves)

    def served_by(self, task: trio.lowlevel.Task) -> int | None:
        """The index of the vCPU whose exits this task serves. None if it is none of them."""
        return next((loop.index for loop in self.loops if loop.task is task), None)

    def cpu_seconds(self) -> list[float] | None:
        """How much CPU time each vCPU's thread has taken. None if one of them does not run, or its
        exit is being served."""
        found = [loop.cpu_seconds for loop in self.loops]
        times = [seconds for seconds in found if seconds is not None]
        return times if len(times) == len(found) else None

    @anywhere
    def stop(self) -> None:
        """Ask all vCPUs to end, parked or not. Any thread; does not wait; idempotent."""
        for loop in self.loops:
            loop.stop()

    def pause(self) -> None:
        """Ask all vCPUs at the same time to drain and park. `parked` waits until they have."""
        self._lot.ask()
        self._asked = trio.current_time()

    def resume(self) -> None:
        """Take `pause` back, whether the vCPUs have parked yet or not."""
        self._moves(True)
        self._lot.release()

    async def parked(self) -> None:
        """Wait until all vCPUs have parked after `pause`, or have ended in good order.

        Raises `VcpuError` if one has failed: its last exit is unfinished, so its state must not
        be read. If the wait is cancelled, the request to park stands until `resume`.
        """
        # Nearly always they park at once, so polling is cheaper than sleeping and being woken.
        parked = self._lot.poll(not any(loop.is_being_served for loop in self.loops))
        while not parked:
            try:
                await trio.lowlevel.wait_readable(self._lot.bell)
            finally:
                self._lot.woken()
            parked = self._lot.poll(False)
        self._moves(False)
        for loop in self.loops:
            if loop.failed:
                raise VcpuError(f"vCPU {loop.index} has failed in the middle of an exit")

    def late(self) -> list[str]:
        """In words for people: what keeps each vCPU that has not parked."""
        seconds = trio.current_time() - self._asked
        return [loop.waits_for(seconds) for loop in self.loops if not loop.is_parked]
