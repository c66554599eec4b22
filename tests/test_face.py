"""The public face: what `avmm` exports, and what its signatures name."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio

import avmm
import avmm.control

CONTRACTS = (
    avmm.Machine,
    avmm.Listener,
    avmm.Device,
    avmm.Host,
    avmm.Disk,
    avmm.VirtioDevice,
    avmm.VirtioLink,
    avmm.Backend,
    avmm.CallHandler,
    avmm.Scrollback,
    avmm.VsockListener,
)
"""Classes whose methods users call or write."""
GIVEN = (avmm.Listener, avmm.VsockListener)
"""Those of them that users do not make."""
EXPORTED = {name: getattr(avmm, name) for name in avmm.__all__}
FUNCTIONS = [value for value in EXPORTED.values() if inspect.isfunction(value)]


def methods(kind: type) -> Iterator[Callable[..., Any]]:
    for name, member in vars(kind).items():
        if name.startswith("_") and name != "__call__" and (name != "__init__" or kind in GIVEN):
            continue
        found = member.fget if isinstance(member, property) else member
        found = getattr(found, "__func__", found)
        if inspect.isfunction(found):
            yield found


SIGNATURES = [*FUNCTIONS, *(method for kind in CONTRACTS for method in methods(kind))]


def named(annotation: Any) -> Iterator[type]:
    """The classes that an annotation names, at whatever depth."""
    origin = typing.get_origin(annotation)
    for part in (annotation, origin):
        if isinstance(part, type) and not isinstance(part, types.GenericAlias):
            yield part
    for argument in typing.get_args(annotation):
        for part in argument if isinstance(argument, list) else [argument]:
            yield from named(part)


def test_all_is_sorted_and_there() -> None:
    for module in (avmm, avmm.control):
        assert list(module.__all__) == sorted(set(module.__all__))
        for name in module.__all__:
            assert hasattr(module, name)


def test_names_that_are_imported_late_are_there_for_who_looks() -> None:
    code = "import avmm, sys; print(set(avmm.__all__) - set(dir(avmm)), hasattr(avmm, 'typo'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"set() False\n"


@pytest.mark.parametrize("name", avmm.__all__)
def test_what_is_exported_says_what_it_is(name: str) -> None:
    said = vars(getattr(avmm, name)).get("__doc__") or getattr(avmm, name).__doc__
    assert said
    assert not said.startswith(f"{name}("), "the one that a dataclass gets by itself"


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_a_public_signature_names_only_what_is_public(function: Callable[..., Any]) -> None:
    """Names that are imported for type checkers alone are public, too: they are found here."""
    public = {"trio": trio, **EXPORTED}
    hints = typing.get_type_hints(inspect.unwrap(function), localns=public)
    for kind in {kind for hint in hints.values() for kind in named(hint)}:
        if kind.__module__.startswith("avmm"):
            assert public.get(kind.__name__) is kind


def test_types_of_every_depth_are_looked_at() -> None:
    hint = typing.get_type_hints(avmm.restore)["devices"]
    assert {avmm.Described, avmm.Placement, avmm.Unplaced} <= set(named(hint))
