"""How far a snapshot or a migration is, and what it has taken: what users are told, plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SnapshotProgress:
    """How far a snapshot is; `Machine.snapshot` tells it before each piece that is written."""

    round: int
    """The round of copying, from 1. The guest stands still for the last one."""
    pages_left: int
    """What of this round is left to write, in pages of 4096 bytes."""


@dataclass(frozen=True, slots=True)
class MigrationProgress:
    """How far a migration is; `Machine.migrate` tells it some ten times a second."""

    round: int
    """The round of copying, from 1. The guest stands still for the last one."""
    pages_sent: int
    """What of this round was sent, in pages of 4096 bytes."""
    pages_left: int
    """What of this round is left to send, in pages."""
    rate: float
    """How fast the last round went over, in bytes a second; 0 in the first round."""
    dirty_rate: float
    """How fast the guest wrote to its RAM during the last round, in bytes a second."""
    expected_downtime: float
    """How long sending `pages_left` takes at `rate`, in seconds; infinite where that is 0."""
    throttle: float
    """The share of its time that the guest is made to stand still, 0 to 1."""
    bytes_sent: int
    """What was sent since the migration began, in bytes."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a migration has taken, as `Machine.migrate` returns it."""

    downtime: float
    """From the guest's standstill here to the answer that it runs there, in seconds."""
    total: float
    """From the first byte to that answer, in seconds."""
    bytes_sent: int
    rounds: int
    """Rounds of copying, with that of the standstill."""
