"""The verbs: what can be asked of a running machine from outside.

Each verb is a class, and all that is known about the verb is in that class. Its fields are the
verb's arguments, each with a check and a help text; its docstring is the verb's help; `run` does
what was asked and returns the answer, in a form that JSON can hold. `parse` makes a verb out of
plain data that may come from anywhere. The control socket (`avmm.control.protocol` has its lines)
and `avmm ctl` get their names, arguments and help from here.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Final, NotRequired, TypeAlias, TypedDict

import trio

from avmm.control.holds import CONTROL, Holds
from avmm.errors import AvmmError, ConfigError, HandOverUnknownError
from avmm.machine import Machine
from avmm.outcome import Cause
from avmm.progress import MigrationProgress, SnapshotProgress
from avmm.runstate import Runstate
from avmm.transfer import transports
from avmm.transfer.targets import Target
from avmm.transfer.tls import Tls

logger = logging.getLogger(__name__)

_NOBODY_KNOWS: Final = "it is not known on which side it runs"

Progress: TypeAlias = Mapping[str, Any]
"""The progress of a snapshot or a migration: the fields of `avmm.SnapshotProgress` or of
`avmm.MigrationProgress`. A migration adds `seconds`, the time since it began. JSON has no
infinity: None stands for it.
"""
Emit: TypeAlias = Callable[[Progress], None]


class RequestError(ConfigError):
    """The request is not a verb, or its arguments are wrong. The text names the argument, and says
    what was expected.
    """


class Control:
    """One machine as the verbs see it: who holds it paused, and what is under way."""

    def __init__(self, vm: Machine, holds: Holds) -> None:
        self._vm = vm
        self._holds = holds
        self._copied = ""
        self.target: Target | None = None
        """Where the guest is being migrated to; None if it is not."""
        self.progress: Progress = {}
        """How far the migration is."""
        self.unsettled = ""
        """Why nobody knows where the guest runs; empty if that is known."""
        self.was_stopped = False
        """Has a client asked to end the guest?"""
        self.moved_to = ""
        """Where the guest was last handed over to, even if that may have failed."""

    @property
    def vm(self) -> Machine:
        """The machine. Raises `AvmmError` if there is none yet."""
        return self._vm

    @property
    def holds(self) -> Holds:
        """Who holds it paused. Raises `AvmmError` if there is no machine yet."""
        return self._holds

    def status(self) -> Status:
        """The guest's state."""
        vm = self.vm
        state = "paused" if vm.is_paused else "running"
        moving = None
        if self.target is not None:
            state, moving = "migrating", {"target": str(self.target), **self.progress}
        if vm.is_unsettled:
            state = "unsettled"
        if vm.state is Runstate.ENDED:
            state = "ended"
        return {
            "state": state,
            "pauses": self.holds.counts,
            "cpus": vm.config.cpus,
            "memory": vm.config.memory,
            "engine": vm.engine,
            "pid": os.getpid(),
            "migration": moving,
            "unsettled": (self.unsettled or _NOBODY_KNOWS) if vm.is_unsettled else None,
        }

    async def stop(self) -> None:
        """End the guest, and wait for its end."""
        self.was_stopped = True
        self.vm.stop()
        await self.vm.wait()

    @contextmanager
    def copying(self, what: str) -> Iterator[None]:
        """RAM is copied inside the block. Raises `AvmmError` if it is being copied already."""
        if self._copied:
            raise AvmmError(f"not now: {self._copied}")
        self._copied = what
        try:
            yield
        finally:
            self._copied = ""


class NoGuestYet(Control):
    """What the verbs see while a process waits for a guest from another one."""

    def __init__(self, where: str, stop: Callable[[], None]) -> None:
        self._where = where
        self._stop = stop

    @property
    def vm(self) -> Machine:
        """See `Control.vm`."""
        raise self._refusal()

    @property
    def holds(self) -> Holds:
        """See `Control.holds`."""
        raise self._refusal()

    def _refusal(self) -> AvmmError:
        return AvmmError(f"there is no guest yet: this process waits for one at {self._where}")

    def status(self) -> Status:
        """See `Control.status`."""
        return {
            "state": f"waiting at {self._where}",
            "pauses": {},
            "cpus": 0,
            "memory": 0,
            "engine": "",
            "pid": os.getpid(),
            "migration": None,
            "unsettled": None,
        }

    async def stop(self) -> None:
        """Stop waiting."""
        await trio.lowlevel.checkpoint()
        self._stop()


# -- answers ------------------------------------------------------------------------------------


class Status(TypedDict):
    """The guest's state."""

    state: str
    """running, paused, migrating, unsettled or ended; or "waiting at", and where, if the guest has
    not come yet. Then `cpus` and `memory` are 0."""
    pauses: dict[str, int]
    """How many pauses of each holder there are."""
    cpus: int
    memory: int
    """In bytes."""
    engine: NotRequired[str]
    """kvm, or soft if the software engine runs the guest. Empty if it has not come yet. Missing if
    the guest's avmm is older than this key."""
    pid: int
    """The id of the process that the guest runs in."""
    migration: dict[str, Any] | None
    """While it is being migrated: `target`, and the latest `Progress`."""
    unsettled: str | None
    """Why the guest waits for `settle`; None if it does not."""


class Pauses(TypedDict):
    """The number of pauses of each holder now."""

    pauses: dict[str, int]


class SnapshotTaken(TypedDict):
    """A snapshot has been written."""

    seconds: float


class Moved(TypedDict):
    """The guest has moved: where to, and the fields of an `avmm.Report`."""

    target: str
    downtime: float
    total: float
    bytes_sent: int
    rounds: int


class Settled(TypedDict):
    """The operator has decided where the guest runs."""

    runs: str


class Stopped(TypedDict):
    """The guest has ended."""


Answer: TypeAlias = Status | Pauses | SnapshotTaken | Moved | Settled | Stopped


# -- what arguments take --------------------------------------------------------------------------


def _text(name: str, value: object) -> str:
    if type(value) is str and value and "\0" not in value:
        with suppress(UnicodeEncodeError):
            os.fsencode(value)
            return value
    raise RequestError(f"{name}: expected text")


def _positive(name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1 << 63:
        return float(value)
    raise RequestError(f"{name}: expected a number above 0 and below 2**63")


def _absolute(name: str, value: object) -> Path:
    path = Path(_text(name, value))
    if not path.is_absolute():
        raise RequestError(f"{name} {str(path)!r}: expected an absolute path")
    return path


def _target(name: str, value: object) -> Target:
    return Target.parse(_text(name, value), fd=False)


def _tls(name: str, value: object) -> Tls:
    if not isinstance(value, dict) or set(value) - {"peer"} != {"cert", "key", "ca"}:
        raise RequestError(f"{name}: expected cert, key and ca, and perhaps peer")
    return Tls(**{part: _text(f"{name} {part}", path) for part, path in value.items()})


def _place(name: str, value: object) -> str:
    text = _text(name, value)
    if text not in ("here", "there"):
        raise RequestError(f"{name} {text!r}: expected 'here' or 'there'")
    return text


def _takes(takes: Callable[[str, object], object], text: str) -> dict[str, object]:
    """An argument's metadata: the function that checks it, and its help."""
    return {"takes": takes, "help": text}


# -- the verbs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verb:
    """Something that can be asked, with the arguments that it was asked with."""

    name: ClassVar[str]
    is_long: ClassVar[bool] = False
    """Is it cancelled when the client that asked for it has gone?"""

    async def run(self, control: Control, emit: Emit) -> Answer:
        """Carry the verb out, and report progress to `emit`. Raises `AvmmError` if it fails.
        Cancelling it leaves the guest running as before.
        """
        raise NotImplementedError

    @classmethod
    def help(cls, argument: str = "") -> str:
        """What the verb does, or what one of its arguments means, in a sentence."""
        if argument:
            return next(str(f.metadata["help"]) for f in fields(cls) if f.name == argument)
        return (cls.__doc__ or "").partition("\n")[0]


@dataclass(frozen=True)
class GetStatus(Verb):
    """Show the guest's state."""

    name = "status"

    async def run(self, control: Control, emit: Emit) -> Status:
        """See `Verb`."""
        await trio.lowlevel.checkpoint()
        return control.status()


_DEADLINE: Final = "Give up if the guest does not stand still within this time."


@dataclass(frozen=True)
class Pause(Verb):
    """Let the guest stand still until `resume`."""

    name = "pause"
    is_long = True
    deadline: float | None = field(default=None, metadata=_takes(_positive, _DEADLINE))

    async def run(self, control: Control, emit: Emit) -> Pauses:
        """See `Verb`. The pause outlives the client that asked for it."""
        await control.holds.hold(CONTROL, self.deadline)
        return {"pauses": control.holds.counts}


@dataclass(frozen=True)
class Resume(Verb):
    """Undo one `pause`."""

    name = "resume"

    async def run(self, control: Control, emit: Emit) -> Pauses:
        """See `Verb`."""
        holds = control.holds
        if not holds.counts[CONTROL]:
            others = f"; it is paused by {holds}" if str(holds) else ""
            raise AvmmError(f"the control socket has not paused the guest{others}")
        await holds.let_go(CONTROL)
        return {"pauses": holds.counts}


@dataclass(frozen=True)
class TakeSnapshot(Verb):
    """Write the guest to a file, for `avmm restore`. The guest runs on."""

    name = "snapshot"
    is_long = True
    file: Path = field(metadata=_takes(_absolute, "The file to write: an absolute path."))
    deadline: float | None = field(default=None, metadata=_takes(_positive, _DEADLINE))

    async def run(self, control: Control, emit: Emit) -> SnapshotTaken:
        """See `Verb`."""

        def tell(progress: SnapshotProgress) -> None:
            emit(asdict(progress))

        begin = trio.current_time()
        vm = control.vm
        with control.copying("a snapshot is being written"):
            await vm.snapshot(self.file, deadline=self.deadline, on_progress=tell)
        return {"seconds": trio.current_time() - begin}


@dataclass(frozen=True)
class Migrate(Verb):
    """Hand the guest over to an `avmm receive`."""

    name = "migrate"
    is_long = True
    target: Target = field(
        metadata=_takes(_target, "Where an `avmm receive` waits: unix:PATH or tcp:HOST:PORT.")
    )
    bandwidth: float | None = field(
        default=None, metadata=_takes(_positive, "The most bytes to send per second.")
    )
    downtime: float = field(
        default=0.1, metadata=_takes(_positive, "How long the guest may stand still, in seconds.")
    )
    deadline: float | None = field(default=None, metadata=_takes(_positive, _DEADLINE))
    tls: Tls | None = field(
        default=None, metadata=_takes(_tls, "Files in PEM, for TCP: cert, key and ca.")
    )

    async def run(self, control: Control, emit: Emit) -> Moved:
        """See `Verb`."""
        vm, holds = control.vm, control.holds
        if vm.is_unsettled:
            raise AvmmError("the guest was handed over and no answer came: it waits for settle")
        if str(holds):
            raise AvmmError(
                f"the guest is paused by {holds}, but would run at its destination: "
                "let it run on first"
            )
        with control.copying("the guest is being migrated"):
            control.target, holds.refusal = self.target, "it is being migrated"
            control.moved_to = str(self.target)
            try:
                return await self._hand_over(control, emit)
            except HandOverUnknownError as error:
                control.unsettled = str(error)
                logger.error("%s", error)
                raise
            finally:
                control.target, control.progress = None, {}
                holds.refusal = _NOBODY_KNOWS if vm.is_unsettled else ""

    async def _hand_over(self, control: Control, emit: Emit) -> Moved:
        target = str(self.target)
        stream = await transports.connect(target, tls=self.tls)
        begin = trio.current_time()

        def tell(progress: MigrationProgress) -> None:
            told = asdict(progress) | {"seconds": trio.current_time() - begin}
            control.progress = {
                name: None if math.isinf(value) else value for name, value in told.items()
            }
            emit(control.progress)

        try:
            report = await control.vm.migrate(
                stream,
                target_downtime=self.downtime,
                bandwidth=self.bandwidth,
                deadline=self.deadline,
                on_progress=tell,
            )
        finally:
            await transports.close(stream)
        return {
            "target": target,
            "downtime": report.downtime,
            "total": report.total,
            "bytes_sent": report.bytes_sent,
            "rounds": report.rounds,
        }


@dataclass(frozen=True)
class Settle(Verb):
    """Say where the guest runs, if it was handed over and no answer came."""

    name = "settle"
    runs: str = field(metadata=_takes(_place, "here or there; see `avmm.Machine.settle`."))

    async def run(self, control: Control, emit: Emit) -> Settled:
        """See `Verb`."""
        await control.vm.settle(runs_here=self.runs == "here")
        control.unsettled = control.holds.refusal = ""
        return {"runs": self.runs}


@dataclass(frozen=True)
class Powerdown(Verb):
    """Press the guest's power button, and wait until it has shut down."""

    name = "powerdown"
    is_long = True
    deadline: float | None = field(
        default=None,
        metadata=_takes(_positive, "Give up if the guest has not ended within this time."),
    )

    async def run(self, control: Control, emit: Emit) -> Stopped:
        """See `Verb`. A button that was pressed cannot be taken back."""
        vm = control.vm
        if str(control.holds):
            raise AvmmError(f"the guest is paused by {control.holds}: let it run on first")
        vm.powerdown()
        with trio.move_on_after(math.inf if self.deadline is None else self.deadline) as scope:
            outcome = await vm.wait()
            if outcome.cause is Cause.MOVED:
                raise AvmmError(f"the guest has moved to {control.moved_to} meanwhile")
        if scope.cancelled_caught:
            raise AvmmError(f"the guest has not ended within {self.deadline:g} s, and runs on")
        return {}


@dataclass(frozen=True)
class Stop(Verb):
    """End the guest, as if its power had failed."""

    name = "stop"

    async def run(self, control: Control, emit: Emit) -> Stopped:
        """See `Verb`."""
        await control.stop()
        return {}


VERBS: Final[Mapping[str, type[Verb]]] = {
    verb.name: verb
    for verb in (GetStatus, Pause, Resume, TakeSnapshot, Migrate, Settle, Powerdown, Stop)
}
"""All of them, by their names."""


def parse(name: object, arguments: Mapping[str, object]) -> Verb:
    """The verb with this name and these arguments, which are hostile input. Raises `RequestError`,
    and `ConfigError` if the target is not valid.
    """
    verb = VERBS.get(name) if isinstance(name, str) else None
    if verb is None:
        raise RequestError(f"there is no such command; expected one of {', '.join(VERBS)}")
    known = {f.name: f for f in fields(verb)}
    if unknown := set(arguments) - set(known):
        takes = ", ".join(known) or "no arguments"
        raise RequestError(f"{name}: unknown argument {min(unknown)[:40]!r}; it takes {takes}")
    required = {f.name for f in known.values() if f.default is MISSING}
    if missing := required - set(arguments):
        raise RequestError(f"{name}: expected {', '.join(sorted(missing))}")
    return verb(
        **{key: known[key].metadata["takes"](key, value) for key, value in arguments.items()}
    )
