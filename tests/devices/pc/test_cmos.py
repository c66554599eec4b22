"""The real-time clock and CMOS memory."""

from __future__ import annotations

import calendar
import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm import plain
from avmm.devices.pc.cmos import Cmos
from avmm.errors import ConfigError, DeviceError

MIB, GIB = 1 << 20, 1 << 30
SECOND = 10**9
UTC = datetime.UTC
# A Wednesday.
NOON = calendar.timegm((2024, 2, 28, 12, 34, 56)) * SECOND


class Clock:
    now = NOON

    def __call__(self):
        return self.now


@pytest.fixture
def port(cpu, clock):
    clock.now = NOON
    return cpu(Cmos(low_memory=256 * MIB, clock=clock))


def get(port, index):
    port.out(0, index)
    return port.inp(1)


def put(port, index, value):
    port.out(0, index)
    port.out(1, value)


def bcd(value):
    return (value >> 4) * 10 + (value & 0x0F)


def linux_get_time(port):
    """mc146818_get_time(): seconds, UIP, seconds again, and all."""
    for _ in range(100):
        seconds = get(port, 0)
        if get(port, 0x0A) & 0x80 or get(port, 0) != seconds:
            continue
        fields = [get(port, index) for index in (9, 8, 7, 4, 2)]
        century = get(port, 0x32)
        if get(port, 0x0A) & 0x80 or get(port, 0) != seconds:
            continue
        assert get(port, 0x0B) & 0x02, "24 hours"
        decode = int if get(port, 0x0B) & 0x04 else bcd
        year, month, day, hour, minute = map(decode, fields)
        return datetime.datetime(
            decode(century) * 100 + year, month, day, hour, minute, decode(seconds), tzinfo=UTC
        )
    raise AssertionError("UIP stays set")


def linux_set_time(port, when):
    """mc146818_set_time()."""
    control, select = get(port, 0x0B), get(port, 0x0A)
    put(port, 0x0B, control | 0x80)
    put(port, 0x0A, select | 0x70)
    century, year = divmod(when.year, 100)
    for index, value in (
        (9, year),
        (8, when.month),
        (7, when.day),
        (4, when.hour),
        (2, when.minute),
        (0, when.second),
        (0x32, century),
    ):
        put(port, index, value if control & 4 else value // 10 << 4 | value % 10)
    put(port, 0x0B, control)
    put(port, 0x0A, select)


def test_the_time_is_the_hosts(port, clock):
    assert linux_get_time(port) == datetime.datetime(2024, 2, 28, 12, 34, 56, tzinfo=UTC)
    assert get(port, 6) == 4, "Sunday is 1"
    clock.now += (86_400 + 4) * SECOND
    assert linux_get_time(port) == datetime.datetime(2024, 2, 29, 12, 35, 0, tzinfo=UTC)
    assert get(port, 6) == 5


def test_the_real_clock(cpu):
    port = cpu(Cmos(low_memory=MIB))
    before = datetime.datetime.now(UTC).replace(microsecond=0)
    assert before <= linux_get_time(port) <= datetime.datetime.now(UTC)


def test_sunday(port, clock):
    clock.now = calendar.timegm((2024, 3, 3, 0, 0, 0)) * SECOND
    assert get(port, 6) == 1


def test_bcd_and_binary(port):
    assert [get(port, n) for n in (0, 2, 4, 7, 8, 9, 0x32)] == [
        0x56, 0x34, 0x12, 0x28, 0x02, 0x24, 0x20,
    ]  # fmt: skip
    put(port, 0x0B, 0x06)
    assert [get(port, n) for n in (0, 2, 4, 7, 8, 9, 0x32)] == [56, 34, 12, 28, 2, 24, 20]


@pytest.mark.parametrize(
    ("hour", "register"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_twelve_hours(port, clock, hour, register):
    clock.now = calendar.timegm((2024, 2, 28, hour, 0, 0)) * SECOND
    put(port, 0x0B, 0x00)
    assert get(port, 4) == register
    put(port, 4, register)
    put(port, 0x0B, 0x02)
    assert bcd(get(port, 4)) == hour


def test_century_is_at_0x37_as_well(port):
    assert get(port, 0x37) == 0x20
    put(port, 0x37, 0x19)
    assert get(port, 0x32) == 0x19


@pytest.mark.parametrize("binary", [0, 4])
def test_the_time_can_be_set_and_goes_on_from_there(port, clock, binary):
    put(port, 0x0B, 0x02 | binary)
    when = datetime.datetime(1999, 12, 31, 23, 59, 58, tzinfo=UTC)
    linux_set_time(port, when)
    assert linux_get_time(port) == when
    clock.now += 2 * SECOND
    assert linux_get_time(port) == datetime.datetime(2000, 1, 1, tzinfo=UTC)


def test_after_the_dividers_reset_the_next_second_comes_after_half_of_one(port, clock):
    """So Linux sets the clock 500 ms before the second (rtc_set_ntp_time)."""
    clock.now += 123_456_789
    linux_set_time(port, datetime.datetime(2024, 1, 1, tzinfo=UTC))
    clock.now += SECOND // 2 - 1
    assert bcd(get(port, 0)) == 0
    clock.now += 1
    assert bcd(get(port, 0)) == 1


def test_registers_can_be_set_one_by_one_while_the_clock_runs(port, clock):
    clock.now += SECOND // 4
    put(port, 2, 0x59)
    put(port, 0, 0x59)
    assert linux_get_time(port).minute == 59
    clock.now += SECOND * 3 // 4 - 1
    assert bcd(get(port, 0)) == 59, "the fraction of the second is kept"
    clock.now += 1
    assert linux_get_time(port) == datetime.datetime(2024, 2, 28, 13, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(("register", "value"), [(0x0B, 0x82), (0x0A, 0x66), (0x0A, 0x76)])
def test_a_held_clock_stands_still(port, clock, register, value):
    put(port, register, value)
    clock.now += 101 * SECOND - 1
    assert bcd(get(port, 0)) == 56
    assert not get(port, 0x0A) & 0x80
    put(port, register, {0x0B: 0x02, 0x0A: 0x26}[register])
    assert bcd(get(port, 0)) == 56


def test_letting_go_of_set_keeps_the_fraction_of_the_second(port, clock):
    clock.now += SECOND // 4
    put(port, 0x0B, 0x82)
    clock.now += 10 * SECOND
    put(port, 0x0B, 0x02)
    clock.now += SECOND * 3 // 4 - 1
    assert bcd(get(port, 0)) == 56
    clock.now += 1
    assert bcd(get(port, 0)) == 57


def test_a_date_that_is_none_counts_on(port):
    put(port, 0x0B, 0x82)
    put(port, 7, 0x31)
    put(port, 0x0B, 0x02)
    assert linux_get_time(port).date() == datetime.date(2024, 3, 2)


def test_uip_comes_before_each_second_and_goes(port, clock):
    step = 50_000
    seen = []
    for _ in range(2 * SECOND // step):
        clock.now += step
        if get(port, 0x0A) & 0x80:
            seen.append(clock.now % SECOND)
    assert len(seen) == pytest.approx(2 * 2_228_000 / step, abs=4)
    assert min(seen) >= SECOND - 2_228_000
    assert get(port, 0x0A) & 0x7F == 0x26


def test_uip_cannot_be_written(port):
    put(port, 0x0A, 0xA6)
    assert get(port, 0x0A) == 0x26


def test_interrupts_cannot_be_enabled(port):
    put(port, 0x0B, 0x7A)
    assert get(port, 0x0B) == 0x02
    put(port, 0x0B, 0x06)
    assert get(port, 0x0B) == 0x06


def test_update_and_periodic_flags_can_be_polled(port, clock):
    get(port, 0x0C)
    assert get(port, 0x0C) == 0
    clock.now += SECOND // 1024
    assert get(port, 0x0C) == 0x40
    assert get(port, 0x0C) == 0
    clock.now += SECOND
    assert get(port, 0x0C) == 0x50
    put(port, 0x0A, 0x20)
    clock.now += SECOND
    assert get(port, 0x0C) == 0x10, "no periodic rate"
    put(port, 0x0B, 0x82)
    clock.now += SECOND
    assert get(port, 0x0C) == 0


@pytest.mark.parametrize(
    ("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (8, 256), (15, 2)]
)
def test_periodic_rates(port, clock, rate, hertz):
    put(port, 0x0A, 0x20 | rate)
    get(port, 0x0C)
    count = 0
    for _ in range(10 * hertz):
        clock.now += SECOND // (10 * hertz)
        count += get(port, 0x0C) & 0x40 != 0
    assert count == pytest.approx(hertz, abs=2)


def test_c_and_d_cannot_be_written(port):
    for index in (0x0C, 0x0D):
        put(port, index, 0x7F)
    assert get(port, 0x0C) == 0
    assert get(port, 0x0D) == 0x80


def test_alarm_and_free_memory_are_storage(port):
    for index in (1, 3, 5, 0x0E, 0x0F, 0x40, 0x7F):
        put(port, index, index ^ 0xA5)
        assert get(port, index) == index ^ 0xA5


def test_nmi_bit_is_masked_and_the_index_is_not_readable(port):
    put(port, 0x40, 0x12)
    assert get(port, 0xC0) == 0x12
    assert port.inp(0) == 0xFF


def word(port, index, size=2):
    return sum(get(port, index + n) << 8 * n for n in range(size))


@pytest.mark.parametrize(
    ("sizes", "base", "extended", "above", "huge"),
    [
        ((256 * MIB, 0), 640, 0xFFFF, 240 * 16, 0),
        ((3 * GIB, 5 * GIB), 640, 0xFFFF, (3 * 1024 - 16) * 16, 5 * 1024 * 16),
        ((8 * MIB, 0), 640, 7 * 1024, 0, 0),
        ((512 << 10, 0), 512, 0, 0, 0),
        ((4 * GIB, 1023 * GIB), 640, 0xFFFF, 65280, 1023 * 1024 * 16),
    ],
)
def test_memory_sizes(cpu, sizes, base, extended, above, huge):
    port = cpu(Cmos(low_memory=sizes[0], high_memory=sizes[1]))
    assert word(port, 0x15) == base
    assert word(port, 0x17) == word(port, 0x30) == extended
    assert word(port, 0x34) == above
    assert word(port, 0x5B, 3) == huge


@pytest.mark.parametrize("cpus", [1, 4, 256])
def test_number_of_cpus(cpu, cpus):
    assert get(cpu(Cmos(low_memory=MIB, cpus=cpus)), 0x5F) == cpus - 1


@pytest.mark.parametrize(
    "wrong", [{"low_memory": -1}, {"low_memory": 5 * GIB}, {"high_memory": 1 << 40}, {"cpus": 0},
              {"cpus": 257}]
)  # fmt: skip
def test_what_cannot_be_described_is_refused(wrong):
    with pytest.raises(ConfigError, match="Cmos"):
        Cmos(**{"low_memory": MIB, **wrong})


def test_state(port, cpu, clock):
    linux_set_time(port, datetime.datetime(1999, 1, 1, tzinfo=UTC))
    put(port, 0x40, 0x77)
    state = port.device.save()
    other = cpu(Cmos(low_memory=MIB, clock=clock))
    other.device.load(state)
    assert other.device.save() == state
    assert other.inp(1) == 0x77
    clock.now += 10 * SECOND
    assert linux_get_time(other).year == 1999
    assert linux_get_time(other) == linux_get_time(port)
    assert word(other, 0x34) == 240 * 16


@pytest.mark.parametrize(("century", "year"), [(0x99, 0x99), (0x00, 0x01)])
def test_a_guest_that_sets_its_clock_far_away_can_be_saved(port, cpu, clock, century, year):
    put(port, 0x32, century)
    put(port, 0x09, year)
    state = plain.decode(plain.encode(port.device.save()), "the state of Cmos")
    other = cpu(Cmos(low_memory=MIB, clock=clock))
    other.device.load(state)
    clock.now += 10 * SECOND
    assert [get(other, index) for index in (0x32, 9)] == [century, year]
    for index in (0, 2, 4, 6, 7, 8):
        assert get(other, index) == get(port, index)


@pytest.mark.parametrize(
    "wrong",
    [
        {"index": 128},
        {"index": -1},
        {"index": "0"},
        {"seconds": 10**30},
        {"seconds": -(10**30)},
        {"seconds": 0.5},
        {"nanoseconds": 10**9},
        {"nanoseconds": -1},
        {"data": bytes(127)},
        {"data": bytes(129)},
        {"data": "x" * 128},
        {"data": bytes(10) + b"\x80" + bytes(117)},
        {"data": bytes(11) + b"\x40" + bytes(116)},
        {"data": bytes(12) + b"\x40" + bytes(115)},
        {"extra": 0},
    ],
)
def test_hostile_states(port, wrong):
    state = port.device.save()
    with pytest.raises(DeviceError, match="Cmos"):
        port.device.load({**state, **wrong})
    with pytest.raises(DeviceError):
        port.device.load({})
    assert port.device.save() == state


@given(
    st.binary(min_size=128, max_size=128),
    st.lists(st.tuples(st.integers(0, 127), st.none() | st.integers(0, 255)), max_size=50),
)
def test_nothing_that_is_written_breaks_it(data, accesses):
    clock = Clock()
    device = Cmos(low_memory=MIB, clock=clock)
    data = bytearray(data)
    data[0x0A] &= 0x7F
    data[0x0B] &= 0x87
    data[0x0C] = 0
    device.load({**device.save(), "data": bytes(data)})
    for index, value in accesses:
        clock.now += SECOND // 3
        device.write(0, 1, index)
        if value is not None:
            device.write(1, 1, value)
        assert 0 <= device.read(1, 1) <= 0xFF
        other = Cmos(low_memory=MIB, clock=clock)
        other.load(device.save())
        assert other.save() == device.save()
