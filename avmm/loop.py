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
"""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING, Final

import trio

from avmm.errors import VcpuError
from avmm.kvm import KvmError, constants
from avmm.kvm.bridge import Bridge
from avmm.vcpu.completion import CompletionPolicy, drain, is_output

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from avmm.kvm.parking import ParkingLot, Spot
    from avmm.kvm.vcpu import Vcpu
    from avmm.vcpu.exits import Exits

_YIELD_SECONDS: Final = 0.001
"""How long handlers that never really wait may keep the other tasks of the program waiting."""


class _AbandonedError(Exception):
    """The exit in hand will never be answered: the vCPU's thread is to end at once."""


class VcpuLoop:
    """Runs one vCPU until it is stopped, fails, or its task is cancelled.

    It is asked to park by way of the lot that `spot` belongs to (`VcpuGroup`).
    """

    def __init__(self, vcpu: Vcpu, exits: Exits, policy: CompletionPolicy, spot: Spot) -> None:
        self.index = vcpu.index
        self.failed = False
        """It has ended in the midst of an exit: its state is not one to be read."""
        self._vcpu = vcpu
        self._exits = exits
        self._policy = policy
        self._spot = spot
        self._handed_over: float | None = None
        self._bridge = Bridge()
        self._work: Awaitable[None] | None = None
        self._error: BaseException | None = None
        self._stopping = False
        self._ended = False

    def close(self) -> None:
        """Give back what it holds, if it does not run; idempotent."""
        self._spot.leave()
        self._bridge.close()

    def stop(self) -> None:
        """Ask the vCPU to end, parked or not. Any thread; does not wait; idempotent."""
        self._stopping = True
        self._spot.stop()

    @property
    def is_parked(self) -> bool:
        """Has the vCPU parked since it was last asked to, or ended?"""
        return self._spot.is_parked

    @property
    def is_being_served(self) -> bool:
        """Is its exit with its task now, and the thread waiting?"""
        return self._handed_over is not None

    def waits_for(self, seconds: float) -> str:
        """What keeps the vCPU from parking, which it was asked to so many seconds ago, for a
        person; from trio.

        When a handler was called is not written down: each exit would pay for it.
        """
        late = f"{seconds:.1f} s after it was to pause"
        since = self._handed_over
        if since is None:
            if self._vcpu.page.exit_reason in (
                constants.KVM_EXIT_UNKNOWN,
                constants.KVM_EXIT_INTR,
            ):
                return f"vCPU {self.index} has not left the guest, {late}"
            return f"vCPU {self.index} is at {self._exits.owner()}, not returned {late}"
        waiting = time.monotonic() - since
        return f"vCPU {self.index} waits for {self._exits.owner()}, since {waiting:.1f} s"

    # -- the thread ----------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._spot.enter()
            self._run()
        except _AbandonedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.failed |= self._error is not None
            self._ended = True
            self._spot.leave()
            self._bridge.leave()

    def _run(self) -> None:
        run, serve, page = self._spot.run, self._exits.serve, self._vcpu.page
        while True:
            status = run()
            if status >= 0:
                pending = serve(status)
                if pending is not None:
                    self._hand_over(pending)
                if not (self._spot.asked or self._stopping):
                    continue
            elif status == -errno.ECANCELED:
                return
            elif status not in (-errno.EINTR, -errno.EAGAIN):
                raise KvmError("KVM_RUN", -status)
            page.immediate_exit = 0
            if self._spot.asked or self._stopping:
                if self._needs_completion(status):
                    drain(self._vcpu, self._serve_draining, self._policy)
                page.immediate_exit = 0
                if not self._stopping:
                    self._spot.park()
                if self._stopping:
                    return

    def _needs_completion(self, status: int) -> bool:
        page = self._vcpu.page
        if status == -errno.EINTR:
            return not self._policy.settles(page.exit_reason, page.flags)
        return status < 0 or self._policy.needs(status, page.flags, is_output=is_output(page))

    def _serve_draining(self, reason: int) -> None:
        pending = self._exits.serve(reason)
        if pending is not None:
            self._hand_over(pending)

    def _hand_over(self, work: Awaitable[None]) -> None:
        self._work = work
        self._handed_over = time.monotonic()
        self._bridge.call()
        self._handed_over = None
        if self.failed:
            raise _AbandonedError

    # -- the task ------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the vCPU, in a thread that has ended when this returns or raises.

        Raises what a handler raised, `VcpuError` for an exit that cannot be served, `KvmError`
        where `KVM_RUN` fails; each says what the vCPU was at. Cancelling stops the vCPU and
        leaves its exit unfinished: the vCPU is not to be run again.
        """
        thread = threading.Thread(target=self._main, name=f"avmm vCPU {self.index}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise VcpuError(f"vCPU {self.index} gets no thread: {error}") from None
        try:
            await self._serve()
        except Exception as error:
            self._annotate(error)
            raise
        finally:
            try:
                await self._wind_up()
            finally:
                thread.join()
                self._bridge.poll(False)  # the last turn is taken, whoever saw the end first
                self.close()
        if self._error is not None:
            if isinstance(self._error, Exception):
                self._annotate(self._error)
            raise self._error

    async def _serve(self) -> None:
        yielded = time.perf_counter()
        mine = self._bridge.poll(True)
        while (work := await self._next(mine)) is not None:
            try:
                await work
            except BaseException:
                self.failed = True
                raise
            mine = self._bridge.answer_and_poll(True)
            if (now := time.perf_counter()) - yielded > _YIELD_SECONDS:
                await trio.lowlevel.checkpoint()
                yielded = now

    async def _next(self, mine: bool) -> Awaitable[None] | None:
        """What the thread wants awaited; None: it has ended. `mine`: we have the turn already."""
        while not mine:
            try:
                await trio.lowlevel.wait_readable(self._bridge.bell)
            finally:
                mine = self._bridge.woken()
            mine = mine or self._bridge.poll(True)
        work, self._work = self._work, None
        return work

    async def _wind_up(self) -> None:
        """Stop the thread and answer it until it has ended, whoever has the turn now.

        What it still wants awaited is begun and cancelled, as trio does with tasks that are
        started in a cancelled nursery. Raises the first failure of that, after the end.
        """
        self.stop()
        failure = None
        with trio.CancelScope(shield=True):
            while not self._ended:
                work = await self._next(self._bridge.poll(False))
                if work is not None:
                    self.failed = True
                    try:
                        with trio.CancelScope() as scope:
                            scope.cancel()
                            await work
                            self.failed = False
                    except Exception as error:
                        failure = failure or error
                self._bridge.answer()
        if failure is not None:
            raise failure

    def _annotate(self, error: Exception) -> None:
        if not isinstance(error, VcpuError):
            error.add_note(f"vCPU {self.index} was at {self._exits.report()}")


class VcpuGroup:
    """The loops of one machine's vCPUs and the lot in which they park. From trio only."""

    def __init__(self, lot: ParkingLot, loops: Sequence[VcpuLoop]) -> None:
        self._lot = lot
        self.loops = loops
        self._asked = 0.0

    async def run(self) -> None:
        """Run all vCPUs until the last has ended. Raises as `VcpuLoop.run`, in a group."""
        async with trio.open_nursery() as nursery:
            for loop in self.loops:
                nursery.start_soon(loop.run, name=f"vCPU {loop.index}")

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
