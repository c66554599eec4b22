"""Plain data for users: the progress of a snapshot or a migration, and what a migration cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SnapshotProgress:
    """How far a snapshot is. `Machine.snapshot` reports it before it writes each piece."""

    round: int
    """The round of copying, from 1. The guest stands still for the last one."""
    pages_left: int
    """Pages of 4096 bytes that are left to write in this round."""


@dataclass(frozen=True, slots=True)
class MigrationProgress:
    """How far a migration is. `Machine.migrate` reports it about ten times a second."""

    round: int
    """The round of copying, from 1. The guest stands still for the last one."""
    pages_sent: int
    """Pages of 4096 bytes that were sent in this round."""
    pages_left: int
    """Pages that are left to send in this round."""
    rate: float
    """How fast the last round was sent, in bytes per second; 0 in the first round."""
    dirty_rate: float
    """How fast the guest wrote to its RAM during the last round, in bytes per second."""
    expected_downtime: float
    """The seconds that sending `pages_left` takes at `rate`. Infinite if `rate` is 0."""
    throttle: float
    """The share of its time for which the guest is made to stand still, from 0 to 1."""
    bytes_sent: int
    """Bytes that were sent since the migration began."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a migration cost, as `Machine.migrate` returns it."""

    downtime: float
    """Seconds from the guest's standstill at the source to the answer that it runs at the
    destination.
    """
    total: float
    """Seconds from the first byte to that answer."""
    bytes_sent: int
    rounds: int
    """Rounds of copying, including the one at the standstill."""
