"""Plain data as bytes and back: MessagePack, with limits.

Every length that the bytes claim must be backed by bytes, so a few bytes never use much memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NoReturn

from avmm.errors import StateError

MOST_ENTRIES: Final = 1 << 16
"""The most entries of a list or dict: more than any state has, and few enough to allocate before
the data are seen.
"""
_SCALARS: Final = frozenset((int, bool, bytes, str, float, type(None)))


def encode(value: object) -> bytes:
    """`value` as bytes. Raises `StateError` if `decode` would refuse the bytes, because it would
    be too late to learn that when they are read.
    """
    import msgpack  # noqa: PLC0415 - only when it is needed, because `import avmm` imports this module

    try:
        _demand_readable(value, (msgpack.Timestamp, msgpack.ExtType))
        data: bytes = msgpack.packb(value, use_bin_type=True, default=_refuse)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise StateError(f"this cannot be saved: {error}") from None
    return data


def decode(data: bytes | bytearray | memoryview, what: str) -> object:
    """The value that `encode` was given. Raises `StateError`, which names `what`, if the data do
    not contain such a value.
    """
    import msgpack  # noqa: PLC0415 - as above

    most = len(data)
    try:
        value: object = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_array_len=min(most, MOST_ENTRIES),
            max_map_len=min(most, MOST_ENTRIES),
        )
        _demand_plain(value)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        # msgpack's error for too much nesting has no text.
        why = str(error) or type(error).__name__
        raise StateError(f"{what} is damaged or not valid: {why}") from None
    return value


def _demand_readable(value: object, refused: tuple[type, ...]) -> None:
    """Refuse values that msgpack can write, but refuses to read."""
    if isinstance(value, refused):
        raise TypeError(f"{type(value).__name__} is not plain data")
    if not isinstance(value, list | tuple | dict):
        return
    if len(value) > MOST_ENTRIES:
        raise ValueError(
            f"one list or mapping has {len(value)} entries; at most {MOST_ENTRIES} can be read"
        )
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a key is {key!r}, which is not text")
        value = list(value.values())
    for item in value:
        _demand_readable(item, refused)


def _demand_plain(value: object) -> None:
    """Refuse what MessagePack can hold, but plain data cannot, such as times and keys of bytes."""
    if type(value) is list:
        items: Iterable[object] = value
    elif type(value) is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"a key is {key!r}, which is not text")
        items = value.values()
    else:
        items = (value,)
    for item in items:
        if type(item) in (list, dict):
            _demand_plain(item)
        elif type(item) not in _SCALARS:
            raise TypeError(f"{type(item).__name__} is not plain data")


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} is not plain data")


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code} is not expected")
