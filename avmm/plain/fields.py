"""Fields: what plain data must hold, declared once by whoever reads them, and checked.

A reader declares what it expects:

    class PortState(Fields, version=1):
        divisor = U16
        fifo = Bytes(most=16)
        mode = OneOf("raw", "cooked")
        entries = ListOf(Row(U32, U64), most=1024)
        offset = OrNone(U64)

    state = PortState.plain(divisor=1, fifo=b"", mode="raw", entries=[], offset=None)
    found = PortState.read("the port's state", state)
    found.divisor  # an int, for a type checker as well

`plain` returns a dict with these fields and their version. `read` accepts a mapping with that
version, exactly these keys and values of these kinds, and raises `StateError` for everything else.
The message says what was read, where in it the mistake is, what was found there and what was
expected:

    the port's state: entries[3][0] is -1, expected a number from 0 to 0xffffffff

Types are exact: True is not a number, and an instance of a subclass of bytes is not bytes. Each
value is checked alone. If several values must fit together, the reader checks that, and raises the
error that `Fields.wrong` or `Fields.refusal` makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import repeat
from operator import call
from typing import Any, ClassVar, Final, Generic, Self, TypeVar, cast, overload

from avmm.errors import AvmmError, StateError
from avmm.plain.encoding import MOST_ENTRIES

_SHOWN: Final = 40
"""Characters of a text, and bytes, that a message shows."""
_MOST_NAMES: Final = 8
"""Unknown keys that a message shows."""


# -- kinds of values ---------------------------------------------------------------------------

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
Value_co = TypeVar("Value_co", covariant=True)


class Mismatch(Exception):
    """A value is not of its kind. `Fields.read` turns it into an `AvmmError`."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self._problem = problem
        self._path = ""

    @property
    def is_within(self) -> bool:
        """Is it about a part of the checked value, not about the whole value?"""
        return bool(self._path)

    def within(self, step: str) -> Mismatch:
        """The same error, as one of the list or mapping that holds the value at `step`, which is
        `.key` or `[number]`.
        """
        self._path = step + self._path
        return self

    def text(self, what: str) -> str:
        """The message. `what` names the data in which this was found."""
        path = self._path.removeprefix(".")
        return f"{what}: {path} {self._problem}" if path else f"{what} {self._problem}"


def shown(value: object) -> str:
    """`value` for a message: short, on one line, and without characters that a terminal obeys."""
    kind = type(value)
    if isinstance(value, bool | None):
        return str(value)
    if isinstance(value, int):
        if value.bit_length() > 128:  # Python refuses to print numbers of 4300 digits
            return "a huge number"
        return str(int(value)) if value.bit_length() <= 32 else hex(value)
    if isinstance(value, float):
        return str(float(value))
    if isinstance(value, str | bytes):
        part = repr(value[:_SHOWN])
        return part if len(value) <= _SHOWN else f"{part}... ({len(value)} in all)"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"a mapping of {len(value)}"
    return f"of type {kind.__name__}"


class Kind(Generic[Value_co]):
    """The kind of a value, which checks it. As an attribute of `Fields` it declares a field."""

    expected: str
    """What a message says was expected, like "a number from 0 to 255"."""

    def check(self, value: object) -> Value_co:
        """Return `value` if it is of this kind. Otherwise raises `Mismatch`."""
        raise NotImplementedError

    def refuse(self, value: object) -> Mismatch:
        """The error to raise for a `value` that is not of this kind."""
        return Mismatch(f"is {shown(value)}, expected {self.expected}")

    @overload
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(self, instance: Fields, owner: type, /) -> Value_co: ...
    def __get__(self, instance: Fields | None, owner: type, /) -> object:
        # This is for type checkers. An instance has values of its own, which Python finds first.
        return self


class Int(Kind[int]):
    """A number from `least` to `most`."""

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self.expected = f"a number from {shown(least)} to {shown(most)}"

    def check(self, value: object) -> int:
        if type(value) is int and self._least <= value <= self._most:
            return value
        raise self.refuse(value)


U8: Final = Int(0, (1 << 8) - 1)
U16: Final = Int(0, (1 << 16) - 1)
U32: Final = Int(0, (1 << 32) - 1)
U64: Final = Int(0, (1 << 64) - 1)


class Float(Kind[float]):
    """A number with a fraction, from `least` to `most`, neither infinite nor NaN."""

    def __init__(self, least: float = -math.inf, most: float = math.inf) -> None:
        self._least = least
        self._most = most
        self.expected = f"a finite number with a fraction, from {least:g} to {most:g}"

    def check(self, value: object) -> float:
        if type(value) is float and self._least <= value <= self._most and math.isfinite(value):
            return value
        raise self.refuse(value)


class _Flag(Kind[bool]):
    expected = "True or False"

    def check(self, value: object) -> bool:
        if type(value) is bool:
            return value
        raise self.refuse(value)


FLAG: Final = _Flag()
"""True or False."""


def _count(least: int, most: int | None, noun: str) -> str:
    if least == most:
        return f"{least} {noun}"
    if most is None:
        return noun if not least else f"at least {least} {noun}"
    return f"{least} to {most} {noun}"


class Bytes(Kind[bytes]):
    """From `least` to `most` bytes; without `most`, any number from `least` on."""

    def __init__(self, *, least: int = 0, most: int | None = None) -> None:
        self._least = least
        self._most = most
        self.expected = _count(least, most, "bytes")

    def check(self, value: object) -> bytes:
        if type(value) is bytes and _fits(len(value), self._least, self._most):
            return value
        raise self.refuse(value)


class Text(Kind[str]):
    """From `least` to `most` characters; without `most`, any number from `least` on."""

    def __init__(self, *, least: int = 0, most: int | None = None) -> None:
        self._least = least
        self._most = most
        self.expected = f"text of {_count(least, most, 'characters')}" if least or most else "text"

    def check(self, value: object) -> str:
        if type(value) is str and _fits(len(value), self._least, self._most):
            return value
        raise self.refuse(value)


def _fits(length: int, least: int, most: int | None) -> bool:
    return length >= least and (most is None or length <= most)


class OneOf(Kind[T]):
    """One of `values`, which are numbers, texts, bytes or None."""

    def __init__(self, *values: T) -> None:
        self._values = values
        self.expected = f"one of {', '.join(map(shown, values))}"

    def check(self, value: object) -> T:
        for allowed in self._values:
            if type(value) is type(allowed) and value == allowed:
                return allowed
        raise self.refuse(value)


class OrNone(Kind[T | None]):
    """A value of `kind`, or None."""

    def __init__(self, kind: Kind[T]) -> None:
        self._kind = kind
        self.expected = f"{kind.expected} or None"

    def check(self, value: object) -> T | None:
        if value is None:
            return None
        try:
            return self._kind.check(value)
        except Mismatch as mismatch:
            if mismatch.is_within:
                raise
            raise self.refuse(value) from None


class OrMissing(Kind[T | None]):
    """A field of `kind` whose key may be missing. It is then read as None."""

    def __init__(self, kind: Kind[T]) -> None:
        self._kind = kind
        self.expected = kind.expected

    def check(self, value: object) -> T | None:
        return self._kind.check(value)


class ListOf(Kind[list[T]]):
    """A list of `least` to `most` entries, all of `kind`."""

    def __init__(self, kind: Kind[T], *, least: int = 0, most: int = MOST_ENTRIES) -> None:
        self._kind = kind
        self._least = least
        self._most = most
        self.expected = f"a list of {_count(least, most, 'entries')}"

    def check(self, value: object) -> list[T]:
        if type(value) is not list or not self._least <= len(value) <= self._most:
            raise self.refuse(value)
        check = self._kind.check
        try:
            return list(map(check, value))
        except Mismatch:
            _demand_entries(repeat(check), value)
            raise


def _demand_entries(checks: Iterable[Callable[[object], object]], items: list[object]) -> None:
    """One of `items` is known to be wrong. Find it, and raise a `Mismatch` that says where it
    is.
    """
    for number, (check, item) in enumerate(zip(checks, items, strict=False)):
        try:
            check(item)
        except Mismatch as mismatch:
            raise mismatch.within(f"[{number}]") from None


Entries = TypeVar("Entries", bound=tuple[object, ...])


class Row(Kind[Entries]):
    """A list with one entry for each of `kinds`, in their order. It is read as a tuple."""

    @overload
    def __init__(self: Row[tuple[A, B]], a: Kind[A], b: Kind[B], /) -> None: ...
    @overload
    def __init__(self: Row[tuple[A, B, C]], a: Kind[A], b: Kind[B], c: Kind[C], /) -> None: ...
    @overload
    def __init__(
        self: Row[tuple[A, B, C, D, E]],
        a: Kind[A],
        b: Kind[B],
        c: Kind[C],
        d: Kind[D],
        e: Kind[E],
        /,
    ) -> None: ...
    @overload
    def __init__(self: Row[tuple[A, ...]], *kinds: Kind[A]) -> None: ...
    def __init__(self, *kinds: Kind[object]) -> None:
        self._checks = tuple(kind.check for kind in kinds)
        self.expected = f"a list of {len(kinds)} entries"

    def check(self, value: object) -> Entries:
        if type(value) is not list or len(value) != len(self._checks):
            raise self.refuse(value)
        try:
            return cast(Entries, tuple(map(call, self._checks, value)))
        except Mismatch:
            _demand_entries(self._checks, value)
            raise


class MappingOf(Kind[dict[str, T]]):
    """A mapping with exactly these keys, and values of `kind`."""

    def __init__(self, keys: Collection[str], kind: Kind[T]) -> None:
        self._kinds = dict.fromkeys(keys, kind)
        self.expected = "a mapping"

    def check(self, value: object) -> dict[str, T]:
        if not isinstance(value, Mapping):
            raise self.refuse(value)
        _demand_keys(value, self._kinds)
        return _checked(value, self._kinds)


class _Mapping(Kind[Mapping[str, object]]):
    expected = "a mapping"

    def check(self, value: object) -> Mapping[str, object]:
        if isinstance(value, Mapping):
            return value
        raise self.refuse(value)


MAPPING: Final = _Mapping()
"""A mapping whose contents are checked elsewhere."""


class _Anything(Kind[object]):
    expected = "anything"

    def check(self, value: object) -> object:
        return value


ANYTHING: Final = _Anything()
"""Any value. It is checked elsewhere."""


def _demand_keys(
    value: Mapping[Any, object], wanted: Collection[str], *, may_lack: Collection[str] = ()
) -> None:
    lacking = [name for name in wanted if name not in value and name not in may_lack]
    unknown = [name for name in value if name not in wanted]
    if not lacking and not unknown:
        return
    problems = [f"lacks {', '.join(lacking)}"] if lacking else []
    if unknown:
        names = ", ".join(map(shown, unknown[:_MOST_NAMES]))
        problems.append(f"has {names}{', ...' if len(unknown) > _MOST_NAMES else ''}")
    expected = ", ".join(wanted) or "(none)"
    raise Mismatch(f"{' and '.join(problems)}, expected the keys {expected}")


def _checked(value: Mapping[Any, object], kinds: Mapping[str, Kind[T]]) -> dict[str, T]:
    checked = {}
    for name, kind in kinds.items():
        try:
            checked[name] = kind.check(value[name])
        except Mismatch as mismatch:
            raise mismatch.within(f".{name}") from None
    return checked


# -- mappings with fields ----------------------------------------------------------------------


class Fields:
    """A mapping that was read and checked. A subclass declares its fields, as shown at the top.

    The arguments of a subclass are the `version` that it reads, the `error` that it raises, and
    `ignores_more`, with which it ignores unknown keys, because another version of avmm may send
    more.
    """

    version: ClassVar[int | None] = None
    """The value that a mapping must have under the key "version". None if there is no such key."""
    _kinds: ClassVar[Mapping[str, Kind[object]]] = {}
    _keys: ClassVar[Mapping[str, None]] = {}
    _may_lack: ClassVar[frozenset[str]] = frozenset()
    _error: ClassVar[type[AvmmError]] = StateError
    _ignores_more: ClassVar[bool] = False
    _what: str

    def __init_subclass__(
        cls,
        *,
        version: int | None = None,
        error: type[AvmmError] | None = None,
        ignores_more: bool = False,
    ) -> None:
        super().__init_subclass__()
        cls.version = cls.version if version is None else version
        cls._error = error or cls._error
        cls._ignores_more = ignores_more or cls._ignores_more
        kinds = dict(cls._kinds)
        for name, kind in vars(cls).items():
            if isinstance(kind, type) and issubclass(kind, Kind):
                raise TypeError(f"{cls.__name__}.{name} is a class, expected an instance of it")
            if isinstance(kind, Kind):
                if name.startswith("_") or (name not in kinds and hasattr(cls.__base__, name)):
                    raise TypeError(f"{cls.__name__}.{name}: a field cannot have this name")
                kinds[name] = kind
        cls._kinds = kinds
        told = () if cls.version is None else ("version",)
        cls._keys = dict.fromkeys((*told, *kinds))
        cls._may_lack = frozenset(n for n, kind in kinds.items() if isinstance(kind, OrMissing))

    @classmethod
    def plain(cls, /, **values: object) -> dict[str, object]:
        """The mapping with these values in its fields, and with the version."""
        if values.keys() != cls._kinds.keys():
            lacking = cls._kinds.keys() - values.keys() - cls._may_lack
            if lacking or values.keys() - cls._kinds.keys():
                raise TypeError(f"{cls.__name__} has the fields {', '.join(cls._kinds)}")
        return values if cls.version is None else {"version": cls.version, **values}

    @classmethod
    def read(cls, what: str, value: object, /, **narrower: Kind[object]) -> Self:
        """The fields of `value`, which messages call `what`.

        `narrower` replaces the kinds of the fields with these names for this call, for bounds that
        are only known now. Raises `StateError`, or the class's own `error`, if `value` does not
        have these fields.
        """
        kinds = {**cls._kinds, **narrower} if narrower else cls._kinds
        try:
            if not isinstance(value, Mapping):
                raise Mismatch(f"is {shown(value)}, expected a mapping")
            return cls._read(what, value, kinds)
        except Mismatch as mismatch:
            raise cls._error(mismatch.text(what)) from None

    @classmethod
    def _read(
        cls, what: str, value: Mapping[Any, object], kinds: Mapping[str, Kind[object]]
    ) -> Self:
        if cls.version is not None:
            version = value.get("version")
            if type(version) is not int or version != cls.version:
                has = f"version {shown(version)}" if "version" in value else "no version"
                raise Mismatch(f"has {has}, expected {cls.version}")
        found = cls.__new__(cls)
        if value.keys() != cls._keys.keys():
            known = value
            if cls._ignores_more:
                known = {name: value[name] for name in cls._keys if name in value}
            _demand_keys(known, cls._keys, may_lack=cls._may_lack)
            kinds = {name: kind for name, kind in kinds.items() if name in known}
            found.__dict__.update(dict.fromkeys(cls._may_lack))
        found.__dict__.update(_checked(value, kinds))
        found._what = what
        return found

    def refusal(self, why: str) -> AvmmError:
        """The error to raise if the fields do not fit together, although each one is right by
        itself.
        """
        return self._error(f"{self._what}: {why}")

    def wrong(self, name: str, expected: str) -> AvmmError:
        """The error to raise if the field `name` is not what was `expected`."""
        return self.refusal(f"{name} is {shown(getattr(self, name))}, expected {expected}")


F = TypeVar("F", bound=Fields)


class Nested(Kind[F]):
    """A mapping that is read by a class of its own. Messages call it `what`, like "a disk"."""

    def __init__(self, fields: type[F], what: str) -> None:
        self._fields = fields
        self._what = what
        self.expected = f"a mapping that describes {what}"

    def check(self, value: object) -> F:
        if not isinstance(value, Mapping):
            raise self.refuse(value)
        return self._fields._read(self._what, value, self._fields._kinds)
