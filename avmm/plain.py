"""Plain data as bytes, for a file or a peer, and back: MessagePack, with limits.

What is read is hostile. It holds numbers, bytes, text, lists, dicts with text as keys, true,
false and None, and nothing else; whatever it claims to be long must be there, so a few bytes never
make much memory. What the values mean is for their readers to check.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NoReturn

import msgpack

from avmm.errors import StateError

_SCALARS: Final = frozenset((int, bool, bytes, str, float, type(None)))
_MOST_ENTRIES: Final = 1 << 16
"""Of a list or dict: more than any state has, and little enough to be set aside unseen."""


def encode(value: Any) -> bytes:
    """`value` as bytes. Raises `StateError` where it is no plain data, that `decode` would
    refuse: once it is in a file that is too late."""
    try:
        _demand_readable(value)
        data: bytes = msgpack.packb(value, use_bin_type=True, default=_refuse)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise StateError(f"this cannot be saved: {error}") from None
    return data


def decode(data: bytes | bytearray | memoryview, what: str) -> Any:
    """The value that `encode` was given. Raises `StateError` naming `what` where it is none."""
    most = len(data)
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_array_len=min(most, _MOST_ENTRIES),
            max_map_len=min(most, _MOST_ENTRIES),
        )
        _demand_plain(value)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        why = str(error) or type(error).__name__  # msgpack's for depth has no text
        raise StateError(f"{what} is damaged, or none: {why}") from None
    return value


def _demand_readable(value: object) -> None:
    """What msgpack writes, it does not always read."""
    if isinstance(value, msgpack.Timestamp | msgpack.ExtType):
        raise TypeError(f"{type(value).__name__} is no plain data")
    if not isinstance(value, list | tuple | dict):
        return
    if len(value) > _MOST_ENTRIES:
        raise ValueError(f"{len(value)} entries in one, at most {_MOST_ENTRIES} can be read")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a key is {key!r}, no text")
        value = list(value.values())
    for item in value:
        _demand_readable(item)


def _demand_plain(value: object) -> None:
    """MessagePack knows times and keys of bytes, too."""
    if type(value) is list:
        items: Iterable[object] = value
    elif type(value) is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"a key is {key!r}, no text")
        items = value.values()
    else:
        items = (value,)
    for item in items:
        if type(item) in (list, dict):
            _demand_plain(item)
        elif type(item) not in _SCALARS:
            raise TypeError(f"{type(item).__name__} is no plain data")


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} is no plain data")


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code} is not expected")
