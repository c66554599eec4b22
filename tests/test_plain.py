"""Plain data as bytes and back, hostile bytes, and what a reader expects of what is in them."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.errors import ProtocolError, StateError
from avmm.plain import (
    ANYTHING,
    FLAG,
    MAPPING,
    U8,
    U16,
    U32,
    U64,
    Bytes,
    Fields,
    Float,
    Int,
    Kind,
    ListOf,
    MappingOf,
    Nested,
    OneOf,
    OrMissing,
    OrNone,
    Row,
    Text,
    decode,
    encode,
    shown,
)

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
        assert str(error).startswith("the thing is damaged or not valid: ")
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
        with pytest.raises(StateError, match=r"it is damaged or not valid: ."):
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


# -- what a reader expects ---------------------------------------------------------------------


class Disk(Fields):
    name = Text(most=8)
    size = Int(-1, 1 << 40)


class Everything(Fields, version=4):
    number = Int(-3, 5)
    flag = FLAG
    fraction = Float(0, 1)
    data = Bytes(least=1, most=3)
    text = Text(most=3)
    mode = OneOf("raw", 7, None)
    pairs = ListOf(Row(U8, Bytes(most=1)), most=4)
    leaf = Row(U32, U32, U32, U32)
    maybe = OrNone(U16)
    disks = ListOf(Nested(Disk, "a disk"))
    flags = MappingOf(("a", "b"), FLAG)
    mapping = MAPPING
    anything = ANYTHING
    more = OrMissing(U64)


GOOD: dict[str, Any] = {
    "version": 4,
    "number": -3,
    "flag": False,
    "fraction": 0.5,
    "data": b"abc",
    "text": "ab\N{SNOWMAN}",
    "mode": 7,
    "pairs": [[255, b"x"], [0, b""]],
    "leaf": [1, 2, 3, 4],
    "maybe": None,
    "disks": [{"name": "root", "size": 512}, {"name": "", "size": -1}],
    "flags": {"a": True, "b": False},
    "mapping": {"x": [1]},
    "anything": [{}],
}


def test_what_is_right_is_read() -> None:
    found = Everything.read("it", decode(encode(GOOD), "it"))
    assert (found.number, found.flag, found.fraction, found.data) == (-3, False, 0.5, b"abc")
    assert (found.text, found.mode, found.maybe, found.more) == ("ab\N{SNOWMAN}", 7, None, None)
    assert found.pairs == [(255, b"x"), (0, b"")]
    assert found.leaf == (1, 2, 3, 4)
    assert [(disk.name, disk.size) for disk in found.disks] == [("root", 512), ("", -1)]
    assert found.flags == {"a": True, "b": False}
    assert (found.mapping, found.anything) == ({"x": [1]}, [{}])
    found = Everything.read("it", MappingProxyType({**GOOD, "maybe": 3, "more": 1 << 63}))
    assert (found.maybe, found.more) == (3, 1 << 63)


def test_what_is_made_is_what_is_read() -> None:
    fields = {name: value for name, value in GOOD.items() if name != "version"}
    assert Everything.plain(**fields) == GOOD
    assert next(iter(Everything.plain(**fields))) == "version"
    assert Everything.plain(**fields, more=1) == {**GOOD, "more": 1}
    assert Disk.plain(name="x", size=1) == {"name": "x", "size": 1}
    for wrong in ({"name": "x"}, {"name": "x", "size": 1, "more": 1}, {"nam": "x", "size": 1}):
        with pytest.raises(TypeError, match="Disk has the fields name, size"):
            Disk.plain(**wrong)


class OddInt(int):
    pass


class OddBytes(bytes):
    pass


class OddText(str):
    __slots__ = ()


HUGE = 1 << 100_000
"""More digits than Python prints."""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"number": -4}, "number is -4, expected a number from -3 to 5"),
        ({"number": 6}, "number is 6, expected a number from -3 to 5"),
        ({"number": True}, "number is True, expected a number from -3 to 5"),
        ({"number": 1.0}, "number is 1.0, expected a number from -3 to 5"),
        ({"number": OddInt(1)}, "number is 1, expected a number from -3 to 5"),
        ({"number": HUGE}, "number is a huge number, expected a number from -3 to 5"),
        ({"flag": 1}, "flag is 1, expected True or False"),
        ({"fraction": 1.5}, "fraction is 1.5, expected a finite number with a fraction, from 0 t"),
        ({"fraction": 1}, "fraction is 1, expected a finite number with a fraction, from 0 to 1"),
        ({"fraction": math.nan}, "fraction is nan, expected"),
        ({"data": b""}, "data is b'', expected 1 to 3 bytes"),
        ({"data": b"1234"}, "data is b'1234', expected 1 to 3 bytes"),
        ({"data": "123"}, "data is '123', expected 1 to 3 bytes"),
        ({"data": bytearray(b"1")}, "data is of type bytearray, expected 1 to 3 bytes"),
        ({"data": OddBytes(b"1")}, "data is b'1', expected 1 to 3 bytes"),
        ({"text": "1234"}, "text is '1234', expected text of 0 to 3 characters"),
        ({"text": b"123"}, "text is b'123', expected text of 0 to 3 characters"),
        ({"text": OddText("1")}, "text is '1', expected text of 0 to 3 characters"),
        ({"mode": "cooked"}, "mode is 'cooked', expected one of 'raw', 7, None"),
        ({"mode": 7.0}, "mode is 7.0, expected one of 'raw', 7, None"),
        ({"pairs": None}, "pairs is None, expected a list of 0 to 4 entries"),
        ({"pairs": ()}, "pairs is of type tuple, expected a list of 0 to 4 entries"),
        ({"pairs": [[1, b""]] * 5}, "pairs is a list of 5, expected a list of 0 to 4 entries"),
        ({"pairs": [[1, b""], [2]]}, "pairs[1] is a list of 1, expected a list of 2 entries"),
        ({"pairs": [[1, b""], (2, b"")]}, "pairs[1] is of type tuple, expected a list of 2 ent"),
        ({"pairs": [[1, b""], [2, b"xx"]]}, "pairs[1][1] is b'xx', expected 0 to 1 bytes"),
        (
            {"leaf": [1, 2, 3, 1 << 32]},
            "leaf[3] is 0x100000000, expected a number from 0 to 42949",
        ),
        ({"maybe": -1}, "maybe is -1, expected a number from 0 to 65535 or None"),
        (
            {"disks": [{"name": "x", "size": 0}, 5]},
            "disks[1] is 5, expected a mapping that describes",
        ),
        ({"disks": [{"name": "x"}]}, "disks[0] lacks size, expected the keys name, size"),
        ({"disks": [{"name": 1, "size": 0}]}, "disks[0].name is 1, expected text of 0 to 8 char"),
        ({"flags": {"a": True}}, "flags lacks b, expected the keys a, b"),
        ({"flags": {"a": True, "b": 0}}, "flags.b is 0, expected True or False"),
        ({"flags": {"a": True, "b": True, 5: 0}}, "flags has 5, expected the keys a, b"),
        ({"mapping": []}, "mapping is a list of 0, expected a mapping"),
        ({"more": -1}, "more is -1, expected a number from 0 to 0xffffffffffffffff"),
        ({"more": None}, "more is None, expected a number from 0 to 0xffffffffffffffff"),
    ],
)
def test_what_is_wrong_is_refused_by_name(change: dict[str, Any], why: str) -> None:
    with pytest.raises(StateError) as caught:
        Everything.read("the thing", {**GOOD, **change})
    assert str(caught.value).startswith(f"the thing: {why}")
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "the thing is None, expected a mapping"),
        ([], "the thing is a list of 0, expected a mapping"),
        ({}, "the thing has no version, expected 4"),
        ({**GOOD, "version": 3}, "the thing has version 3, expected 4"),
        ({**GOOD, "version": True}, "the thing has version True, expected 4"),
        ({**GOOD, "version": None}, "the thing has version None, expected 4"),
        ({"version": 4.0}, "the thing has version 4.0, expected 4"),
        ({**GOOD, "x\x1b": 1}, "the thing has 'x\\x1b', expected the keys version, number, "),
        ({**GOOD, 5: 1, b"x": 2}, "the thing has 5, b'x', expected the keys version, "),
        (
            {k: v for k, v in GOOD.items() if k not in ("flag", "data")} | {"x": 1},
            "the thing lacks flag, data and has 'x', expected the keys version, number, flag",
        ),
        (
            {**GOOD, **{str(number): 0 for number in range(1000)}},
            "the thing has '0', '1', '2', '3', '4', '5', '6', '7', ..., expected the keys version",
        ),
    ],
    ids=range(11),
)
def test_what_is_wrong_as_a_whole_is_refused(value: Any, why: str) -> None:
    with pytest.raises(StateError) as caught:
        Everything.read("the thing", value)
    assert str(caught.value).startswith(why)
    assert len(str(caught.value)) < 500


def test_a_reader_has_an_error_of_its_own_and_bounds_of_this_time() -> None:
    class Hello(Fields, error=ProtocolError):
        names = ListOf(Text())
        identity = Bytes()

    class Longer(Hello, version=2):
        more = FLAG

    told = {"names": ["a"], "identity": b"12345"}
    assert Hello.read("HELLO", told, identity=Bytes(least=5, most=5)).identity == b"12345"
    with pytest.raises(ProtocolError, match=r"^HELLO: identity is b'12345', expected 4 bytes$"):
        Hello.read("HELLO", told, identity=Bytes(least=4, most=4))
    with pytest.raises(ProtocolError, match=r"^HELLO: names\[0\] is 5, expected text$"):
        Hello.read("HELLO", {**told, "names": [5]})
    found = Longer.read("it", {**told, "version": 2, "more": True})
    assert (found.names, found.more) == (["a"], True)
    error = found.wrong("identity", "another one")
    assert type(error) is ProtocolError
    assert str(error) == "it: identity is b'12345', expected another one"
    assert str(found.refusal("no")) == "it: no"


def test_what_may_come_from_another_version_may_have_more() -> None:
    class Hello(Fields, ignores_more=True):
        name = Text()
        size = OrMissing(U8)

    found = Hello.read("HELLO", {"name": "a", "more": 1, 5: object()})
    assert (found.name, found.size) == ("a", None)
    assert not hasattr(found, "more")
    for wrong in ({"more": 1}, {"name": 5, "more": 1}, {"name": "", "size": 256, "more": 1}):
        with pytest.raises(StateError):
            Hello.read("HELLO", wrong)


def test_fields_that_cannot_be_declared() -> None:
    for name, kind, why in (
        ("read", U8, "cannot have this name"),
        ("version", U8, "cannot have this name"),
        ("_hidden", U8, "cannot have this name"),
        ("size", Bytes, "is a class, expected an instance of it"),
    ):
        with pytest.raises(TypeError, match=rf"Wrong\.{name}.* {why}"):
            type("Wrong", (Fields,), {name: kind})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("\x1b[2J\n\u202e", r"'\x1b[2J\n\u202e'"),
        ("x" * 1000, f"'{'x' * 40}'... (1000 in all)"),
        (bytes(1000), f"{bytes(40)!r}... (1000 in all)"),
        ("\udc80", r"'\udc80'"),
        (-5, "-5"),
        (1 << 40, "0x10000000000"),
        ({}, "a mapping of 0"),
        (object(), "of type object"),
        (-HUGE, "a huge number"),
    ],
    ids=range(9),
)
def test_what_was_found_is_shown_short_and_safely(value: object, expected: str) -> None:
    assert shown(value) == expected


# -- any plain data, and any expectation ---------------------------------------------------------

LEAVES = st.sampled_from(
    [
        *(U8, U64, Int(-5, 5), FLAG, Float(), Float(-1, 1), Bytes(), Bytes(least=2, most=4)),
        *(Text(), Text(most=3), OneOf("a", "b", 1, True), MAPPING, ANYTHING, OrNone(U8)),
    ]
)
KINDS: st.SearchStrategy[Kind[Any]] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(OrNone, inner),
        st.builds(ListOf, inner, most=st.integers(0, 5)),
        st.lists(inner, max_size=3).map(lambda kinds: Row(*kinds)),
        st.builds(MappingOf, st.sets(st.sampled_from(["a", "b", "c"])), inner),
        st.builds(
            lambda kinds, version: Nested(
                type("Some", (Fields,), kinds, version=version), "something"
            ),
            st.dictionaries(st.sampled_from(["a", "b", "c"]), inner),
            st.none() | st.integers(0, 2),
        ),
    ),
    max_leaves=8,
)


def unlike(value: Any, checked: Any) -> bool:
    """Is what was checked not what was there?"""
    if isinstance(checked, Fields):
        return any(unlike(value[name], getattr(checked, name)) for name in checked._kinds)
    if type(checked) is tuple:
        return type(value) is not list or any(map(unlike, value, checked))
    if type(checked) is list:
        return any(map(unlike, value, checked))
    return not same(value, checked) and "nan" not in repr(value)


@settings(max_examples=400)
@given(KINDS, PLAIN, st.text(max_size=5))
def test_any_plain_data_is_as_expected_or_is_refused(
    kind: Kind[Any], value: Any, what: str
) -> None:
    record = type("Some", (Fields,), {"it": kind})
    try:
        found = record.read(what, {"it": value})
    except StateError as error:
        assert str(error).startswith(f"{what}: it")
        assert ", expected " in str(error)
        assert str(error).isprintable() or not what.isprintable()
        assert len(str(error)) < 1000
    else:
        assert not unlike(value, found.it)
    try:
        record.read(what, value)
    except StateError as error:
        assert str(error).startswith(what)


@settings(max_examples=200)
@given(st.data(), st.integers(-(1 << 70), 1 << 70), st.integers(0, 1 << 70))
def test_bounds_are_kept(data: st.DataObject, least: int, more: int) -> None:
    most = least + more
    near = st.integers(least - 2, least + 2) | st.integers(most - 2, most + 2)
    number = data.draw(near | st.integers())
    assert accepts(Int(least, most), number) is (least <= number <= most)
    low, high = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    length = data.draw(st.integers(0, 6))
    fits = low <= length <= high
    assert accepts(Bytes(least=low, most=high), bytes(length)) is fits
    assert accepts(Text(least=low, most=high), "x" * length) is fits
    assert accepts(ListOf(FLAG, least=low, most=high), [True] * length) is fits
    assert accepts(Row(*[FLAG] * low), [True] * length) is (length == low)


def accepts(kind: Kind[Any], value: object) -> bool:
    record = type("Some", (Fields,), {"it": kind})
    try:
        found: Any = record.read("it", {"it": value})
    except StateError:
        return False
    assert found.it == value or found.it == tuple(value)  # type: ignore[arg-type]
    return True


@settings(max_examples=200)
@given(st.data())
def test_one_thing_that_is_other_is_read_or_named(data: st.DataObject) -> None:
    """Of a mapping that is right: what is refused names the key in which it was changed."""
    key = data.draw(st.sampled_from(sorted(GOOD)))
    value = data.draw(PLAIN)
    try:
        found: Mapping[str, Any] = vars(Everything.read("it", {**GOOD, key: value}))
    except StateError as error:
        assert str(error).startswith(f"it has {key} " if key == "version" else f"it: {key}")
    else:
        assert key == "version" or not unlike(value, found[key])
