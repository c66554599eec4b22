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
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeVar

from avmm.errors import PeerAbortedError, ProtocolError, StateError
from avmm.memory.pages import RUN_BYTES, Packed
from avmm.plain import U64, Bytes, Fields, Int, ListOf, Text, decode, encode
from avmm.transfer.frames import STATE_PIECE, Buffer, Decoder, Encoder, Message, MessageKind

VERSIONS: Final = (1,)
"""Of the protocol, that this avmm speaks, best first."""
MOST_STATE: Final = 1 << 30
"""Bytes of state, all but RAM, that a destination takes."""
_COUNT: Final = struct.Struct("<I")
_MOST_SHOWN: Final = 8
"""Versions of the other side's that a message shows."""
_IDENTITY: Final = Bytes(least=16, most=16)
_F = TypeVar("_F", bound=Fields)


class _Hello(Fields, error=ProtocolError, ignores_more=True):
    """The first that is said: the other side may know more than this one."""

    versions = ListOf(U64)
    identity = _IDENTITY


class _Abort(Fields, error=ProtocolError, ignores_more=True):
    """May be said before versions are agreed on."""

    why = Text()


class _Round(Fields, error=ProtocolError):
    number = U64


class _StateEnd(Fields, error=ProtocolError):
    bytes = Int(0, MOST_STATE)


class _Commit(Fields, error=ProtocolError):
    identity = _IDENTITY


class SourceState(Enum):
    """What the source has done, and so what may come next."""

    NEW = "nothing was said"
    GREETED = "waits for HELLO"
    AGREED = "may offer"
    OFFERED = "waits for ACCEPT"
    COPYING = "may send pages"
    STATED = "waits for READY"
    READY = "may commit"
    COMMITTED = "waits for RUNNING"
    DONE = "the guest runs at the destination"


class DestinationState(Enum):
    """What the destination has got, and so what may come next."""

    NEW = "waits for HELLO"
    GREETED = "waits for OFFER"
    OFFERED = "may accept"
    COPYING = "waits for pages or the state"
    STATED = "may say that it is ready"
    READY = "waits for COMMIT"
    COMMITTED = "may run the guest"
    DONE = "the guest runs here"


@dataclass(frozen=True, slots=True)
class Offer:
    """The source tells what the guest is (`avmm.parts.description`)."""

    description: object


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


class _Side:
    def __init__(self) -> None:
        self._encoder = Encoder()
        self._decoder = Decoder()

    def feed(self, data: Buffer) -> None:
        """Bytes that have come."""
        self._decoder.feed(data)

    def feed_end(self) -> None:
        """The other side will say nothing more; raises `ProtocolError`."""
        raise ProtocolError("the line was cut" + ("" if self._decoder.is_empty else " in a frame"))

    @property
    def due(self) -> MessageKind | None:
        """What `next` will take, if it has come whole. Raises `ProtocolError` where what comes can
        be no frame."""
        return self._decoder.due

    def _next(self) -> Message | None:
        message = self._decoder.next()
        if message is not None and message.kind is MessageKind.ABORT:
            why = _read(_Abort, message).why
            raise PeerAbortedError(f"the other side gave up: {_printable(why)}")
        return message

    def abort(self, why: str) -> list[Buffer]:
        """ABORT: this side gives up, for good. Nothing may be said after it."""
        return self._encoder.frame(
            MessageKind.ABORT, encode(_Abort.plain(why=_printable(why[:4000])))
        )


class Source(_Side):
    """The side that the guest leaves."""

    def __init__(self, identity: bytes) -> None:
        """`identity`: 16 random bytes that tell this migration from others."""
        super().__init__()
        self.state = SourceState.NEW
        self._identity = identity

    def _demand(self, *states: SourceState) -> None:
        if self.state not in states:
            raise ProtocolError(
                f"the source is in {self.state.name} ({self.state.value}), expected "
                f"{' or '.join(state.name for state in states)}"
            )

    def next(self) -> bool:
        """Take what has come, if a message is whole: did one come? `state` has changed then."""
        message = self._next()
        if message is None:
            return False
        expected = {
            SourceState.GREETED: (MessageKind.HELLO, SourceState.AGREED),
            SourceState.OFFERED: (MessageKind.ACCEPT, SourceState.COPYING),
            SourceState.STATED: (MessageKind.READY, SourceState.READY),
            SourceState.COMMITTED: (MessageKind.RUNNING, SourceState.DONE),
        }.get(self.state)
        if expected is None or message.kind is not expected[0]:
            raise ProtocolError(f"{message.kind.name} came while the source {self.state.value}")
        if message.kind is MessageKind.HELLO:
            _hello(message)
        self.state = expected[1]
        return True

    def hello(self) -> list[Buffer]:
        """HELLO."""
        self._demand(SourceState.NEW)
        self.state = SourceState.GREETED
        hello = _Hello.plain(versions=list(VERSIONS), identity=self._identity)
        return self._encoder.frame(MessageKind.HELLO, encode(hello))

    def offer(self, offer: bytes) -> list[Buffer]:
        """OFFER: what the guest is, as `encode` makes it."""
        self._demand(SourceState.AGREED)
        self.state = SourceState.OFFERED
        return self._encoder.frame(MessageKind.OFFER, offer)

    def pages(self, packed: Packed) -> list[Buffer]:
        """PAGES; the buffers are those of `packed`."""
        self._demand(SourceState.COPYING)
        count = _COUNT.pack(len(packed.runs) // RUN_BYTES)
        return self._encoder.frame(MessageKind.PAGES, count, packed.runs, packed.data)

    def round(self, number: int) -> list[Buffer]:
        """ROUND: all pages of this round were sent."""
        self._demand(SourceState.COPYING)
        return self._encoder.frame(MessageKind.ROUND, encode(_Round.plain(number=number)))

    def stated(self, state: bytes) -> Iterator[list[Buffer]]:
        """STATE and STATE_END, frame by frame, of a state as `encode` makes it."""
        self._demand(SourceState.COPYING)
        self.state = SourceState.STATED
        data = memoryview(state)
        if len(data) > MOST_STATE:
            raise ProtocolError(f"the state has {len(data)} bytes, at most {MOST_STATE} can go")
        for at in range(0, len(data), STATE_PIECE):
            yield self._encoder.frame(MessageKind.STATE, data[at : at + STATE_PIECE])
        yield self._encoder.frame(MessageKind.STATE_END, encode(_StateEnd.plain(bytes=len(data))))

    def commit(self) -> list[Buffer]:
        """COMMIT. Once the first byte of it may have left, the source never runs the guest, unless
        the destination says ABORT."""
        self._demand(SourceState.READY)
        self.state = SourceState.COMMITTED
        return self._encoder.frame(
            MessageKind.COMMIT, encode(_Commit.plain(identity=self._identity))
        )


Event = Offer | Pages | Round | State | Commit


class Destination(_Side):
    """The side that the guest comes to."""

    def __init__(self) -> None:
        super().__init__()
        self.state = DestinationState.NEW
        self._identity = b""
        self._collected = bytearray()

    def _demand(self, state: DestinationState) -> None:
        if self.state is not state:
            raise ProtocolError(
                f"the destination is in {self.state.name} ({self.state.value}), expected "
                f"{state.name}"
            )

    def next(self) -> tuple[Event | None, list[Buffer]] | None:
        """Take what has come, if a message is whole: what it says, and what to answer at once."""
        message = self._next()
        if message is None:
            return None
        take = {
            (DestinationState.NEW, MessageKind.HELLO): self._hello,
            (DestinationState.GREETED, MessageKind.OFFER): self._offer,
            (DestinationState.COPYING, MessageKind.PAGES): self._pages,
            (DestinationState.COPYING, MessageKind.ROUND): self._round,
            (DestinationState.COPYING, MessageKind.STATE): self._piece,
            (DestinationState.COPYING, MessageKind.STATE_END): self._stated,
            (DestinationState.READY, MessageKind.COMMIT): self._commit,
        }.get((self.state, message.kind))
        if take is None:
            kind = message.kind.name
            raise ProtocolError(f"{kind} came while the destination {self.state.value}")
        return take(message)

    def _hello(self, message: Message) -> tuple[None, list[Buffer]]:
        self._identity = _hello(message).identity
        self.state = DestinationState.GREETED
        answer = _Hello.plain(versions=list(VERSIONS), identity=self._identity)
        return None, self._encoder.frame(MessageKind.HELLO, encode(answer))

    def _offer(self, message: Message) -> tuple[Event, list[Buffer]]:
        offer = Offer(_decoded(message))
        self.state = DestinationState.OFFERED
        return offer, []

    def _pages(self, message: Message) -> tuple[Event, list[Buffer]]:
        if self._collected:
            raise ProtocolError("PAGES came after STATE")
        payload = message.payload
        if len(payload) < _COUNT.size:
            raise ProtocolError("PAGES without a number of runs")
        end = _COUNT.size + RUN_BYTES * _COUNT.unpack_from(payload)[0]
        if end > len(payload):
            raise ProtocolError("PAGES tells of more runs than it has")
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
            raise ProtocolError("the state has not as many bytes as it should")
        state = _decoded(Message(message.kind, memoryview(self._collected)))
        self._collected = bytearray()
        self.state = DestinationState.STATED
        return State(state), []

    def _commit(self, message: Message) -> tuple[Event, list[Buffer]]:
        if _read(_Commit, message).identity != self._identity:
            raise ProtocolError("COMMIT is of another migration")
        self.state = DestinationState.COMMITTED
        return Commit(), []

    def accept(self) -> list[Buffer]:
        """ACCEPT: a guest of that description can be here."""
        self._demand(DestinationState.OFFERED)
        self.state = DestinationState.COPYING
        return self._encoder.frame(MessageKind.ACCEPT)

    def ready(self) -> list[Buffer]:
        """READY: all is loaded, the guest could run here."""
        self._demand(DestinationState.STATED)
        self.state = DestinationState.READY
        return self._encoder.frame(MessageKind.READY)

    def running(self) -> list[Buffer]:
        """RUNNING: the guest runs here."""
        self._demand(DestinationState.COMMITTED)
        self.state = DestinationState.DONE
        return self._encoder.frame(MessageKind.RUNNING)


def _decoded(message: Message) -> object:
    try:
        return decode(message.payload, message.kind.name)
    except StateError as error:
        raise ProtocolError(str(error)) from None


def _printable(text: str) -> str:
    """It may hold a path's bytes that are no text, or a peer's commands for a terminal."""
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
            f"one {list(VERSIONS)}"
        )
    return hello
