"""Saved states, spoilt in each way that a reader has to notice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

WRONG = (None, True, -1, 1.5, "text", b"bytes", bytearray(b"bytes"), (), [], {}, {"version": 1}, 1)
"""One of each type, and of some that are no plain data."""


def mappings(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in `state` there are mappings, itself one of them."""
    if isinstance(state, dict):
        yield path
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from mappings(value, (*path, key))


def at(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def with_other_versions(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(what must be said of it, the state with another version in one mapping of it)."""
    for path in mappings(state):
        for version in (at(state, path)["version"] + 1, 0, True, "1", None):
            other = copy.deepcopy(state)
            at(other, path)["version"] = version
            yield f"has version {version!r}, expected {at(state, path)['version']}", other
        other = copy.deepcopy(state)
        del at(other, path)["version"]
        yield f"has no version, expected {at(state, path)['version']}", other


def with_other_keys(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(what must be said of it, the state with a key too few or too many)."""
    for path in mappings(state):
        for key in at(state, path).keys() - {"version"}:
            other = copy.deepcopy(state)
            del at(other, path)[key]
            yield f" lacks {key}, expected the keys ", other
        other = copy.deepcopy(state)
        at(other, path)["one too many"] = 0
        yield " has 'one too many', expected the keys ", other


def _places(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            if key != "version":
                yield (*path, key)
                yield from _places(value, (*path, key))


def with_other_types(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(which key is wrong, the state with a value of another type there)."""
    for path in _places(state):
        good = at(state, path)
        for wrong in WRONG:
            if type(wrong) is not type(good):
                other = copy.deepcopy(state)
                at(other, path[:-1])[path[-1]] = copy.deepcopy(wrong)
                # Its own name, or, of an entry in a list, that of the list.
                yield [str(key) for key in path if isinstance(key, str)][-1], other
