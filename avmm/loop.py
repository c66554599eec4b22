"""A vCPU's thread and its bridge into the nursery: run, serve, park.

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

**Asking a vCPU for something.** `stop` and `pause` set a request, then `immediate_exit`, then
send the kick (a signal with a C handler that does nothing). The thread clears `immediate_exit`
*before* it looks at the requests. In that order a request is never lost: either the thread sees
it when it looks, or `immediate_exit` is set at its next `KVM_RUN`, or the signal interrupts
the one that runs.

**Parking.** `KVM_RUN` first finishes the exit that was served last, and only then looks at
`immediate_exit`; finishing may exit again (the second half of a page-crossing access). So a
vCPU that is to pause goes round the same loop with `immediate_exit` set, serving what exits,
until `KVM_RUN` answers -EINTR: only then is nothing pending in the kernel, and it parks. To
park is to hand the task one more awaitable, which ends when the vCPU is resumed.
"""

from __future__ import annotations

import errno
import inspect
import threading
import time
from typing import TYPE_CHECKING, Final

import trio

from avmm.errors import VcpuError
from avmm.kvm import KvmError
from avmm.kvm.bridge import Bridge, accept_kicks, install_kick, kick

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from avmm.exits import Exits
    from avmm.kvm import Vcpu

DRAIN_LIMIT: Final = 10_000
"""Exits that one drain may serve before it is given up; a `rep ins` of 64 KiB needs 65."""
_YIELD_SECONDS: Final = 0.001
"""How long handlers that never really wait may keep the other tasks of the program waiting."""


class Wakeup:
    """Lets a handler, in whichever thread, wake a task; see `avmm.devices.base.Wakeup`.

    Both sides first announce and then look: `set` sets the flag and then looks for a waiter,
    `wait` names itself the waiter and then looks at the flag. Under the GIL one of them sees
    the other. Only where there is a waiter does `set` pay for a call into trio's loop.
    """

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._flag = False
        self._waiter: trio.Event | None = None

    def set(self) -> None:
        """Wake the waiter, or the next one. Any thread."""
        self._flag = True
        if self._waiter is not None:
            self._token.run_sync_soon(self._fire, idempotent=True)

    def _fire(self) -> None:
        if self._waiter is not None:
            self._waiter.set()

    async def wait(self) -> None:
        """Return once `set` was called since the last return. Cancelling loses no wake-up."""
        if self._waiter is not None:
            raise trio.BusyResourceError("another task waits for this wake-up already")
        self._waiter = trio.Event()
        try:
            if self._flag:
                await trio.lowlevel.checkpoint()
            else:
                await self._waiter.wait()
        finally:
            self._waiter = None
        self._flag = False


class VcpuLoop:
    """Runs one vCPU until it is stopped, fails, or its task is cancelled."""

    def __init__(self, vcpu: Vcpu, exits: Exits) -> None:
        self.index = vcpu.index
        self._vcpu = vcpu
        self._exits = exits
        self._bridge = Bridge()
        self._work: Awaitable[None] | None = None
        self._error: BaseException | None = None
        self._stopping = False
        self._pausing = False
        self._parked = trio.Event()
        self._resumed = trio.Event()
        # Guards the thread id alone, for the moment of a kick: a signal must not be sent to a
        # thread that has ended, whose id may be somebody else's by now.
        self._kicking = threading.Lock()
        self._thread_id = 0

    # -- requests ------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the vCPU to end. Any thread; does not wait; idempotent."""
        self._stopping = True
        self._kick()

    def pause(self) -> None:
        """Ask the vCPU to drain and park; `parked` waits for it. From trio only."""
        self._parked, self._resumed = trio.Event(), trio.Event()
        self._pausing = True
        self._kick()

    async def parked(self) -> None:
        """Wait until the vCPU has parked after `pause`, or has ended.

        Cancelling the wait leaves the request standing until `resume`.
        """
        await self._parked.wait()

    def resume(self) -> None:
        """Take a `pause` back, whether the vCPU has parked yet or not. From trio only."""
        self._pausing = False
        self._resumed.set()

    def _kick(self) -> None:
        with self._kicking:
            self._vcpu.page.immediate_exit = 1
            if self._thread_id:
                kick(self._thread_id)

    # -- the thread ----------------------------------------------------------------------

    def _main(self) -> None:
        try:
            accept_kicks()
            with self._kicking:
                self._thread_id = threading.get_native_id()
            self._run()
        except BaseException as error:
            self._error = error
        finally:
            with self._kicking:
                self._thread_id = 0
            self._work = None
            self._bridge.leave()

    def _run(self) -> None:
        run, serve, page = self._vcpu.run, self._exits.serve, self._vcpu.page
        while True:
            status = run()
            if status >= 0:
                pending = serve(status)
                if pending is not None:
                    self._hand_over(pending)
                continue
            if status not in (-errno.EINTR, -errno.EAGAIN):
                raise KvmError("KVM_RUN", -status)
            page.immediate_exit = 0
            if self._pausing and not self._stopping:
                self._drain()
                self._hand_over(self._park())
            if self._stopping:
                return

    def _drain(self) -> None:
        """Let the kernel finish what it has pending; see "Parking" at the top."""
        page = self._vcpu.page
        for _ in range(DRAIN_LIMIT):
            page.immediate_exit = 1
            status = self._vcpu.run()
            if status == -errno.EINTR:
                page.immediate_exit = 0
                return
            if status >= 0:
                pending = self._exits.serve(status)
                if pending is not None:
                    self._hand_over(pending)
            elif status != -errno.EAGAIN:
                raise KvmError("KVM_RUN", -status)
        raise VcpuError(
            f"vCPU {self.index} was not drained after {DRAIN_LIMIT} exits; "
            f"the last one was {self._exits.report()}"
        )

    def _hand_over(self, work: Awaitable[None]) -> None:
        self._work = work
        self._bridge.call()

    # -- the task ------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the vCPU, in a thread that has ended when this returns or raises.

        Raises what a handler raised, `VcpuError` for an exit that cannot be served, `KvmError`
        where `KVM_RUN` fails; each says what the vCPU was at. Cancelling stops the vCPU and
        leaves its exit unfinished: the vCPU is not to be run again.
        """
        install_kick()
        thread = threading.Thread(target=self._main, name=f"avmm vCPU {self.index}", daemon=True)
        thread.start()
        try:
            await self._serve()
        except Exception as error:
            self._annotate(error)
            raise
        finally:
            await self._wind_up()
            thread.join()
            self._parked.set()
            self._bridge.close()
        if self._error is not None:
            if isinstance(self._error, Exception):
                self._annotate(self._error)
            raise self._error

    async def _serve(self) -> None:
        yielded = time.perf_counter()
        mine = self._bridge.poll(True)
        while (work := await self._next(mine)) is not None:
            await work
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
        return self._work

    async def _wind_up(self) -> None:
        """Stop the thread and answer it until it has left, whoever has the turn now."""
        self.stop()
        self._resumed.set()
        with trio.CancelScope(shield=True):
            while (work := await self._next(self._bridge.poll(False))) is not None:
                if inspect.iscoroutine(work):
                    work.close()
                self._bridge.answer()

    async def _park(self) -> None:
        self._parked.set()
        await self._resumed.wait()

    def _annotate(self, error: Exception) -> None:
        if not isinstance(error, VcpuError):
            error.add_note(f"vCPU {self.index} was at {self._exits.report()}")
