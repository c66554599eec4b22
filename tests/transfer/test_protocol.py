"""The conversation of a migration: both sides, whatever comes, in whatever order."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from avmm.errors import PeerAbortedError, ProtocolError
from avmm.memory.pages import PAGE, Packed
from avmm.plain import encode
from avmm.transfer.frames import Buffer, Encoder, MessageKind
from avmm.transfer.protocol import Commit, Destination, Offer, Pages, Round, Source, State
from avmm.transfer.states import (
    DESTINATION_DOES,
    DESTINATION_HEARS,
    SOURCE_DOES,
    SOURCE_HEARS,
    Act,
    DestinationState,
    SourceState,
)

IDENTITY = bytes(range(16))
STATE = encode({"s": b"x" * 9})
PACKED = Packed(memoryview(b"\0" * 8 + b"\1\0\0\0" * 2), memoryview(b"p" * PAGE))


def joined(buffers: list[Buffer]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


HAS_COMMITTED = {SourceState.COMMITTED, SourceState.DONE, SourceState.UNKNOWN}
STOPPED_HERE = HAS_COMMITTED | {SourceState.TAKING_BACK}
HELD_THERE = {
    DestinationState.ACQUIRED,
    DestinationState.READY,
    DestinationState.COMMITTED,
    DestinationState.DONE,
}
NOT_HEARD_HERE = {SourceState.TAKING_BACK, SourceState.ABORTED, SourceState.UNKNOWN}
NOT_HEARD_THERE = {DestinationState.ABORTED, DestinationState.LETTING_GO}


class Conversation(RuleBasedStateMachine):
    """Both sides do what they may at any time, and the line delivers whichever prefix it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.destination = Source(IDENTITY), Destination()
        self.there = self.back = b""
        self.pages = 0
        self.may_run_there = False

    @invariant()
    def at_most_one_may_run(self) -> None:
        assert not (self.source.state not in STOPPED_HERE and self.may_run_there)

    @invariant()
    def the_destination_knows_no_more_than_the_source_has_said(self) -> None:
        if self.destination.state in (DestinationState.COMMITTED, DestinationState.DONE):
            assert self.source.state in HAS_COMMITTED
        if self.source.state is SourceState.DONE:
            assert self.destination.state is DestinationState.DONE

    @invariant()
    def what_is_held_there_was_released_here(self) -> None:
        if self.destination.state in HELD_THERE:
            assert self.source.state in {
                SourceState.STATED,
                SourceState.READY,
                SourceState.TAKING_BACK,
                *HAS_COMMITTED,
            }

    @rule()
    def the_source_gives_up(self) -> None:
        before = self.source.state
        self.source.give_up()
        assert (self.source.state is before) == (Act.GIVE_UP not in SOURCE_DOES[before])
        if self.source.state is not before:
            self.there += joined(self.source.abort("no"))

    @rule()
    def the_destination_gives_up(self) -> None:
        before = self.destination.state
        self.destination.give_up()
        is_too_late = before in (DestinationState.COMMITTED, DestinationState.DONE)
        is_over = before in (DestinationState.ABORTED, DestinationState.LETTING_GO)
        assert (self.destination.state is before) == (is_too_late or is_over)
        if not is_too_late and not is_over:
            if before in HELD_THERE:
                with pytest.raises(ProtocolError, match="the destination is in LETTING_GO"):
                    self.destination.abort("no")
                self.destination.let_go()
            self.back += joined(self.destination.abort("no"))

    @precondition(lambda self: self.source.state is SourceState.TAKING_BACK)
    @rule()
    def the_source_takes_back(self) -> None:
        if self.destination.state in HELD_THERE:
            self.source.lose()
        else:
            self.source.take_back()

    @precondition(lambda self: self.source.state is SourceState.COMMITTED)
    @rule()
    def no_answer_comes(self) -> None:
        self.source.lose()

    @rule(
        choice=st.sampled_from(
            ["hello", "offer", "pages", "round", "stand still", "release", "stated", "commit"]
        )
    )
    def source_says(self, choice: str) -> None:
        allowed = {
            "hello": [SourceState.NEW],
            "offer": [SourceState.AGREED],
            "stand still": [SourceState.COPYING],
            "release": [SourceState.STANDING],
            "stated": [SourceState.RELEASED],
            "commit": [SourceState.READY],
        }.get(choice, [SourceState.COPYING, SourceState.STANDING])
        source = self.source
        say: dict[str, Any] = {
            "hello": source.hello,
            "offer": lambda: source.offer(encode({"a": 1})),
            "pages": lambda: source.pages(PACKED),
            "round": lambda: source.round(3),
            "stand still": lambda: source.stand_still() or [],
            "release": lambda: source.release() or [],
            "stated": lambda: [part for frame in source.stated(STATE) for part in frame],
            "commit": source.commit,
        }
        before = source.state
        if before in allowed:
            self.there += joined(say[choice]())
        else:
            with pytest.raises(ProtocolError, match="the source is in"):
                say[choice]()
            assert source.state is before

    @rule(choice=st.sampled_from(["accept", "acquire", "ready", "running"]))
    def destination_says(self, choice: str) -> None:
        allowed = {
            "accept": DestinationState.OFFERED,
            "acquire": DestinationState.STATED,
            "ready": DestinationState.ACQUIRED,
            "running": DestinationState.COMMITTED,
        }[choice]
        before = self.destination.state
        if before is allowed:
            self.back += joined(getattr(self.destination, choice)() or [])
        else:
            with pytest.raises(ProtocolError, match="the destination is in"):
                getattr(self.destination, choice)()
            assert self.destination.state is before

    @precondition(lambda self: self.there and self.destination.state not in NOT_HEARD_THERE)
    @rule(length=st.integers(1, 200) | st.just(1 << 20))
    def deliver_there(self, length: int) -> None:
        self.destination.feed(self.there[:length])
        self.there = self.there[length:]
        while (taken := self._there()) is not None:
            event, answer = taken
            self.back += joined(answer)
            if isinstance(event, Commit):
                self.may_run_there = True
            elif isinstance(event, Pages):
                assert bytes(event.packed.data) == b"p" * PAGE
            elif isinstance(event, Offer | State):
                assert event in (Offer({"a": 1}), State({"s": b"x" * 9}))

    def _there(self) -> Any:
        try:
            return self.destination.next()
        except PeerAbortedError:
            if self.destination.state is DestinationState.LETTING_GO:
                self.destination.let_go()
            assert self.destination.state is DestinationState.ABORTED
            return None

    @precondition(lambda self: self.back and self.source.state not in NOT_HEARD_HERE)
    @rule(length=st.integers(1, 200))
    def deliver_back(self, length: int) -> None:
        self.source.feed(self.back[:length])
        self.back = self.back[length:]
        with suppress(PeerAbortedError):
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
    after = {
        SourceState.TAKING_BACK: (SourceState.READY, [source.give_up]),
        SourceState.ABORTED: (SourceState.NEW, [source.give_up]),
        SourceState.UNKNOWN: (SourceState.COMMITTED, [source.lose]),
    }
    first, more = after.get(state, (state, []))
    steps: list[Any] = [
        source.hello,
        lambda: peer.say(MessageKind.HELLO),
        lambda: source.offer(encode({})),
        lambda: peer.say(MessageKind.ACCEPT),
        source.stand_still,
        source.release,
        lambda: list(source.stated(encode({}))),
        lambda: peer.say(MessageKind.READY),
        source.commit,
        lambda: peer.say(MessageKind.RUNNING),
    ]
    for step in steps:
        if source.state is first:
            break
        step()
    for step in more:
        step()
    assert source.state is state
    return source, peer


def destination_in(state: DestinationState) -> tuple[Destination, Peer]:
    destination = Destination()
    peer = Peer(destination)
    after = {
        DestinationState.LETTING_GO: (DestinationState.READY, [destination.give_up]),
        DestinationState.ABORTED: (DestinationState.NEW, [destination.give_up]),
    }
    first, more = after.get(state, (state, []))
    steps: list[Any] = [
        lambda: peer.say(MessageKind.HELLO),
        lambda: peer.say(MessageKind.OFFER),
        destination.accept,
        lambda: (peer.say(MessageKind.STATE), peer.say(MessageKind.STATE_END)),
        destination.acquire,
        destination.ready,
        lambda: peer.say(MessageKind.COMMIT),
        destination.running,
    ]
    for step in steps:
        if destination.state is first:
            break
        step()
    for step in more:
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
        hears = SOURCE_HEARS if isinstance(state, SourceState) else DESTINATION_HEARS
        assert side.state is hears[state].get(MessageKind.ABORT, state)


@pytest.mark.parametrize(
    ("does", "hears"),
    [(SOURCE_DOES, SOURCE_HEARS), (DESTINATION_DOES, DESTINATION_HEARS)],
    ids=["source", "destination"],
)
def test_the_tables_are_whole_and_lead_everywhere(does: Any, hears: Any) -> None:
    states = set(type(next(iter(does))))
    assert set(does) == set(hears) == states
    reached, new = set(), {next(iter(does))}
    while new:
        reached |= new
        new = {after for one in new for after in (*does[one].values(), *hears[one].values())}
        new -= reached
    assert reached == states


def test_a_reason_has_no_commands_for_a_terminal() -> None:
    _, peer = source_in(SourceState.OFFERED)
    with pytest.raises(PeerAbortedError) as caught:
        peer.say(MessageKind.ABORT, encode({"why": "a\x1b[2Jb\u202ec"}))
    assert str(caught.value) == "the other side gave up: a�[2Jb�c"


def test_a_reason_may_hold_what_is_no_text() -> None:
    source, peer = source_in(SourceState.OFFERED)
    gone = Destination()
    gone.give_up()
    peer.side.feed(joined(gone.abort("disk /a\udcffb: in use")))
    source.give_up()
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
    with pytest.raises(ProtocolError, match=r"speaks versions \[2, 3\] .* this side speaks \[1\]"):
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
    source, _ = source_in(SourceState.RELEASED)
    with pytest.raises(ProtocolError, match="expected at most 100"):
        list(source.stated(encode({"a": bytes(200)})))


def test_the_end_of_the_line_says_whether_it_was_within_a_frame() -> None:
    source, _ = source_in(SourceState.OFFERED)
    with pytest.raises(ProtocolError, match=r"the line was cut$"):
        source.feed_end()
    source.feed(b"\3")
    with pytest.raises(ProtocolError, match="cut in a frame"):
        source.feed_end()
