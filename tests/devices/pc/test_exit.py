"""The ports that end a run."""

from __future__ import annotations

import pytest

from avmm.devices.pc.exit import DebugExit, ExitStatus
from avmm.errors import DeviceError


@pytest.mark.parametrize(
    ("value", "size", "status"),
    [
        (0, 1, 1),
        (1, 1, 3),
        (0x10, 4, 0x21),
        (0xFF, 1, 0x1FF),
        (0xFFFF, 2, 0x1FFFF),
        (0xFFFFFFFF, 4, 0x1FFFFFFFF),
    ],
)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_debug_exit(cpu, value, size, status, offset):
    statuses = []
    cpu(DebugExit(statuses.append)).out(offset, value, size)
    assert statuses == [status]


@pytest.mark.parametrize(("value", "size"), [(0, 1), (7, 1), (0x1234, 2), (0xFFFFFFFF, 4)])
def test_exit_status(cpu, value, size):
    statuses = []
    cpu(ExitStatus(statuses.append)).out(0, value, size)
    assert statuses == [value]


@pytest.mark.parametrize("kind", [DebugExit, ExitStatus])
def test_reads_give_zero_and_end_nothing(cpu, kind):
    statuses = []
    port = cpu(kind(statuses.append))
    assert [port.inp(0, size) for size in (1, 2, 4)] == [0, 0, 0]
    assert statuses == []


@pytest.mark.parametrize("kind", [DebugExit, ExitStatus])
def test_there_is_no_state(kind):
    device = kind(print)
    assert device.save() == {"version": 1}
    device.load({"version": 1})
    for wrong in ({}, {"version": 1, "status": 1}, None, []):
        with pytest.raises(DeviceError, match=kind.__name__):
            device.load(wrong)


@pytest.mark.parametrize("kind", [DebugExit, ExitStatus])
def test_wider_accesses_are_split_by_the_bus(kind):
    assert kind.max_width == 4
