"""Decorators that say in which thread a method runs. They do nothing; they inform the reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Method = TypeVar("_Method", bound=Callable[..., object])


def in_vcpu_thread(method: _Method) -> _Method:
    """The method runs in a vCPU's own thread, and calls nothing of trio's."""
    return method


def in_trio(method: _Method) -> _Method:
    """The method runs in trio's thread, which it never blocks for long."""
    return method


def anywhere(method: _Method) -> _Method:
    """The method may be called from any thread, at any time."""
    return method
