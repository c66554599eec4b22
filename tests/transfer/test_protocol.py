"""The conversation of a migration: both sides, whatever comes, in whatever order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from avmm.errors import PeerAbortedError, ProtocolError
from avmm.memory.pages import PAGE, Packed
from avmm.plain import encode
from avmm.transfer.frames import Buffer, Encoder, MessageKind
from avmm.transfer.protocol import (
    Commit,
    Destination,
    DestinationState,
    Offer,
    Pages,
    Round,
    Source,
    SourceState,
    State,
)

IDENTITY = bytes(range(16))
STATE = encode({"s": b"x" * 9})
PACKED = Packed(memoryview(b"\0" * 8 + b"\1\0\0\0" * 2), memoryview(b"p" * PAGE))


def joined(buffers: list[Buffer]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


class Conversation(RuleBasedStateMachine):
    """Both sides do what they may at any time, and the line delivers whichever prefix it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.destination = Source(IDENTITY), Destination()
        self.there = self.back = b""
        self.pages = 0
        self.may_run_there = False

    # The source may run the guest for as long as it has not said COMMIT.

    @invariant()
    def at_most_one_may_run(self) -> None:
        here = self.source.state not in (SourceState.COMMITTED, SourceState.DONE)
        assert not (here and self.may_run_there)

    @invariant()
    def the_destination_knows_no_more_than_the_source_has_said(self) -> None:
        if self.destination.state in (DestinationState.COMMITTED, DestinationState.DONE):
            assert self.source.state in (SourceState.COMMITTED, SourceState.DONE)
        if self.source.state is SourceState.DONE:
            assert self.destination.state is DestinationState.DONE

    @rule(choice=st.sampled_from(["hello", "offer", "pages", "round", "stated", "commit"]))
    def source_says(self, choice: str) -> None:
        allowed = {
            "hello": SourceState.NEW,
            "offer": SourceState.AGREED,
            "commit": SourceState.READY,
        }.get(choice, SourceState.COPYING)
        source = self.source
        say: dict[str, Any] = {
            "hello": source.hello,
            "offer": lambda: source.offer(encode({"a": 1})),
            "pages": lambda: source.pages(PACKED),
            "round": lambda: source.round(3),
            "stated": lambda: [part for frame in source.stated(STATE) for part in frame],
            "commit": source.commit,
        }
        before = source.state
        if before is allowed:
            self.there += joined(say[choice]())
        else:
            with pytest.raises(ProtocolError, match="the source is in"):
                say[choice]()
            assert source.state is before

    @rule(choice=st.sampled_from(["accept", "ready", "running"]))
    def destination_says(self, choice: str) -> None:
        allowed = {
            "accept": DestinationState.OFFERED,
            "ready": DestinationState.STATED,
            "running": DestinationState.COMMITTED,
        }[choice]
        before = self.destination.state
        if before is allowed:
            self.back += joined(getattr(self.destination, choice)())
        else:
            with pytest.raises(ProtocolError, match="the destination is in"):
                getattr(self.destination, choice)()
            assert self.destination.state is before

    @precondition(lambda self: self.there)
    @rule(length=st.integers(1, 200) | st.just(1 << 20))
    def deliver_there(self, length: int) -> None:
        self.destination.feed(self.there[:length])
        self.there = self.there[length:]
        while (taken := self.destination.next()) is not None:
            event, answer = taken
            self.back += joined(answer)
            if isinstance(event, Commit):
                self.may_run_there = True
            elif isinstance(event, Pages):
                assert bytes(event.packed.data) == b"p" * PAGE
            elif isinstance(event, Offer | State):
                assert event in (Offer({"a": 1}), State({"s": b"x" * 9}))

    @precondition(lambda self: self.back)
    @rule(length=st.integers(1, 200))
    def deliver_back(self, length: int) -> None:
        self.source.feed(self.back[:length])
        self.back = self.back[length:]
        while self.source.next():
            pass


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


# -- every frame in every state ------------------------------------------------------------

PAYLOADS: dict[MessageKind, bytes] = {
    MessageKind.HELLO: encode({"versions": [1], "identity": IDENTITY}),
    MessageKind.OFFER: encode({}),
    MessageKind.ACCEPT: b"",
    MessageKind.PAGES: b"\0\0\0\0",
    MessageKind.ROUND: encode({"number": 1}),
    MessageKind.STATE: encode({}),
    MessageKind.STATE_END: encode({"bytes": 1}),
    MessageKind.READY: b"",
    MessageKind.COMMIT: encode({"identity": IDENTITY}),
    MessageKind.RUNNING: b"",
}


class Peer:
    """Says whatever it likes."""

    def __init__(self, side: Source | Destination) -> None:
        self.side = side
        self.encoder = Encoder()

    def say(self, kind: MessageKind, payload: bytes | None = None) -> Any:
        payload = PAYLOADS[kind] if payload is None else payload
        self.side.feed(joined(self.encoder.frame(kind, payload)))
        return self.side.next()


def source_in(state: SourceState) -> tuple[Source, Peer]:
    source = Source(IDENTITY)
    peer = Peer(source)
    steps: list[Any] = [
        source.hello,
        lambda: peer.say(MessageKind.HELLO),
        lambda: source.offer(encode({})),
        lambda: peer.say(MessageKind.ACCEPT),
        lambda: list(source.stated(encode({}))),
        lambda: peer.say(MessageKind.READY),
        source.commit,
        lambda: peer.say(MessageKind.RUNNING),
    ]
    for step in steps:
        if source.state is state:
            break
        step()
    assert source.state is state
    return source, peer


def destination_in(state: DestinationState) -> tuple[Destination, Peer]:
    destination = Destination()
    peer = Peer(destination)
    steps: list[Any] = [
        lambda: peer.say(MessageKind.HELLO),
        lambda: peer.say(MessageKind.OFFER),
        destination.accept,
        lambda: (peer.say(MessageKind.STATE), peer.say(MessageKind.STATE_END)),
        destination.ready,
        lambda: peer.say(MessageKind.COMMIT),
        destination.running,
    ]
    for step in steps:
        if destination.state is state:
            break
        step()
    assert destination.state is state
    return destination, peer


MAY_COME = {
    SourceState.GREETED: {MessageKind.HELLO},
    SourceState.OFFERED: {MessageKind.ACCEPT},
    SourceState.STATED: {MessageKind.READY},
    SourceState.COMMITTED: {MessageKind.RUNNING},
    DestinationState.NEW: {MessageKind.HELLO},
    DestinationState.GREETED: {MessageKind.OFFER},
    DestinationState.COPYING: {MessageKind.PAGES, MessageKind.ROUND, MessageKind.STATE},
    DestinationState.READY: {MessageKind.COMMIT},
}


@pytest.mark.parametrize("state", [*SourceState, *DestinationState], ids=str)
def test_each_frame_comes_in_its_state_only(state: SourceState | DestinationState) -> None:
    for kind in PAYLOADS:
        side, peer = source_in(state) if isinstance(state, SourceState) else destination_in(state)
        if kind in MAY_COME.get(state, ()):
            assert peer.say(kind)
        else:
            with pytest.raises(ProtocolError):
                peer.say(kind)
            assert side.state is state
        side, peer = source_in(state) if isinstance(state, SourceState) else destination_in(state)
        with pytest.raises(PeerAbortedError, match="gave up: no room"):
            peer.say(MessageKind.ABORT, encode({"why": "no room"}))


def test_a_reason_has_no_commands_for_a_terminal() -> None:
    _, peer = source_in(SourceState.OFFERED)
    with pytest.raises(PeerAbortedError) as caught:
        peer.say(MessageKind.ABORT, encode({"why": "a\x1b[2Jb\u202ec"}))
    assert str(caught.value) == "the other side gave up: a�[2Jb�c"


def test_a_reason_may_hold_what_is_no_text() -> None:
    source, peer = source_in(SourceState.OFFERED)
    peer.side.feed(joined(Destination().abort("disk /a\udcffb: in use")))
    told = joined(source.abort("x" * 100_000))
    assert len(told) < 5000


HOSTILE = {
    MessageKind.HELLO: [
        b"",
        encode([]),
        encode({"versions": [2, True, "1"], "identity": IDENTITY}),
        encode({"versions": 1, "identity": IDENTITY}),
        encode({"versions": [1]}),
        encode({"versions": [1], "identity": IDENTITY + b"x"}),
        encode({"versions": [1], "identity": "a" * 16}),
    ],
    MessageKind.OFFER: [b"", b"\xc1", b"\xdd\xff\xff\xff\xff"],
    MessageKind.PAGES: [b"", b"\0\0\0", b"\1\0\0\0", b"\xff\xff\xff\xff" + bytes(64)],
    MessageKind.ROUND: [
        *(b"", encode({"number": "1"}), encode({"number": True}), encode(5)),
        *(encode({"number": -1}), encode({"number": 1, "more": 1})),
    ],
    MessageKind.STATE: [b""],
    MessageKind.STATE_END: [
        b"",
        encode({"bytes": 1}),
        encode({"bytes": 0}),
        encode({"bytes": "0"}),
    ],
    MessageKind.COMMIT: [b"", encode({"identity": IDENTITY[::-1]}), encode({"identity": 0})],
}


@pytest.mark.parametrize("kind", HOSTILE, ids=lambda kind: kind.name)
def test_hostile_payloads(kind: MessageKind) -> None:
    states = {MessageKind.HELLO: "NEW", MessageKind.OFFER: "GREETED", MessageKind.COMMIT: "READY"}
    state = DestinationState[states.get(kind, "COPYING")]
    for payload in HOSTILE[kind]:
        destination, peer = destination_in(state)
        with pytest.raises(ProtocolError):
            peer.say(kind, payload)
        assert destination.state is state


@pytest.mark.parametrize(
    ("state", "kind", "told", "why"),
    [
        (
            "NEW",
            MessageKind.HELLO,
            {"versions": [1]},
            "HELLO lacks identity, expected the keys versions, ",
        ),
        (
            "NEW",
            MessageKind.HELLO,
            {"versions": [-1], "identity": IDENTITY},
            r"HELLO: versions\[0\] is -1,",
        ),
        (
            "COPYING",
            MessageKind.ROUND,
            {"number": "1"},
            "ROUND: number is '1', expected a number from 0 t",
        ),
        (
            "COPYING",
            MessageKind.STATE_END,
            {"bytes": 1 << 40},
            "STATE_END: bytes is 0x10000000000",
        ),
        (
            "READY",
            MessageKind.COMMIT,
            {"identity": b"x"},
            "COMMIT: identity is b'x', expected 16",
        ),
        ("READY", MessageKind.ABORT, {"why": 5}, "ABORT: why is 5, expected text"),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_frame_is_named(
    state: str, kind: MessageKind, told: dict[str, object], why: str
) -> None:
    _, peer = destination_in(DestinationState[state])
    with pytest.raises(ProtocolError, match=f"^{why}"):
        peer.say(kind, encode(told))


def test_who_gives_up_may_say_more_than_this_avmm_knows() -> None:
    _, peer = destination_in(DestinationState.COPYING)
    with pytest.raises(PeerAbortedError, match=r"gave up: enough$"):
        peer.say(MessageKind.ABORT, encode({"why": "enough", "code": 7}))


def test_newer_and_older_versions_are_told_apart() -> None:
    _, peer = destination_in(DestinationState.NEW)
    with pytest.raises(ProtocolError, match=r"speaks versions \[2, 3\] .* this one \[1\]"):
        peer.say(MessageKind.HELLO, encode({"versions": [2, 3], "identity": IDENTITY}))
    _, peer = destination_in(DestinationState.NEW)
    with pytest.raises(ProtocolError, match=r"speaks versions \[2, 3, 4, 5, 6, 7, 8, 9\] of"):
        peer.say(
            MessageKind.HELLO, encode({"versions": list(range(2, 500)), "identity": IDENTITY})
        )
    _, peer = destination_in(DestinationState.NEW)
    assert peer.say(
        MessageKind.HELLO, encode({"versions": [2, 1], "identity": IDENTITY, "more": 1})
    )


def test_pages_come_before_the_state() -> None:
    _, peer = destination_in(DestinationState.COPYING)
    assert peer.say(MessageKind.ROUND) == (Round(1), [])
    peer.say(MessageKind.STATE)
    with pytest.raises(ProtocolError, match="PAGES came after STATE"):
        peer.say(MessageKind.PAGES)


def test_a_state_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avmm.transfer.protocol.MOST_STATE", 100)
    _, peer = destination_in(DestinationState.COPYING)
    peer.say(MessageKind.STATE, bytes(60))
    with pytest.raises(ProtocolError, match="more than 100 bytes"):
        peer.say(MessageKind.STATE, bytes(60))
    source, _ = source_in(SourceState.COPYING)
    with pytest.raises(ProtocolError, match="at most 100 can go"):
        list(source.stated(encode({"a": bytes(200)})))


def test_the_end_of_the_line_says_whether_it_was_within_a_frame() -> None:
    source, _ = source_in(SourceState.OFFERED)
    with pytest.raises(ProtocolError, match=r"the line was cut$"):
        source.feed_end()
    source.feed(b"\3")
    with pytest.raises(ProtocolError, match="cut in a frame"):
        source.feed_end()
