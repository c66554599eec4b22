"""One vCPU in one thread, without trio: what `drain`, `Exits` and the policy do, quickly.

`VcpuLoop`'s own loop can be run here, too (`InlineLoop`): its thread is the caller's, handing
over is awaiting at once, and requests come at points of the run that the test numbers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

from avmm import arch
from model.devices import Board, Entry, Wait, buses, calls, plug, recorders
from model.parking import ModelLot
from model.production import REAL, Production
from model.vcpu import UNKNOWN_EXIT, Broken, Host, ModelVcpu, Op, State

STEPS: Final = 2_000
"""KVM_RUNs or points after which a program that does not end is a failure."""


class _Beat:
    """Awaited, it lets its task wait once."""

    def __await__(self) -> Generator[None, None, None]:
        yield


async def _beats() -> None:
    for _ in range(2):
        await _Beat()


def drive(work: Awaitable[Any]) -> None:
    """Await `work` here and now."""
    iterator = work.__await__()
    for _ in iterator:
        pass


@dataclass(frozen=True)
class Result:
    """What a program has come to: equal results are equal runs."""

    log: tuple[Entry, ...]
    checksum: int
    pc: int
    taken: int = 0


class Solo:
    """One model vCPU with its devices and the production `Exits` between them."""

    def __init__(
        self,
        code: Production,
        program: Sequence[Op],
        host: Host,
        state: State | None = None,
        board: Board | None = None,
    ) -> None:
        self.code = code
        self.program = program
        self.host = host
        self.board = board or Board()
        self.model = ModelVcpu(self.board.index, program, host, state)
        onto = buses()
        self.model.gate = self._leave_when_idle
        self.late: Callable[[], bool] = lambda: False
        for recorder in recorders(self.board):
            recorder.later = self._later
            plug(recorder, onto, nullcontext())
        self.exits = make_exits(code, self.model, onto, self.board, calls(self.board, self._later))

    def _later(self) -> Wait:
        return _beats if self.late() else None

    def _leave_when_idle(self, point: str) -> None:
        if point == "idle":
            self.model.signal()

    def serve(self, reason: int) -> None:
        """Serve an exit and await what its handler left to be awaited."""
        pending = self.exits.serve(reason)
        if pending is not None:
            drive(pending)

    def again(self, host: Host | None = None) -> Solo:
        """This one's state, saved and loaded into a new one, perhaps on another host."""
        return Solo(
            self.code, self.program, host or self.host, self.model.state(), self.board.copy()
        )

    def step(self) -> int:
        """One KVM_RUN, and its exit served; gives its status."""
        status = self.model.run()
        if status >= 0:
            self.serve(status)
        return status

    def to_end(self) -> Result:
        """Run on undisturbed."""
        for _ in range(STEPS):
            if self.model.finished:
                return self.result()
            self.step()
        raise Broken("the program does not come to its end")

    def result(self) -> Result:
        state = self.model.state()
        taken = state.taken + sum(state.interrupts)
        return Result(tuple(self.board.log), state.checksum, state.pc, taken)


def make_exits(
    code: Production, model: ModelVcpu, onto: dict[str, Any], board: Board, handler: Any
) -> Any:
    """Production's `Exits`, which for once knows the exit that nobody knows."""

    def unknown() -> None:
        model.page.unknown = board.note("unknown", 0)

    exits = code.exits.Exits(model, onto, arch.host().exit_reasons, lambda end: None, str, handler)
    exits._table[UNKNOWN_EXIT] = unknown
    return exits


def oracle(program: Sequence[Op], index: int = 0) -> Result:
    """What the program comes to undisturbed. Nothing of the drain takes part in it."""
    return Solo(REAL, program, Host(), board=Board(index)).to_end()


class InlineLoop:
    """Production's `VcpuLoop._run` in this thread, with requests at numbered points.

    `at_point` is called with each point's number and may call `pause`, `resume`, `kick` and
    `stop`; `parked` whenever the vCPU stands still.
    """

    def __init__(
        self,
        solo: Solo,
        policy: Any,
        at_point: Callable[[InlineLoop, int], None],
        parked: Callable[[InlineLoop], None],
    ) -> None:
        self.solo = solo
        self.points = 0
        self.parks = 0
        self._at_point, self._on_park = at_point, parked
        self._quiet = False
        loop_module = solo.code.loop
        inline = self

        class Loop(loop_module.VcpuLoop):  # type: ignore[misc, name-defined]
            def _hand_over(self, work: Any) -> None:
                inline.point("handed over")
                drive(work)

        self._lot = ModelLot([solo.model])
        spot = self._lot.spots[0]
        spot.park = self._park  # type: ignore[method-assign]
        self.loop = Loop(solo.model, solo.exits, policy, spot)
        solo.model.gate = self.point

    def point(self, name: str) -> None:
        """A moment at which requests may arrive."""
        if self._quiet:
            return
        self.points += 1
        if self.points > STEPS:
            raise Broken(f"the vCPU runs on for ever, now at {name}")
        self._quiet = True  # requests are made in no time: they have no points of their own
        try:
            if self.solo.model.finished and name in ("idle", "enter"):
                self.loop.stop()
            self._at_point(self, self.points)
        finally:
            self._quiet = False

    def pause(self) -> None:
        self._lot.ask()

    def resume(self) -> None:
        self._lot.release()

    def _park(self) -> None:
        self.solo.model.rest()
        if not self._lot.asked:
            return  # resumed on its way there
        self.parks += 1
        self._on_park(self)
        self.resume()

    def run(self) -> Result:
        """Until the program's end."""
        try:
            self.loop._run()
        finally:
            self.loop._bridge.close()
            self._lot.close()
        return self.solo.result()
