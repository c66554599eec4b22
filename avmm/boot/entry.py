"""Where and how the boot processor starts. A boot format tells that to the machine."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple


class Mode(Enum):
    """The processor mode in which the guest is entered."""

    REAL = "real"
    """16-bit real mode: at CS:IP with the CS base `ip & ~0xffff`, paging and protection off."""
    PROTECTED = "protected"
    """32-bit protected mode, flat 4 GiB segments, paging off, interrupts off."""
    LONG = "long"
    """64-bit long mode, flat segments, the first 4 GiB mapped one to one, interrupts off."""


class Entry(NamedTuple):
    """The boot processor's first state.

    `registers` holds general registers by their 64-bit names (`"rbx"`). All others are 0.
    """

    mode: Mode
    ip: int
    registers: Mapping[str, int] = MappingProxyType({})
    is_kernel: bool = False
    """Does an operating system start, which uses all that its processor offers?"""


class FlatOptions(NamedTuple):
    """How to run a flat binary: the mode in which it is entered, and the address at which it is
    loaded and entered.
    """

    mode: Mode
    address: int


class Protocol(Enum):
    """How a Linux kernel is entered, if its image allows several ways."""

    AUTO = "auto"
    """In the way that the image's format suggests; see `avmm.arch.x86_64.boot.load`."""
    PVH = "pvh"
    """By its PVH note, in 32-bit protected mode."""
    LINUX64 = "linux64"
    """By Linux's 64-bit boot protocol."""
