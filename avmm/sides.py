"""Which side a method runs on. These decorators do nothing: they are read by people."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Method = TypeVar("_Method", bound=Callable[..., object])


def in_vcpu_thread(method: _Method) -> _Method:
    """It runs in a vCPU's own thread, and calls nothing of trio's."""
    return method


def in_trio(method: _Method) -> _Method:
    """It runs in trio's thread, which it never blocks for long."""
    return method


def anywhere(method: _Method) -> _Method:
    """It may be called from any thread, at any time."""
    return method
