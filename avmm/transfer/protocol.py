"""The conversation of a migration: two state machines, without I/O. docs/migration.md.

    source                        destination
    HELLO            ->
                     <-           HELLO
    OFFER            ->                             compared before any byte of memory
                     <-           ACCEPT
    PAGES, ROUND ... ->                             the guest runs at the source
    STATE ..., STATE_END ->                         it stands still
                     <-           READY             all is loaded, and could run
    COMMIT           ->                             now the source runs it only after ABORT
                     <-           RUNNING

Before COMMIT, either side may send ABORT with a reason, or just go away: then the guest runs on at
the source. A destination runs the guest only after all of COMMIT has come. That leaves one case
that no protocol can decide: COMMIT may have left, and RUNNING does not come. Then the source keeps
the guest stopped (`SourceState.COMMITTED`), and a person decides. A destination that sends ABORT
never runs the guest, whatever comes later. So its ABORT also answers a COMMIT that it had not got
when it gave up.

Each method that makes a frame may be called in only one state, and each frame may come in only one
state. Everything else raises `ProtocolError`, and the migration cannot continue.

The states and what may happen in each are in `avmm.transfer.states`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from avmm.errors import PeerAbortedError, ProtocolError, StateError
from avmm.memory.pages import RUN_BYTES, Packed
from avmm.plain import U64, Bytes, Fields, Int, ListOf, Text, decode, encode
from avmm.transfer.frames import STATE_PIECE, Buffer, Decoder, Encoder, Message, MessageKind
from avmm.transfer.states import (
    DESTINATION_DOES,
    DESTINATION_HEARS,
    SOURCE_DOES,
    SOURCE_HEARS,
    Act,
    DestinationState,
    SourceState,
)

VERSIONS: Final = (1,)
"""The versions of the protocol that this avmm speaks, best first."""
MOST_STATE: Final = 1 << 30
"""The most bytes of state, without RAM, that a destination accepts."""
_COUNT: Final = struct.Struct("<I")
_MOST_SHOWN: Final = 8
"""How many of the other side's versions an error shows at most."""
_IDENTITY: Final = Bytes(least=16, most=16)
_F = TypeVar("_F", bound=Fields)


class _Hello(Fields, error=ProtocolError, ignores_more=True):
    """The first message. It may have fields that this version does not know."""

    versions = ListOf(U64)
    identity = _IDENTITY


class _Abort(Fields, error=ProtocolError, ignores_more=True):
    """May come before a version is agreed on, so it may have fields that this version does not
    know."""

    why = Text()


class _Round(Fields, error=ProtocolError):
    number = U64


class _StateEnd(Fields, error=ProtocolError):
    bytes = Int(0, MOST_STATE)


class _Commit(Fields, error=ProtocolError):
    identity = _IDENTITY


@dataclass(frozen=True, slots=True)
class Offer:
    """The source describes the guest (`avmm.parts.description`)."""

    description: object


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of RAM. Only the format is checked."""

    packed: Packed


@dataclass(frozen=True, slots=True)
class Round:
    """All pages of a round have come."""

    number: int


@dataclass(frozen=True, slots=True)
class State:
    """The whole state except RAM. The guest stands still."""

    state: Any


@dataclass(frozen=True, slots=True)
class Commit:
    """The guest belongs to the destination now."""


_State = TypeVar("_State", SourceState, DestinationState)


class _Side(Generic[_State]):
    """One end of the conversation. Its two tables say how `state` may change."""

    def __init__(
        self,
        name: str,
        state: _State,
        does: Mapping[_State, Mapping[MessageKind | Act, _State]],
        hears: Mapping[_State, Mapping[MessageKind, _State]],
    ) -> None:
        self.state: _State = state
        self._name = name
        self._does: Mapping[_State, Mapping[MessageKind | Act, _State]] = does
        self._hears: Mapping[_State, Mapping[MessageKind, _State]] = hears
        self._encoder = Encoder()
        self._decoder = Decoder()

    def feed(self, data: Buffer) -> None:
        """Take bytes that have come."""
        self._decoder.feed(data)

    def feed_end(self) -> None:
        """The other side has ended the stream. Always raises `ProtocolError`."""
        raise ProtocolError("the line was cut" + ("" if self._decoder.is_empty else " in a frame"))

    @property
    def due(self) -> MessageKind | None:
        """The kind of the message that `next` will take, or None if not all of it has come. Raises
        `ProtocolError` if the bytes that come cannot be a frame."""
        return self._decoder.due

    def give_up(self) -> None:
        """This side gives up, unless either side has done so already or it is too late."""
        if Act.GIVE_UP in self._does[self.state]:
            self._do(Act.GIVE_UP)

    def abort(self, why: str) -> list[Buffer]:
        """ABORT: this side has given up for good. Nothing may be sent after it."""
        self._do(MessageKind.ABORT)
        told = _Abort.plain(why=_printable(why[:4000]))
        return self._encoder.frame(MessageKind.ABORT, encode(told))

    def _do(self, what: MessageKind | Act) -> None:
        if what not in self._does[self.state]:
            where = [state.name for state, row in self._does.items() if what in row]
            raise ProtocolError(
                f"the {self._name} is in {self.state.name} ({self.state.value}), expected "
                f"{' or '.join(where)}"
            )
        self.state = self._does[self.state][what]

    def _next(self) -> Message | None:
        """The next frame, or None if not all of it has come. Raises `ProtocolError` if it may not
        come now."""
        message = self._decoder.next()
        if message is None:
            return None
        if message.kind is MessageKind.ABORT:
            self.state = self._hears[self.state].get(message.kind, self.state)
            why = _read(_Abort, message).why
            raise PeerAbortedError(f"the other side gave up: {_printable(why)}")
        if message.kind not in self._hears[self.state]:
            raise ProtocolError(
                f"{message.kind.name} came while the {self._name} {self.state.value}"
            )
        return message

    def _heard(self, message: Message) -> None:
        """Change the state, after the contents of the message were found valid."""
        self.state = self._hears[self.state][message.kind]


class Source(_Side[SourceState]):
    """The side that the guest leaves."""

    def __init__(self, identity: bytes) -> None:
        """`identity`: 16 random bytes that distinguish this migration from others."""
        super().__init__("source", SourceState.NEW, SOURCE_DOES, SOURCE_HEARS)
        self._identity = identity

    def next(self) -> bool:
        """Take the next message if all of it has come. Returns whether it has; `state` has changed
        then."""
        message = self._next()
        if message is None:
            return False
        if message.kind is MessageKind.HELLO:
            _hello(message)
        self._heard(message)
        return True

    def hello(self) -> list[Buffer]:
        """HELLO."""
        self._do(MessageKind.HELLO)
        hello = _Hello.plain(versions=list(VERSIONS), identity=self._identity)
        return self._encoder.frame(MessageKind.HELLO, encode(hello))

    def offer(self, offer: bytes) -> list[Buffer]:
        """OFFER: the description of the guest, as `encode` makes it."""
        self._do(MessageKind.OFFER)
        return self._encoder.frame(MessageKind.OFFER, offer)

    def pages(self, packed: Packed) -> list[Buffer]:
        """PAGES, with the buffers of `packed`, which are not copied."""
        self._do(MessageKind.PAGES)
        count = _COUNT.pack(len(packed.runs) // RUN_BYTES)
        return self._encoder.frame(MessageKind.PAGES, count, packed.runs, packed.data)

    def round(self, number: int) -> list[Buffer]:
        """ROUND: all pages of this round were sent."""
        self._do(MessageKind.ROUND)
        return self._encoder.frame(MessageKind.ROUND, encode(_Round.plain(number=number)))

    def stand_still(self) -> None:
        """The guest stands still, and will do so until this is over."""
        self._do(Act.STAND_STILL)

    def release(self) -> None:
        """What only one host may hold is about to be released."""
        self._do(Act.RELEASE)

    def stated(self, state: bytes) -> Iterator[list[Buffer]]:
        """STATE and STATE_END, frame by frame. `state` is as `encode` makes it."""
        self._do(MessageKind.STATE)
        data = memoryview(state)
        if len(data) > MOST_STATE:
            raise ProtocolError(f"the state has {len(data)} bytes, expected at most {MOST_STATE}")
        for at in range(0, len(data), STATE_PIECE):
            yield self._encoder.frame(MessageKind.STATE, data[at : at + STATE_PIECE])
        yield self._encoder.frame(MessageKind.STATE_END, encode(_StateEnd.plain(bytes=len(data))))

    def commit(self) -> list[Buffer]:
        """COMMIT. Once its first byte may have left, the source never runs the guest, unless the
        destination sends ABORT."""
        self._do(MessageKind.COMMIT)
        told = _Commit.plain(identity=self._identity)
        return self._encoder.frame(MessageKind.COMMIT, encode(told))

    def take_back(self) -> None:
        """What was released is held again: the guest may run on."""
        self._do(Act.TAKE_BACK)

    def lose(self) -> None:
        """No answer came to COMMIT, or somebody else holds what was released."""
        self._do(Act.LOSE)


Event = Offer | Pages | Round | State | Commit


class Destination(_Side[DestinationState]):
    """The side that the guest comes to."""

    def __init__(self) -> None:
        super().__init__("destination", DestinationState.NEW, DESTINATION_DOES, DESTINATION_HEARS)
        self._identity = b""
        self._collected = bytearray()

    def next(self) -> tuple[Event | None, list[Buffer]] | None:
        """Take the next message if all of it has come. Returns what it says and the answer to send
        at once, or None if it has not come."""
        message = self._next()
        if message is None:
            return None
        taken = self._take(message)
        self._heard(message)
        return taken

    def _take(self, message: Message) -> tuple[Event | None, list[Buffer]]:
        take: dict[MessageKind, Callable[[Message], tuple[Event | None, list[Buffer]]]] = {
            MessageKind.HELLO: self._hello,
            MessageKind.OFFER: self._offer,
            MessageKind.PAGES: self._pages,
            MessageKind.ROUND: self._round,
            MessageKind.STATE: self._piece,
            MessageKind.STATE_END: self._stated,
            MessageKind.COMMIT: self._commit,
        }
        return take[message.kind](message)

    def _hello(self, message: Message) -> tuple[None, list[Buffer]]:
        self._identity = _hello(message).identity
        answer = _Hello.plain(versions=list(VERSIONS), identity=self._identity)
        return None, self._encoder.frame(MessageKind.HELLO, encode(answer))

    def _offer(self, message: Message) -> tuple[Event, list[Buffer]]:
        return Offer(_decoded(message)), []

    def _pages(self, message: Message) -> tuple[Event, list[Buffer]]:
        if self._collected:
            raise ProtocolError("PAGES came after STATE")
        payload = message.payload
        if len(payload) < _COUNT.size:
            raise ProtocolError("PAGES is too short to have a number of runs")
        end = _COUNT.size + RUN_BYTES * _COUNT.unpack_from(payload)[0]
        if end > len(payload):
            raise ProtocolError("PAGES announces more runs than it has")
        return Pages(Packed(payload[_COUNT.size : end], payload[end:])), []

    def _round(self, message: Message) -> tuple[Event, list[Buffer]]:
        return Round(_read(_Round, message).number), []

    def _piece(self, message: Message) -> tuple[None, list[Buffer]]:
        if not message.payload or len(self._collected) + len(message.payload) > MOST_STATE:
            raise ProtocolError(f"the state is empty, or has more than {MOST_STATE} bytes")
        self._collected += message.payload
        return None, []

    def _stated(self, message: Message) -> tuple[Event, list[Buffer]]:
        if _read(_StateEnd, message).bytes != len(self._collected):
            raise ProtocolError("the state does not have as many bytes as STATE_END says")
        state = _decoded(Message(message.kind, memoryview(self._collected)))
        self._collected = bytearray()
        return State(state), []

    def _commit(self, message: Message) -> tuple[Event, list[Buffer]]:
        if _read(_Commit, message).identity != self._identity:
            raise ProtocolError("COMMIT belongs to another migration")
        return Commit(), []

    def accept(self) -> list[Buffer]:
        """ACCEPT: a guest with that description can run here."""
        self._do(MessageKind.ACCEPT)
        return self._encoder.frame(MessageKind.ACCEPT)

    def acquire(self) -> None:
        """All is loaded, and what only one host may hold is held."""
        self._do(Act.ACQUIRE)

    def ready(self) -> list[Buffer]:
        """READY: the guest could run here."""
        self._do(MessageKind.READY)
        return self._encoder.frame(MessageKind.READY)

    def running(self) -> list[Buffer]:
        """RUNNING: the guest runs here."""
        self._do(MessageKind.RUNNING)
        return self._encoder.frame(MessageKind.RUNNING)

    def let_go(self) -> None:
        """What was acquired is no longer held."""
        self._do(Act.LET_GO)


def _decoded(message: Message) -> object:
    try:
        return decode(message.payload, message.kind.name)
    except StateError as error:
        raise ProtocolError(str(error)) from None


def _printable(text: str) -> str:
    """Replace what cannot be printed: the text may contain bytes of a path that are not text, or a
    peer's commands for a terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _read(fields: type[_F], message: Message) -> _F:
    return fields.read(message.kind.name, _decoded(message))


def _hello(message: Message) -> _Hello:
    hello = _read(_Hello, message)
    if not set(VERSIONS) & set(hello.versions):
        raise ProtocolError(
            f"the other side speaks versions {hello.versions[:_MOST_SHOWN]} of the protocol, this "
            f"side speaks {list(VERSIONS)}"
        )
    return hello


def refusal(why: str) -> bytes:
    """ABORT of a destination that has heard nothing yet: for a caller that is not wanted."""
    side = Destination()
    side.give_up()
    return b"".join(map(bytes, side.abort(why)))
