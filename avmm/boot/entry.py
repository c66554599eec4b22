"""Where and how the boot processor starts: what a boot format hands to the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Mode(Enum):
    """The processor mode in which the guest is entered."""

    REAL = "real"
    """16-bit real mode: CS:IP with CS base = `ip & ~0xffff`, paging and protection off."""
    PROTECTED = "protected"
    """32-bit protected mode, flat 4 GiB segments, paging off, interrupts off."""
    LONG = "long"
    """64-bit long mode, flat segments, the first 4 GiB mapped one to one, interrupts off."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The boot processor's first state.

    `registers` holds general registers by their 64-bit names (`"rbx"`); the rest are 0.
    """

    mode: Mode
    ip: int
    registers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FlatOptions:
    """How a flat binary is to be run: in which mode, and where it is loaded and entered."""

    mode: Mode
    address: int


class Protocol(Enum):
    """How a Linux kernel is to be entered, where its image leaves the choice."""

    AUTO = "auto"
    """As the image's format has it: `avmm.arch.x86_64.boot.load`."""
    PVH = "pvh"
    """By its PVH note, in 32-bit protected mode."""
    LINUX64 = "linux64"
    """By Linux's 64-bit boot protocol."""
