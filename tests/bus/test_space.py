"""The bus: which device answers, in which pieces, and what happens where none does."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator
from contextlib import nullcontext
from enum import IntEnum
from itertools import pairwise
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.bus.space import MASKS, Bus, Placement, mmio, msr, pio
from avmm.devices.base import Device
from avmm.errors import ConfigError, DeviceError, VcpuError
from avmm.memory.layout import Region

BASE = 0x100


class Store(Device):
    """Eight bytes that can be read and written; tells of each call."""

    def __init__(self, *, width: int = 8, calls: list[Any] | None = None, tag: str = "") -> None:
        self.max_width = width  # type: ignore[misc]
        self.data = bytearray(range(0x10, 0x18))
        self.calls: list[Any] = [] if calls is None else calls
        self.tag = tag

    def _tell(self, *call: Any) -> None:
        self.calls.append((self.tag, *call) if self.tag else call)

    def read(self, offset: int, size: int) -> Any:
        self._tell(offset, size)
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> Any:
        self._tell(offset, size, value)
        self.data[offset : offset + size] = value.to_bytes(size, "little")
        return None


class Late(Store):
    """The same, but answers when it has been awaited."""

    def read(self, offset: int, size: int) -> Any:
        answer = super().read(offset, size)

        async def later() -> int:
            await trio.lowlevel.checkpoint()
            self._tell("done")
            return answer  # type: ignore[no-any-return]

        return later()

    def write(self, offset: int, size: int, value: int) -> Any:
        super().write(offset, size, value)

        async def later() -> None:
            await trio.lowlevel.checkpoint()
            self._tell("done")

        return later()


class Answers(Device):
    """Answers every access with the same thing."""

    def __init__(self, answer: object, *, width: int = 8) -> None:
        self.answer: Any = answer
        self.max_width = width  # type: ignore[misc]

    def read(self, offset: int, size: int) -> Any:
        return self.answer

    def write(self, offset: int, size: int, value: int) -> Any:
        return self.answer


class Ready:
    """An awaitable that is no coroutine."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __await__(self) -> Generator[Any, None, Any]:
        yield from self._wait().__await__()
        return self.result

    async def _wait(self) -> None:
        await trio.lowlevel.checkpoint()


def bus(*places: Placement, limit: int = 1 << 16, unclaimed: int = 0) -> Bus:
    made = Bus("port", limit, unclaimed)
    for place in places:
        made.add(place, nullcontext())
    return made


async def finish(answer: Any) -> Any:
    """The answer, awaited if need be."""
    return await answer if isinstance(answer, Awaitable) else answer


def number(data: bytes | bytearray) -> int:
    return int.from_bytes(data, "little")


# -- accesses that fit ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("way", [pio, mmio])
def test_an_access_that_fits_is_one_call(size: int, way: Callable[..., Placement]) -> None:
    device = Store()
    there = bus(way(device, BASE, 8))
    assert there.read(BASE, size) == number(device.data[:size])
    value = 0xA1A2A3A4A5A6A7A8 & MASKS[size]
    assert there.write(BASE, size, value) is None
    assert device.calls == [(0, size), (0, size, value)]


def test_an_unaligned_access_that_fits_is_one_call() -> None:
    device = Store()
    there = bus(pio(device, BASE, 8))
    assert there.read(BASE + 3, 4) == 0x16151413
    there.write(BASE + 3, 4, 7)
    assert device.calls == [(3, 4), (3, 4, 7)]


def test_the_last_byte_of_a_device_is_its_own_and_the_next_is_not() -> None:
    there = bus(pio(Store(), BASE, 8))
    assert [there.read(BASE + at, 1) for at in (-1, 0, 7, 8)] == [0xFF, 0x10, 0x17, 0xFF]


def test_a_device_sees_offsets_from_where_it_was_placed_on() -> None:
    device = Store()
    there = bus(pio(device, 0x60, 1), pio(device, 0x64, 2, offset=4))
    assert there.read(0x60, 1) == 0x10
    assert there.read(0x65, 1) == 0x15
    there.write(0x64, 2, 9)
    assert device.calls == [(0, 1), (5, 1), (4, 2, 9)]


def test_the_right_one_of_many_devices_answers_in_whichever_order_they_came() -> None:
    bases = [0x50, 0x10, 0x70, 0x30, 0x00]
    there = bus(*(pio(Answers(base), base, 4) for base in bases))
    assert [there.read(base + 3, 1) for base in bases] == bases


# -- values --------------------------------------------------------------------------------


class Colour(IntEnum):
    RED = 0x103


@pytest.mark.parametrize(
    ("answer", "size", "value"),
    [
        (0x1FF, 1, 0xFF),
        (0x12345, 2, 0x2345),
        (-1, 4, 0xFFFF_FFFF),
        (-2, 8, (1 << 64) - 2),
        (1 << 64, 8, 0),
        (True, 1, 1),
        (False, 1, 0),
        (Colour.RED, 2, 0x103),
        (Colour.RED, 1, 3),
    ],
)
async def test_answers_become_numbers_of_the_asked_size(
    answer: int, size: int, value: int
) -> None:
    at_once = bus(pio(Answers(answer), BASE, 8)).read(BASE, size)
    assert (type(at_once), at_once) == (int, value)
    later = await finish(bus(pio(Answers(Ready(answer)), BASE, 8)).read(BASE, size))
    assert (type(later), later) == (int, value)


async def test_answers_of_parts_are_cut_to_size() -> None:
    there = bus(pio(Answers(-1), BASE, 2), pio(Answers(Ready(0x1_0000)), BASE + 2, 2))
    assert await finish(there.read(BASE, 4)) == 0xFFFF


@pytest.mark.parametrize("answer", [None, "7", 7.0, b"7"])
def test_a_read_answered_with_no_number_names_the_device_and_the_access(answer: object) -> None:
    with pytest.raises(DeviceError) as caught:
        bus(pio(Answers(answer), BASE, 8)).read(BASE + 2, 2)
    assert str(caught.value) == (
        f"Answers answered a read of 2 bytes at 0x102 with {answer!r}: expected an int"
    )


async def test_an_awaitable_of_no_number_names_the_device_and_the_access() -> None:
    with pytest.raises(DeviceError, match="Answers answered a read of 4 bytes at 0x100 with None"):
        await finish(bus(pio(Answers(Ready(None)), BASE, 8)).read(BASE, 4))


@pytest.mark.parametrize("answer", [0, False, 7, "", "done"])
def test_a_write_answered_with_a_value_names_the_device_and_the_access(answer: object) -> None:
    with pytest.raises(DeviceError) as caught:
        bus(pio(Answers(answer), BASE, 8)).write(BASE + 2, 2, 0)
    assert str(caught.value) == (
        f"Answers answered a write at 0x102 with {answer!r}: expected None or an awaitable"
    )


@pytest.mark.parametrize("way", ["read", "write"])
def test_a_device_without_handlers_refuses_by_name(way: str) -> None:
    there = bus(pio(Device(), BASE, 8))
    with pytest.raises(DeviceError, match=r"Device cannot be \w+ \(2 bytes at 0x4\)"):
        there.read(BASE + 4, 2) if way == "read" else there.write(BASE + 4, 2, 0)


# -- accesses that do not fit --------------------------------------------------------------

SPLITS = pytest.mark.parametrize(
    ("width", "base", "offset", "size", "parts"),
    [
        (8, BASE, 0, 3, [(0, 2), (2, 1)]),
        (8, BASE, 1, 3, [(1, 1), (2, 2)]),
        (8, BASE, 0, 5, [(0, 4), (4, 1)]),
        (8, BASE, 3, 5, [(3, 1), (4, 4)]),
        (8, BASE, 1, 6, [(1, 1), (2, 2), (4, 2), (6, 1)]),
        (8, BASE, 0, 7, [(0, 4), (4, 2), (6, 1)]),
        (4, BASE, 0, 8, [(0, 4), (4, 4)]),
        (2, BASE, 0, 8, [(0, 2), (2, 2), (4, 2), (6, 2)]),
        (2, BASE, 1, 4, [(1, 1), (2, 2), (4, 1)]),
        (1, BASE, 2, 4, [(2, 1), (3, 1), (4, 1), (5, 1)]),
        (8, BASE + 1, 0, 3, [(0, 1), (1, 2)]),  # aligned is the address, not the offset
    ],
)


@SPLITS
@pytest.mark.parametrize("kind", [Store, Late])
async def test_a_read_that_does_not_fit_is_split(
    *, kind: type[Store], width: int, base: int, offset: int, size: int, parts: list[Any]
) -> None:
    device = kind(width=width)
    answer = await finish(bus(pio(device, base, 8)).read(base + offset, size))
    assert answer == number(device.data[offset : offset + size])
    assert [call for call in device.calls if call != ("done",)] == parts


@SPLITS
@pytest.mark.parametrize("kind", [Store, Late])
async def test_a_write_that_does_not_fit_is_split(
    *, kind: type[Store], width: int, base: int, offset: int, size: int, parts: list[Any]
) -> None:
    device = kind(width=width)
    written = bytes(range(0xA1, 0xA1 + size))
    await finish(bus(pio(device, base, 8)).write(base + offset, size, number(written)))
    assert [call[:2] for call in device.calls if call != ("done",)] == parts
    assert device.data[offset : offset + size] == written


def test_an_access_across_two_devices_is_split_between_them() -> None:
    calls: list[Any] = []
    there = bus(
        pio(Store(calls=calls, tag="low"), BASE, 4),
        pio(Store(calls=calls, tag="high"), BASE + 4, 8),
    )
    assert there.read(BASE + 2, 4) == 0x1110_1312
    there.write(BASE + 2, 4, 0xDDCC_BBAA)
    assert calls == [("low", 2, 2), ("high", 0, 2), ("low", 2, 2, 0xBBAA), ("high", 0, 2, 0xDDCC)]


def test_each_device_of_a_split_has_its_own_width() -> None:
    calls: list[Any] = []
    there = bus(
        pio(Store(calls=calls, tag="low", width=1), BASE, 4),
        pio(Store(calls=calls, tag="high"), BASE + 4, 8),
    )
    assert there.read(BASE + 2, 6) == 0x1312_1110_1312
    assert calls == [("low", 2, 1), ("low", 3, 1), ("high", 0, 4)]


def test_an_access_over_a_devices_end_reads_ones_beyond() -> None:
    device = Store()
    there = bus(pio(device, BASE, 4))
    assert there.read(BASE + 2, 4) == 0xFFFF_1312
    there.write(BASE + 2, 4, 0xDDCC_BBAA)
    assert device.calls == [(2, 2), (2, 2, 0xBBAA)]


def test_an_access_that_begins_before_a_device_reads_ones_there() -> None:
    device = Store()
    there = bus(pio(device, BASE, 4))
    assert there.read(BASE - 2, 4) == 0x1110_FFFF
    there.write(BASE - 2, 4, 0xDDCC_BBAA)
    assert device.calls == [(0, 2), (0, 2, 0xDDCC)]


def test_an_access_may_hold_a_whole_device_and_nothing_around_it() -> None:
    device = Store()
    there = bus(pio(device, BASE + 3, 2))
    assert there.read(BASE, 8) == 0xFF_FFFF_1110_FFFFFF
    there.write(BASE, 8, 0x0807_0605_0403_0201)
    assert device.calls == [(0, 1), (1, 1), (0, 1, 4), (1, 1, 5)]


def test_an_access_may_reach_over_the_end_of_the_address_space() -> None:
    device = Store()
    there = bus(pio(device, 0xFFFF, 1))
    assert there.read(0xFFFF, 4) == 0xFFFF_FF10
    there.write(0xFFFF, 4, 0xDDCC_BBAA)
    assert device.calls == [(0, 1), (0, 1, 0xAA)]


def row(kinds: str) -> tuple[Bus, list[Any]]:
    """Devices of a byte each, side by side; upper case: one that answers late."""
    calls: list[Any] = []
    places = []
    for at, tag in enumerate(kinds):
        kind = Late if tag.isupper() else Store
        places.append(pio(kind(calls=calls, tag=tag), BASE + at, 1, offset=at))
    return bus(*places), calls


def tags(calls: list[Any]) -> str:
    """The order of things: a device's letter for its call, `!` for its awaitable's end."""
    return "".join("!" if call[1] == "done" else call[0] for call in calls)


@pytest.mark.parametrize(
    ("kinds", "order"),
    [("aBcd", "aB!cd"), ("Abcd", "A!bcd"), ("abcD", "abcD!"), ("ABcD", "A!B!cD!")],
)
async def test_the_parts_behind_a_late_one_wait_for_it(kinds: str, order: str) -> None:
    there, calls = row(kinds)
    assert await finish(there.read(BASE, 4)) == 0x1312_1110
    assert tags(calls) == order
    calls.clear()
    await finish(there.write(BASE, 4, 0xDDCC_BBAA))
    assert tags(calls) == order
    assert [call[3] for call in calls if call[1] != "done"] == [0xAA, 0xBB, 0xCC, 0xDD]


async def test_a_late_part_may_be_followed_by_nobody() -> None:
    there, calls = row("aB")
    assert await finish(there.read(BASE, 4)) == 0xFFFF_1110
    await finish(there.write(BASE, 4, 0xDDCC_BBAA))
    assert tags(calls) == "aB!aB!"


@pytest.mark.parametrize("result", [5, None])
async def test_any_awaitable_will_do(result: int | None) -> None:
    there = bus(pio(Answers(Ready(result)), BASE, 8))
    if result is None:
        assert await finish(there.write(BASE, 4, 0)) is None
    else:
        assert await finish(there.read(BASE, 4)) == 5


async def test_a_mistake_in_a_part_names_the_part() -> None:
    there = bus(pio(Answers(Ready(1)), BASE, 2), pio(Answers("x"), BASE + 2, 2))
    with pytest.raises(DeviceError, match="read of 2 bytes at 0x102 with 'x'"):
        await finish(there.read(BASE, 4))


# -- the device's lock ---------------------------------------------------------------------


class Lock:
    """Refuses to be taken twice, where a real one would wait for ever."""

    held = False
    taken = 0

    def __enter__(self) -> None:
        assert not self.held
        self.held = True
        self.taken += 1

    def __exit__(self, *exc: object) -> None:
        self.held = False


class Watched(Device):
    """Notes whether its lock is held when it is called, and when it is awaited."""

    def __init__(self, lock: Lock, *, late: bool, width: int = 8) -> None:
        self.lock = lock
        self.late = late
        self.max_width = width  # type: ignore[misc]
        self.called: list[bool] = []
        self.awaited: list[bool] = []

    def _answer(self, value: int | None) -> Any:
        self.called.append(self.lock.held)
        return self._later(value) if self.late else value

    async def _later(self, value: int | None) -> int | None:
        self.awaited.append(self.lock.held)
        await trio.lowlevel.checkpoint()
        self.awaited.append(self.lock.held)
        return value

    def read(self, offset: int, size: int) -> Any:
        return self._answer(0)

    def write(self, offset: int, size: int, value: int) -> Any:
        return self._answer(None)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("width", [2, 8], ids=["split", "whole"])
async def test_the_lock_is_held_for_the_call_and_not_for_the_wait(late: bool, width: int) -> None:
    lock = Lock()
    device = Watched(lock, late=late, width=width)
    there = bus()
    there.add(pio(device, BASE, 8), lock)
    await finish(there.read(BASE, 4))
    await finish(there.write(BASE, 4, 0))
    calls = 2 * 4 // min(width, 4)
    assert device.called == [True] * calls
    assert device.awaited == ([False] * 2 * calls if late else [])
    assert (lock.held, lock.taken) == (False, calls)


def test_each_device_is_called_under_its_own_lock_alone() -> None:
    locks = [Lock(), Lock()]
    devices = [Watched(locks[0], late=False), Watched(locks[1], late=False)]
    alone: list[bool] = []

    class Neighbour(Device):
        def read(self, offset: int, size: int) -> int:
            alone.append(not locks[0].held)
            return 0

    there = bus()
    there.add(pio(devices[0], BASE, 2), locks[0])
    there.add(pio(Neighbour(), BASE + 2, 2), locks[1])
    there.read(BASE, 4)
    assert devices[0].called == [True]
    assert alone == [True]


def test_a_device_that_touches_itself_is_called_part_by_part() -> None:
    lock = Lock()
    device = Watched(lock, late=False)
    there = bus()
    there.add(pio(device, BASE, 2), lock)
    there.add(pio(device, BASE + 2, 2, offset=2), lock)
    there.read(BASE, 4)
    assert device.called == [True, True]


@pytest.mark.parametrize("way", ["read", "write"])
def test_the_lock_is_let_go_where_a_handler_raises(way: str) -> None:
    lock = Lock()
    there = bus()
    there.add(pio(Device(), BASE, 2), lock)
    with pytest.raises(DeviceError):
        there.read(BASE, 1) if way == "read" else there.write(BASE, 1, 0)
    assert (lock.held, lock.taken) == (False, 1)


# -- nobody there --------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 9))
def test_nobody_reads_all_ones_and_swallows_writes(size: int) -> None:
    there = bus(pio(Store(), BASE, 8))
    assert there.read(0x200, size) == MASKS[size] == (1 << 8 * size) - 1
    assert there.write(0x200, size, 0) is None
    assert bus().read(0x200, size) == MASKS[size]


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR])
def test_an_unclaimed_address_is_reported_once(
    caplog: pytest.LogCaptureFixture, level: int
) -> None:
    caplog.set_level(logging.DEBUG, "avmm.bus.space")
    there = bus(unclaimed=level)
    for _ in range(3):
        there.read(0xABC, 1)
        there.write(0xABC, 2, 0)
    there.write(0x10, 1, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "no device at port 0xabc",
        "no device at port 0x10",
    ]
    assert {record.levelno for record in caplog.records} == {level}


def test_unclaimed_addresses_may_be_kept_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    bus(unclaimed=0).read(0xABC, 1)
    assert not caplog.records


def test_the_unclaimed_part_of_an_access_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    there = bus(pio(Store(), BASE, 4), unclaimed=logging.WARNING)
    there.write(BASE + 2, 4, 0)
    assert [record.getMessage() for record in caplog.records] == ["no device at port 0x104"]


def test_a_guest_cannot_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    there = bus(unclaimed=logging.WARNING)
    for address in range(1000):
        there.read(address, 1)
    texts = [record.getMessage() for record in caplog.records]
    assert texts[:-1] == [f"no device at port {address:#x}" for address in range(256)]
    assert texts[-1] == "no more such port addresses are reported"


# -- placing devices -----------------------------------------------------------------------


class Other(Store):
    pass


@pytest.mark.parametrize(
    ("base", "size"), [(BASE, 8), (BASE - 1, 2), (BASE + 7, 2), (BASE + 2, 1), (BASE - 8, 32)]
)
def test_devices_that_overlap_are_both_named(base: int, size: int) -> None:
    there = bus(pio(Store(), 0x10, 4), pio(Store(), BASE, 8))
    with pytest.raises(ConfigError) as caught:
        there.add(pio(Other(), base, size), nullcontext())
    assert str(caught.value) == (
        f"Other at port {base:#x}-{base + size - 1:#x} overlaps Store at 0x100-0x107"
    )
    assert there.read(BASE - 1, 1) == 0xFF


def test_devices_may_touch() -> None:
    there = bus(pio(Store(), BASE, 8), pio(Answers(1), BASE - 1, 1), pio(Answers(2), BASE + 8, 1))
    assert [there.read(BASE + at, 1) for at in (-1, 0, 8)] == [1, 0x10, 2]


@pytest.mark.parametrize(("base", "size"), [(-1, 4), (0xFFFF, 2), (0x1_0000, 1), (8, 0), (8, -1)])
def test_a_range_outside_of_the_address_space_is_refused_by_name(base: int, size: int) -> None:
    with pytest.raises(ConfigError, match=r"^Store at port .*: expected a range within 0-0xffff$"):
        bus(pio(Store(), base, size))


@pytest.mark.parametrize("width", [0, 3, 16])
def test_a_width_that_no_bus_has_is_refused_by_name(width: int) -> None:
    with pytest.raises(ConfigError, match=f"^Store at port .*: max_width {width}, expected 1, 2"):
        bus(pio(Store(width=width), BASE, 8))


def test_a_device_may_have_the_whole_address_space() -> None:
    there = bus(pio(Answers(5), 0, 1 << 16))
    assert there.read(0, 1) == there.read(0xFFFF, 1) == 5


# -- an address of eight bytes: MSRs -------------------------------------------------------


def msrs(*places: Placement, unclaimed: int = 0) -> Bus:
    made = Bus("MSR", 1 << 32, unclaimed, unit=8)
    for place in places:
        made.add(place, nullcontext())
    return made


def test_an_msr_has_eight_bytes_of_the_device() -> None:
    device = Store()
    there = msrs(msr(device, 0x10, 2))
    there.read(8 * 0x10, 8)
    there.read(8 * 0x11, 8)
    assert device.calls == [(0, 8), (8, 8)]
    assert there.read(8 * 0x12, 8) == MASKS[8]
    assert there.read(8 * 0x10 - 8, 8) == MASKS[8]


def test_msrs_that_overlap_are_named_by_their_numbers() -> None:
    there = msrs(msr(Store(), 0x10, 4))
    there.add(msr(Store(), 0x14), nullcontext())
    with pytest.raises(ConfigError) as caught:
        there.add(msr(Other(), 0x13), nullcontext())
    assert str(caught.value) == "Other at MSR 0x13-0x13 overlaps Store at 0x10-0x13"


def test_messages_about_msrs_show_their_numbers(caplog: pytest.LogCaptureFixture) -> None:
    there = msrs(msr(Answers("x"), 0x10), unclaimed=logging.WARNING)
    there.read(8 * 0x20, 8)
    assert caplog.messages == ["no device at MSR 0x20"]
    with pytest.raises(DeviceError, match="at 0x10 with"):
        there.read(8 * 0x10, 8)


# -- all together --------------------------------------------------------------------------

SPACE = 40


class Slice(Device):
    """Its part of one array that all share; refuses what a device must never see."""

    def __init__(self, data: bytearray, size: int, width: int, late: bool) -> None:
        self.data, self.size, self.late = data, size, late
        self.max_width = width  # type: ignore[misc]

    def read(self, offset: int, size: int) -> Any:
        self._check(offset, size)
        answer = number(self.data[offset : offset + size])
        return Ready(answer) if self.late else answer

    def write(self, offset: int, size: int, value: int) -> Any:
        self._check(offset, size)
        self.data[offset : offset + size] = value.to_bytes(size, "little")
        return Ready(None) if self.late else None

    def _check(self, offset: int, size: int) -> None:
        assert size in (1, 2, 4, 8)
        assert size <= self.max_width
        assert 0 <= offset <= offset + size <= self.size


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int, int, bool]]:
    """Devices side by side or with room between them: (base, size, width, late)."""
    edges = sorted(draw(st.sets(st.integers(0, SPACE), max_size=8)))
    kinds = st.none() | st.tuples(st.sampled_from([1, 2, 4, 8]), st.booleans())
    found = []
    for base, end in pairwise(edges):
        if (kind := draw(kinds)) is not None:
            found.append((base, end - base, *kind))
    return draw(st.permutations(found))


WRITTEN = st.binary(min_size=8, max_size=8)
ACCESSES = st.tuples(st.integers(0, SPACE + 8), st.integers(1, 8), st.none() | WRITTEN)


@settings(deadline=None)
@given(layout=layouts(), accesses=st.lists(ACCESSES, max_size=20))
async def test_any_devices_together_are_as_one_flat_array(
    layout: list[tuple[int, int, int, bool]], accesses: list[tuple[int, int, bytes | None]]
) -> None:
    flat = bytearray(b"\xff" * (SPACE + 16))
    claimed: set[int] = set()
    there = bus(limit=SPACE)
    parts = []
    for base, size, width, late in layout:
        data = bytearray(range(base, base + size))
        flat[base : base + size] = data
        claimed.update(range(base, base + size))
        parts.append((base, data))
        there.add(mmio(Slice(data, size, width, late), base, size), nullcontext())
    for address, size, written in accesses:
        if written is None:
            expected = number(flat[address : address + size])
            assert await finish(there.read(address, size)) == expected
        else:
            await finish(there.write(address, size, number(written[:size])))
            for at, byte in enumerate(written[:size], address):
                if at in claimed:
                    flat[at] = byte
    assert all(flat[base : base + len(data)] == data for base, data in parts)


def test_an_access_to_ram_that_leaves_the_guest_is_the_hosts_failure() -> None:
    """A page-table KVM exits as for MMIO if a page of RAM cannot be had. No guest can bring that
    about, except by a write to a read-only region."""
    ram = [Region(0, 0x2000, 0), Region(0x2000, 0x1000, 0x2000, readonly=True)]
    made = Bus("address", 1 << 52, 0, ram=ram)
    for address in (0, 0x1FFF, 0x2000):
        with pytest.raises(VcpuError, match=f"cannot provide the guest's memory at {address:#x}"):
            made.read(address, 1)
    with pytest.raises(VcpuError, match="cannot provide the guest's memory at 0x1ff8"):
        made.write(0x1FF8, 8, 0)
    assert made.write(0x2000, 4, 1) is None
    assert made.read(0x3000, 4) == 0xFFFF_FFFF
