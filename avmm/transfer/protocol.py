"""The conversation of a migration: two state machines, without I/O. docs/migration.md.

    source                        destination
    HELLO            ->
                     <-           HELLO
    OFFER            ->                             compared before any byte of memory
                     <-           ACCEPT
    PAGES, ROUND ... ->                             the guest runs at the source
    STATE ..., STATE_END ->                         it stands still
                     <-           READY             all is loaded, and could run
    COMMIT           ->                             now the source never runs it, but after ABORT
                     <-           RUNNING

Before COMMIT either may say ABORT, and why, or just go away: the guest runs on at the source. A
destination runs it only when COMMIT has come whole. That leaves one case which no protocol can
decide: COMMIT may have left and RUNNING does not come. Then the source keeps the guest stopped
(`SourceState.COMMITTED`), and a person decides. A destination that says ABORT never runs the
guest, whatever comes: where it gave up before it got COMMIT, its ABORT is an answer to that, too.

Each method that makes a frame may be called in one state only; each frame that comes may come in
one state only. Everything else raises `ProtocolError`, after which nothing goes on.

**Where the guest is** follows from the states of the two sides, and from nothing else. What each
side does besides talking is in its table, too (`SOURCE_DOES`, `DESTINATION_DOES`): that the guest
stands still, that what only one host may hold was released or acquired, that the side gave up. The
source ends in one of three states: DONE, the guest runs there; ABORTED, it runs on here; UNKNOWN,
it stays stopped and a person decides. From RELEASED on, giving up leads through TAKING_BACK: a
guest must not run on without what it has released. The code that moves a guest asks the state
what is left to do, and keeps no notes of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Generic, TypeVar

from avmm.errors import PeerAbortedError, ProtocolError, StateError
from avmm.memory.pages import RUN_BYTES, Packed
from avmm.plain import decode, encode
from avmm.transfer.frames import STATE_PIECE, Buffer, Decoder, Encoder, Frame, Kind

VERSIONS: Final = (1,)
"""Of the protocol, that this avmm speaks, best first."""
MOST_STATE: Final = 1 << 30
"""Bytes of state, all but RAM, that a destination takes."""
_COUNT: Final = struct.Struct("<I")


class Act(Enum):
    """What a side does besides saying or hearing a frame."""

    STAND_STILL = "the guest stands still"
    RELEASE = "what only one host may hold is being released"
    GIVE_UP = "this side gives up"
    TAKE_BACK = "what was released is held again"
    LOSE = "nobody knows where the guest runs, or it cannot run"
    ACQUIRE = "what only one host may hold is held"
    LET_GO = "nothing of the guest is left"


class SourceState(Enum):
    """What the source has done, and so what may come next."""

    NEW = "nothing was said"
    GREETED = "waits for HELLO"
    AGREED = "may offer"
    OFFERED = "waits for ACCEPT"
    COPYING = "may send pages of a guest that runs"
    STANDING = "may send the last pages of a guest that stands still"
    RELEASED = "may send the state"
    STATED = "waits for READY"
    READY = "may commit"
    COMMITTED = "waits for RUNNING"
    DONE = "the guest runs at the destination"
    TAKING_BACK = "gave up, and takes back what was released"
    ABORTED = "gave up: the guest runs on here"
    UNKNOWN = "keeps the guest stopped until a person decides"


_S = SourceState

SOURCE_DOES: Final[Mapping[SourceState, Mapping[Kind | Act, SourceState]]] = {
    _S.NEW: {Kind.HELLO: _S.GREETED, Act.GIVE_UP: _S.ABORTED},
    _S.GREETED: {Act.GIVE_UP: _S.ABORTED},
    _S.AGREED: {Kind.OFFER: _S.OFFERED, Act.GIVE_UP: _S.ABORTED},
    _S.OFFERED: {Act.GIVE_UP: _S.ABORTED},
    _S.COPYING: {
        Kind.PAGES: _S.COPYING,
        Kind.ROUND: _S.COPYING,
        Act.STAND_STILL: _S.STANDING,
        Act.GIVE_UP: _S.ABORTED,
    },
    _S.STANDING: {
        Kind.PAGES: _S.STANDING,
        Kind.ROUND: _S.STANDING,
        Act.RELEASE: _S.RELEASED,
        Act.GIVE_UP: _S.ABORTED,
    },
    _S.RELEASED: {Kind.STATE: _S.STATED, Act.GIVE_UP: _S.TAKING_BACK},
    _S.STATED: {Act.GIVE_UP: _S.TAKING_BACK},
    _S.READY: {Kind.COMMIT: _S.COMMITTED, Act.GIVE_UP: _S.TAKING_BACK},
    _S.COMMITTED: {Act.LOSE: _S.UNKNOWN},  # COMMIT may have left: it cannot give up any more
    _S.TAKING_BACK: {
        Kind.ABORT: _S.TAKING_BACK,
        Act.TAKE_BACK: _S.ABORTED,
        Act.LOSE: _S.UNKNOWN,
    },
    _S.ABORTED: {Kind.ABORT: _S.ABORTED},
    _S.DONE: {},
    _S.UNKNOWN: {},
}
"""What the source may say or do in each state, and what it is in after that. STATE stands for all
frames of the state, which are said in one go."""

SOURCE_HEARS: Final[Mapping[SourceState, Mapping[Kind, SourceState]]] = {
    _S.NEW: {Kind.ABORT: _S.ABORTED},
    _S.GREETED: {Kind.HELLO: _S.AGREED, Kind.ABORT: _S.ABORTED},
    _S.AGREED: {Kind.ABORT: _S.ABORTED},
    _S.OFFERED: {Kind.ACCEPT: _S.COPYING, Kind.ABORT: _S.ABORTED},
    _S.COPYING: {Kind.ABORT: _S.ABORTED},
    _S.STANDING: {Kind.ABORT: _S.ABORTED},
    _S.RELEASED: {Kind.ABORT: _S.TAKING_BACK},
    _S.STATED: {Kind.READY: _S.READY, Kind.ABORT: _S.TAKING_BACK},
    _S.READY: {Kind.ABORT: _S.TAKING_BACK},
    _S.COMMITTED: {Kind.RUNNING: _S.DONE, Kind.ABORT: _S.TAKING_BACK},
    _S.TAKING_BACK: {},
    _S.ABORTED: {},
    _S.DONE: {},
    _S.UNKNOWN: {},
}
"""What may come in each state, and what it is in after that. (An ABORT that comes in another state
changes nothing any more.)"""


class DestinationState(Enum):
    """What the destination has got, and so what may come next."""

    NEW = "waits for HELLO"
    GREETED = "waits for OFFER"
    OFFERED = "may accept"
    COPYING = "waits for pages or the state"
    STATED = "may acquire what the guest needs"
    ACQUIRED = "may say that it is ready"
    READY = "waits for COMMIT"
    COMMITTED = "may run the guest"
    DONE = "the guest runs here"
    LETTING_GO = "gave up, and lets go of what it has acquired"
    ABORTED = "gave up: the guest is not here"


_D = DestinationState

DESTINATION_DOES: Final[Mapping[DestinationState, Mapping[Kind | Act, DestinationState]]] = {
    _D.NEW: {Act.GIVE_UP: _D.ABORTED},
    _D.GREETED: {Act.GIVE_UP: _D.ABORTED},
    _D.OFFERED: {Kind.ACCEPT: _D.COPYING, Act.GIVE_UP: _D.ABORTED},
    _D.COPYING: {Act.GIVE_UP: _D.ABORTED},
    _D.STATED: {Act.ACQUIRE: _D.ACQUIRED, Act.GIVE_UP: _D.ABORTED},
    _D.ACQUIRED: {Kind.READY: _D.READY, Act.GIVE_UP: _D.LETTING_GO},
    _D.READY: {Act.GIVE_UP: _D.LETTING_GO},
    _D.COMMITTED: {Kind.RUNNING: _D.DONE},  # the source never runs it: it cannot give up any more
    _D.DONE: {},
    _D.LETTING_GO: {Act.LET_GO: _D.ABORTED},
    _D.ABORTED: {Kind.ABORT: _D.ABORTED},
}
"""As `SOURCE_DOES`. It says ABORT only when it holds nothing: the source takes that back then."""

DESTINATION_HEARS: Final[Mapping[DestinationState, Mapping[Kind, DestinationState]]] = {
    _D.NEW: {Kind.HELLO: _D.GREETED, Kind.ABORT: _D.ABORTED},
    _D.GREETED: {Kind.OFFER: _D.OFFERED, Kind.ABORT: _D.ABORTED},
    _D.OFFERED: {Kind.ABORT: _D.ABORTED},
    _D.COPYING: {
        Kind.PAGES: _D.COPYING,
        Kind.ROUND: _D.COPYING,
        Kind.STATE: _D.COPYING,
        Kind.STATE_END: _D.STATED,
        Kind.ABORT: _D.ABORTED,
    },
    _D.STATED: {Kind.ABORT: _D.ABORTED},
    _D.ACQUIRED: {Kind.ABORT: _D.LETTING_GO},
    _D.READY: {Kind.COMMIT: _D.COMMITTED, Kind.ABORT: _D.LETTING_GO},
    _D.COMMITTED: {},
    _D.DONE: {},
    _D.LETTING_GO: {},
    _D.ABORTED: {},
}
"""As `SOURCE_HEARS`."""


@dataclass(frozen=True, slots=True)
class Offer:
    """The source tells what the guest is (`avmm.parts.description`)."""

    description: Any


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of RAM, checked for their shape only."""

    packed: Packed


@dataclass(frozen=True, slots=True)
class Round:
    """All pages of a round have come."""

    number: int


@dataclass(frozen=True, slots=True)
class State:
    """All but RAM; the guest stands still."""

    state: Any


@dataclass(frozen=True, slots=True)
class Commit:
    """The guest is the destination's."""


_State = TypeVar("_State", SourceState, DestinationState)


class _Side(Generic[_State]):
    """One end of the conversation; `state` moves by its two tables."""

    def __init__(
        self,
        name: str,
        state: _State,
        does: Mapping[_State, Mapping[Kind | Act, _State]],
        hears: Mapping[_State, Mapping[Kind, _State]],
    ) -> None:
        self.state: _State = state
        self._name = name
        self._does: Mapping[_State, Mapping[Kind | Act, _State]] = does
        self._hears: Mapping[_State, Mapping[Kind, _State]] = hears
        self._encoder = Encoder()
        self._decoder = Decoder()

    def feed(self, data: Buffer) -> None:
        """Bytes that have come."""
        self._decoder.feed(data)

    def feed_end(self) -> None:
        """The other side will say nothing more; raises `ProtocolError`."""
        raise ProtocolError("the line was cut" + ("" if self._decoder.is_empty else " in a frame"))

    def give_up(self) -> None:
        """This side gives up, unless one of both has done so already or it is too late for it."""
        if Act.GIVE_UP in self._does[self.state]:
            self._do(Act.GIVE_UP)

    def abort(self, why: str) -> list[Buffer]:
        """ABORT: this side has given up, for good. Nothing may be said after it."""
        self._do(Kind.ABORT)
        return self._encoder.frame(Kind.ABORT, encode({"why": _printable(why[:4000])}))

    def _do(self, what: Kind | Act) -> None:
        if what not in self._does[self.state]:
            where = [state.name for state, row in self._does.items() if what in row]
            raise ProtocolError(
                f"the {self._name} is in {self.state.name} ({self.state.value}), expected "
                f"{' or '.join(where)}"
            )
        self.state = self._does[self.state][what]

    def _next(self) -> Frame | None:
        """The next frame, if one is whole and may come now."""
        frame = self._decoder.next()
        if frame is None:
            return None
        if frame.kind is Kind.ABORT:
            self.state = self._hears[self.state].get(frame.kind, self.state)
            why = _field(frame, "why", str)
            raise PeerAbortedError(f"the other side gave up: {_printable(why)}")
        if frame.kind not in self._hears[self.state]:
            raise ProtocolError(
                f"{frame.kind.name} came while the {self._name} {self.state.value}"
            )
        return frame

    def _heard(self, frame: Frame) -> None:
        """What is in it is in order."""
        self.state = self._hears[self.state][frame.kind]


class Source(_Side[SourceState]):
    """The side that the guest leaves."""

    def __init__(self, identity: bytes) -> None:
        """`identity`: 16 random bytes that tell this migration from others."""
        super().__init__("source", SourceState.NEW, SOURCE_DOES, SOURCE_HEARS)
        self._identity = identity

    def next(self) -> bool:
        """Take what has come, if a frame is whole: did one come? `state` has changed then."""
        frame = self._next()
        if frame is None:
            return False
        if frame.kind is Kind.HELLO:
            _demand_version(frame)
        self._heard(frame)
        return True

    def hello(self) -> list[Buffer]:
        """HELLO."""
        self._do(Kind.HELLO)
        hello = {"versions": list(VERSIONS), "identity": self._identity}
        return self._encoder.frame(Kind.HELLO, encode(hello))

    def offer(self, description: Any) -> list[Buffer]:
        """OFFER."""
        self._do(Kind.OFFER)
        return self._encoder.frame(Kind.OFFER, encode(description))

    def pages(self, packed: Packed) -> list[Buffer]:
        """PAGES; the buffers are those of `packed`."""
        self._do(Kind.PAGES)
        count = _COUNT.pack(len(packed.runs) // RUN_BYTES)
        return self._encoder.frame(Kind.PAGES, count, packed.runs, packed.data)

    def round(self, number: int) -> list[Buffer]:
        """ROUND: all pages of this round were sent."""
        self._do(Kind.ROUND)
        return self._encoder.frame(Kind.ROUND, encode({"number": number}))

    def stand_still(self) -> None:
        """The guest stands still, and will until this is over."""
        self._do(Act.STAND_STILL)

    def release(self) -> None:
        """What only one host may hold is about to be released."""
        self._do(Act.RELEASE)

    def stated(self, state: Any) -> Iterator[list[Buffer]]:
        """STATE and STATE_END, frame by frame."""
        self._do(Kind.STATE)
        data = memoryview(encode(state))
        if len(data) > MOST_STATE:
            raise ProtocolError(f"the state has {len(data)} bytes, at most {MOST_STATE} can go")
        for at in range(0, len(data), STATE_PIECE):
            yield self._encoder.frame(Kind.STATE, data[at : at + STATE_PIECE])
        yield self._encoder.frame(Kind.STATE_END, encode({"bytes": len(data)}))

    def commit(self) -> list[Buffer]:
        """COMMIT. Once the first byte of it may have left, the source never runs the guest, unless
        the destination says ABORT."""
        self._do(Kind.COMMIT)
        return self._encoder.frame(Kind.COMMIT, encode({"identity": self._identity}))

    def take_back(self) -> None:
        """What was released is held again: the guest may run on."""
        self._do(Act.TAKE_BACK)

    def lose(self) -> None:
        """No answer came to COMMIT, or what was released is somebody else's."""
        self._do(Act.LOSE)


Event = Offer | Pages | Round | State | Commit


class Destination(_Side[DestinationState]):
    """The side that the guest comes to."""

    def __init__(self) -> None:
        super().__init__("destination", DestinationState.NEW, DESTINATION_DOES, DESTINATION_HEARS)
        self._identity = b""
        self._collected = bytearray()

    def next(self) -> tuple[Event | None, list[Buffer]] | None:
        """Take what has come, if a frame is whole: what it says, and what to answer at once."""
        frame = self._next()
        if frame is None:
            return None
        taken = self._take(frame)
        self._heard(frame)
        return taken

    def _take(self, frame: Frame) -> tuple[Event | None, list[Buffer]]:
        take: dict[Kind, Callable[[Frame], tuple[Event | None, list[Buffer]]]] = {
            Kind.HELLO: self._hello,
            Kind.OFFER: self._offer,
            Kind.PAGES: self._pages,
            Kind.ROUND: self._round,
            Kind.STATE: self._piece,
            Kind.STATE_END: self._stated,
            Kind.COMMIT: self._commit,
        }
        return take[frame.kind](frame)

    def _hello(self, frame: Frame) -> tuple[None, list[Buffer]]:
        _demand_version(frame)
        identity = _field(frame, "identity", bytes)
        if len(identity) != 16:
            raise ProtocolError("a migration's identity has 16 bytes")
        self._identity = identity
        answer = {"versions": list(VERSIONS), "identity": self._identity}
        return None, self._encoder.frame(Kind.HELLO, encode(answer))

    def _offer(self, frame: Frame) -> tuple[Event, list[Buffer]]:
        return Offer(_decoded(frame)), []

    def _pages(self, frame: Frame) -> tuple[Event, list[Buffer]]:
        if self._collected:
            raise ProtocolError("PAGES came after STATE")
        payload = frame.payload
        if len(payload) < _COUNT.size:
            raise ProtocolError("PAGES without a number of runs")
        end = _COUNT.size + RUN_BYTES * _COUNT.unpack_from(payload)[0]
        if end > len(payload):
            raise ProtocolError("PAGES tells of more runs than it has")
        return Pages(Packed(payload[_COUNT.size : end], payload[end:])), []

    def _round(self, frame: Frame) -> tuple[Event, list[Buffer]]:
        return Round(_field(frame, "number", int)), []

    def _piece(self, frame: Frame) -> tuple[None, list[Buffer]]:
        if not frame.payload or len(self._collected) + len(frame.payload) > MOST_STATE:
            raise ProtocolError(f"the state is empty, or has more than {MOST_STATE} bytes")
        self._collected += frame.payload
        return None, []

    def _stated(self, frame: Frame) -> tuple[Event, list[Buffer]]:
        if _field(frame, "bytes", int) != len(self._collected):
            raise ProtocolError("the state has not as many bytes as it should")
        state = _decoded(Frame(frame.kind, memoryview(self._collected)))
        self._collected = bytearray()
        return State(state), []

    def _commit(self, frame: Frame) -> tuple[Event, list[Buffer]]:
        if _field(frame, "identity", bytes) != self._identity:
            raise ProtocolError("COMMIT is of another migration")
        return Commit(), []

    def accept(self) -> list[Buffer]:
        """ACCEPT: a guest of that description can be here."""
        self._do(Kind.ACCEPT)
        return self._encoder.frame(Kind.ACCEPT)

    def acquire(self) -> None:
        """All is loaded, and what only one host may hold is held."""
        self._do(Act.ACQUIRE)

    def ready(self) -> list[Buffer]:
        """READY: the guest could run here."""
        self._do(Kind.READY)
        return self._encoder.frame(Kind.READY)

    def running(self) -> list[Buffer]:
        """RUNNING: the guest runs here."""
        self._do(Kind.RUNNING)
        return self._encoder.frame(Kind.RUNNING)

    def let_go(self) -> None:
        """What was acquired is not held any more."""
        self._do(Act.LET_GO)


def _decoded(frame: Frame) -> Any:
    try:
        return decode(frame.payload, frame.kind.name)
    except StateError as error:
        raise ProtocolError(str(error)) from None


def _printable(text: str) -> str:
    """It may hold a path's bytes that are no text, or a peer's commands for a terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _field(frame: Frame, name: str, kind: type) -> Any:
    fields = _decoded(frame)
    if type(fields) is not dict or type(fields.get(name)) is not kind:
        raise ProtocolError(f"{frame.kind.name} without its {name}")
    return fields[name]


def _demand_version(frame: Frame) -> None:
    versions = _field(frame, "versions", list)
    if not set(VERSIONS) & {version for version in versions if type(version) is int}:
        raise ProtocolError(
            f"the other side speaks versions {versions!r} of the protocol, this one "
            f"{list(VERSIONS)}"
        )
