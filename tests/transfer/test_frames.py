"""Frames: any split of their bytes into pieces gives them back, and nothing else is one."""

from __future__ import annotations

import tracemalloc

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.errors import ProtocolError
from avmm.transfer.frames import MOST, Decoder, Encoder, MessageKind

Said = list[tuple[MessageKind, bytes]]
KINDS = st.sampled_from(MessageKind)
SAID = st.lists(
    KINDS.flatmap(lambda kind: st.tuples(st.just(kind), st.binary(max_size=min(MOST[kind], 200)))),
    max_size=8,
)


def frames(said: Said) -> list[bytes]:
    encoder = Encoder()
    return [b"".join(encoder.frame(kind, payload[:3], payload[3:])) for kind, payload in said]


def heard(decoder: Decoder, *pieces: bytes) -> Said:
    got = []
    for piece in pieces:
        decoder.feed(piece)
        while (frame := decoder.next()) is not None:
            got.append((frame.kind, bytes(frame.payload)))
    return got


def head(kind: int, length: int, number: int = 0, zero: int = 0, zeros: int = 0) -> bytes:
    """The header of a frame, with the checksum that it has without a payload."""
    data = bytes([kind, zero]) + zeros.to_bytes(2, "little")
    data += length.to_bytes(4, "little") + number.to_bytes(8, "little")
    return data + xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")


@given(SAID, st.data())
def test_any_split_gives_the_frames_back(said: Said, data: st.DataObject) -> None:
    stream = b"".join(frames(said))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    decoder = Decoder()
    assert heard(decoder, *pieces) == said
    assert decoder.is_empty


@given(SAID, st.data())
def test_a_prefix_gives_the_frames_that_are_whole_in_it(said: Said, data: st.DataObject) -> None:
    each = frames(said)
    cut = data.draw(st.integers(0, sum(map(len, each))))
    decoder = Decoder()
    got = heard(decoder, b"".join(each)[:cut])
    assert got == said[: len(got)]
    rest = cut - sum(map(len, each[: len(got)]))
    assert decoder.is_empty == (rest == 0)
    assert rest < len(each[len(got)]) if len(got) < len(each) else rest == 0


@given(SAID.filter(bool), st.data())
def test_a_frame_is_due_when_all_of_it_has_come(said: Said, data: st.DataObject) -> None:
    each = frames(said)
    decoder = Decoder()
    for (kind, payload), frame in zip(said, each, strict=True):
        cut = data.draw(st.integers(0, len(frame) - 1))
        decoder.feed(frame[:cut])
        assert decoder.due is None
        assert decoder.next() is None
        decoder.feed(frame[cut:])
        assert decoder.due is kind
        message = decoder.next()
        assert message is not None
        assert bytes(message.payload) == payload
    assert decoder.due is None


def test_what_can_be_no_frame_is_not_waited_for() -> None:
    for header in (
        head(99, 5),
        head(MessageKind.COMMIT, 65),
        head(MessageKind.ROUND, 5, number=1),
    ):
        decoder = Decoder()
        decoder.feed(header)
        with pytest.raises(ProtocolError):
            decoder.due  # noqa: B018


@settings(max_examples=20, deadline=None)
@given(SAID.filter(lambda said: said and MessageKind.OFFER not in dict(said)))
def test_every_flipped_bit_is_found(said: Said) -> None:
    """Where a frame says that it is longer it is waited for: that is found by what follows."""
    each = frames(said)
    stream, longest = b"".join(each), MOST[MessageKind.PAGES]
    for at in range(len(stream)):
        damaged = bytearray(stream)
        damaged[at] ^= 1 << at % 8
        whole, decoder = 0, Decoder()
        while sum(map(len, each[: whole + 1])) <= at:
            whole += 1
        got: Said = []
        decoder.feed(bytes(damaged))
        with pytest.raises(ProtocolError):
            for more in (0, longest):
                decoder.feed(bytes(more))
                while (frame := decoder.next()) is not None:
                    got.append((frame.kind, bytes(frame.payload)))
        assert got == said[:whole]


@given(SAID.filter(lambda said: len(said) > 1), st.data())
def test_lost_doubled_and_swapped_frames_are_found(said: Said, data: st.DataObject) -> None:
    each = frames(said)
    at = data.draw(st.integers(0, len(each) - 2))
    for wrong in (
        [*each[:at], *each[at + 1 :]],
        [*each[: at + 1], each[at], *each[at + 1 :]],
        [*each[:at], each[at + 1], each[at], *each[at + 2 :]],
    ):
        with pytest.raises(ProtocolError, match="came, expected number"):
            heard(Decoder(), *wrong)


def test_a_byte_that_is_lost_or_doubled_is_found() -> None:
    """Of a stream that goes on."""
    said = [
        (MessageKind.STATE, bytes(range(200))),
        (MessageKind.ROUND, b"abc"),
        (MessageKind.STATE, bytes(300)),
    ]
    stream = b"".join(frames(said))
    more = b"x" * MOST[MessageKind.STATE]
    for at in range(len(stream) - 300):
        for wrong in (
            stream[:at] + stream[at + 1 :],
            stream[:at] + stream[at : at + 1] + stream[at:],
        ):
            if wrong == stream:
                continue
            with pytest.raises(ProtocolError):
                heard(Decoder(), wrong + more)


@pytest.mark.parametrize("kind", MessageKind)
def test_a_length_beyond_the_most_is_refused_at_once_and_takes_no_memory(
    kind: MessageKind,
) -> None:
    for length in (MOST[kind] + 1, 0xFFFF_FFFF):
        decoder = Decoder()
        tracemalloc.start()
        try:
            decoder.feed(head(kind, length))
            with pytest.raises(ProtocolError, match=f"{kind.name}.* has {length} bytes"):
                decoder.next()
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert most < 64 << 10


def test_a_length_that_is_allowed_takes_no_memory_before_it_is_there() -> None:
    decoder = Decoder()
    tracemalloc.start()
    try:
        decoder.feed(head(MessageKind.OFFER, MOST[MessageKind.OFFER]))
        assert decoder.next() is None
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 64 << 10


def test_the_longest_frames_go_through() -> None:
    for kind, most in MOST.items():
        payload = bytes(most)
        assert heard(Decoder(), b"".join(Encoder().frame(kind, payload))) == [(kind, payload)]
        with pytest.raises(ProtocolError, match=f"expected at most {most}"):
            Encoder().frame(kind, payload, b"1")


@pytest.mark.parametrize("kind", [0, 12, 255])
def test_kinds_that_there_are_not(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"an unknown kind: {kind}"):
        heard(Decoder(), head(kind, 0))


def test_what_is_reserved_is_zero() -> None:
    for wrong in ({"zero": 1}, {"zeros": 0x100}):
        with pytest.raises(ProtocolError):
            heard(Decoder(), head(MessageKind.READY, 0, **wrong))
    assert heard(Decoder(), head(MessageKind.READY, 0)) == [(MessageKind.READY, b"")]


def test_numbers_are_of_64_bits() -> None:
    with pytest.raises(ProtocolError, match=f"{1 << 32}"):
        heard(Decoder(), head(MessageKind.READY, 0, number=1 << 32))
