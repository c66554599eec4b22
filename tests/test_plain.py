"""Plain data as bytes and back, and hostile bytes."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.errors import StateError
from avmm.plain import decode, encode

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=300)
    | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=60,
)


def same(one: Any, other: Any) -> bool:
    """As `==`, but 1, 1.0 and True are three."""
    if type(one) is not type(other):
        return False
    if type(one) is list:
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is dict:
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@settings(max_examples=50, deadline=None)
@given(PLAIN)
def test_what_was_encoded_comes_back(value: Any) -> None:
    assert same(decode(encode(value), "it"), value)


@given(st.binary(max_size=200))
def test_any_bytes_are_plain_data_or_refused_by_name(data: bytes) -> None:
    try:
        value = decode(data, "the thing")
    except StateError as error:
        assert str(error).startswith("the thing is damaged, or none: ")
        assert not str(error).endswith(": ")
    else:
        assert same(decode(encode(value), "it"), value) or "nan" in repr(value)


@settings(max_examples=50, deadline=None)
@given(PLAIN, st.data())
def test_a_part_of_it_is_none(value: Any, data: st.DataObject) -> None:
    whole = encode(value)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(StateError):
        decode(whole[:cut], "it")
    with pytest.raises(StateError):
        decode(whole + b"\0", "it")


HOSTILE = {
    "extension": msgpack.packb(msgpack.ExtType(5, b"x")),
    "time": msgpack.packb(msgpack.Timestamp(1, 2)),
    "number as key": msgpack.packb({1: 2}),
    "bytes as key": msgpack.packb({b"a": 2}),
    "no text": b"\xa2\xff\xfe",
    "deep": b"\x91" * 100_000,
    "long list": b"\xdd\xff\xff\xff\xff" + bytes(100),
    "long dict": b"\xdf\xff\xff\xff\xff" + bytes(100),
    "long bytes": b"\xc6\xff\xff\xff\xff" + bytes(100),
    "long text": b"\xdb\xff\xff\xff\xff" + bytes(100),
    "long lists in long lists": b"\xdc\xff\xff" * 30_000,
    "nothing": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused_and_take_no_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(StateError, match=r"it is damaged, or none: ."):
            decode(data, "it")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < (1 << 20) + 2048 * len(data)  # msgpack's depth, eight bytes an entry


class Number(int):
    pass


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    "value",
    [
        {1: 2},
        [{"a": [{None: 1}]}],
        {1, 2},
        object(),
        1 << 64,
        "\udc80",
        msgpack.Timestamp(1, 2),
        [msgpack.ExtType(5, b"x")],
        [0] * 65_537,
        {str(number): 0 for number in range(65_537)},
        LOOP,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_read_again_is_not_written(value: Any) -> None:
    with pytest.raises(StateError, match=r"this cannot be saved: ."):
        encode(value)


def test_what_is_nearly_plain_is_taken() -> None:
    given_value = {"a": (1, 2), "b": bytearray(b"b"), "c": memoryview(b"c"), "d": Number(4)}
    assert decode(encode(given_value), "it") == {"a": [1, 2], "b": b"b", "c": b"c", "d": 4}


def test_a_list_of_as_many_entries_as_there_can_be() -> None:
    assert decode(encode([0] * 65_536), "it") == [0] * 65_536
