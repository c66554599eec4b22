"""A serial port's saved state: all of it, and nothing that is not one."""

from __future__ import annotations

import threading

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.front import FrontHost
from trio.testing import wait_all_tasks_blocked

from avmm.devices.serial import Serial
from avmm.devices.uart import FIFO_SIZE
from avmm.errors import DeviceError

IER, MCR, LSR = 1, 4, 5


def busy_port(cpu, **options):
    """Bytes in every buffer, no register at its reset value."""
    port = cpu(Serial(output_size=8, input_size=32, **options))
    port.out(3, 0x80)
    port.out(0, 0x01)
    port.out(1, 0x02)
    port.out(3, 0x1B)
    port.out(2, 0x81)
    port.out(7, 0x5A)
    port.out(MCR, 0x1F)
    port.puts(bytes(range(200, 200 + FIFO_SIZE + 1)))
    port.out(MCR, 0x07)
    port.inp(0)
    port.out(IER, 0x0A)
    assert port.device._feed(memoryview(b"input for the guest")) == 19
    port.puts(b"output")
    return port


def test_everything_survives(cpu):
    port = busy_port(cpu)
    state = port.device.save()
    other = cpu(Serial(output_size=8, input_size=32))
    other.device.load(state)
    assert other.device.save() == state
    assert other.line.level == port.line.level is True
    for register in (2, 2, 3, 4, 6, 6, 7, 5, 5):
        assert other.inp(register) == port.inp(register)
    for p in (port, other):
        p.out(3, 0x83)
    assert (other.inp(0), other.inp(1)) == (port.inp(0), port.inp(1)) == (1, 2)
    for p in (port, other):
        p.out(3, 3)
    expected = bytes(range(201, 200 + FIFO_SIZE)) + b"input for the guest"
    assert other.gets() == port.gets() == expected
    assert other.device._take(None) == port.device._take(None) == b"output"


def test_a_state_replaces_what_was_there(cpu):
    """Each field that `save` gives is taken over: no two of these states look the same."""
    fresh = cpu(Serial(output_size=8, input_size=32)).device.save()
    port = busy_port(cpu)
    busy = port.device.save()
    same = {name for name in fresh if fresh[name] == busy[name]}
    assert same == {"version", "lost", "stalled", "thr_empty"}
    port.device.load(fresh)
    assert port.device.save() == fresh
    assert not port.line.level


def test_a_stalled_port_stays_stalled_and_a_full_one_gets_its_time_again(cpu, clock):
    port = cpu(Serial(output_size=4, stall=1.0, clock=clock))
    port.puts(b"abcd")
    full = port.device.save()
    clock.now += 1
    port.inp(LSR)
    port.puts(b"xyz")
    stalled = port.device.save()
    assert stalled["lost"] == 3
    clock.now = 5

    other = cpu(Serial(output_size=4, stall=1.0, clock=clock))
    other.device.load(stalled)
    other.puts(b"!")
    assert other.device.lost == 4
    assert other.device._take(None) == b"abcd"

    other.device.load(full)
    assert not other.inp(LSR) & 0x20
    clock.now += 0.9
    assert not other.inp(LSR) & 0x20
    clock.now += 0.1
    assert other.inp(LSR) & 0x20


def test_a_full_port_moved_where_there_is_more_room_interrupts(cpu):
    port = cpu(Serial(output_size=4))
    port.out(IER, 2)
    port.puts(b"abcd")
    assert not port.line.level
    other = cpu(Serial(output_size=8))
    other.device.load(port.device.save())
    assert other.line.level
    assert other.inp(LSR) == 0x60


async def test_loaded_while_quiesced_the_line_moves_at_resume(cpu):
    port = cpu(Serial())
    port.out(IER, 2)
    other = cpu(Serial())
    await other.device.quiesce()
    other.device.load(port.device.save())
    assert not other.line.level
    await other.device.resume()
    assert other.line.level


async def test_load_wakes_reader_and_sender(cpu):
    port = cpu(Serial())
    port.puts(b"moved")
    other = cpu(Serial(input_size=8))
    other.out(MCR, 0)

    async def read():
        assert await other.device.stream.receive_some() == b"moved"

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(other.device.stream.send_all, b"12345678" + b"9")
            await wait_all_tasks_blocked()
            other.device.load(port.device.save())
    assert other.gets() == b"9", "what a state replaces is gone"


async def test_a_loaded_full_port_is_watched(cpu, autojump_clock, nursery):
    port = cpu(Serial(output_size=4))
    port.out(IER, 2)
    port.puts(b"abcd")
    other = cpu(Serial(output_size=4, stall=1.0, clock=autojump_clock.current_time))
    nursery.start_soon(other.device.run)
    other.device.load(port.device.save())
    await trio.sleep(0.9)
    assert not other.line.level
    await trio.sleep(0.2)
    assert other.line.level
    nursery.cancel_scope.cancel()


async def test_of_a_stall_that_was_loaded_only_the_end_is_reported(cpu, clock, caplog):
    port = cpu(Serial(output_size=4, stall=1.0, clock=clock))
    port.puts(b"abcd")
    clock.now += 1
    port.inp(LSR)
    port.puts(b"lost there")
    other = cpu(Serial(output_size=4, stall=1.0, clock=clock))
    other.device.load(port.device.save())
    other.puts(b"here")
    await other.device.stream.receive_some()
    assert len(caplog.records) == 1
    assert "; 4 bytes" in caplog.text
    assert other.device.lost == 14


def test_a_state_with_everything_staged_is_as_good(cpu):
    port = cpu(Serial())
    port.device.load({**port.device.save(), "ier": 1, "staging": b"all of it"})
    assert port.line.level
    assert port.gets() == b"all of it"


WRONG = [
    ("version", 2),
    ("version", 0),
    ("ier", 0x10),
    ("ier", -1),
    ("ier", True),
    ("ier", 1.0),
    ("fcr", 0x80),
    ("fcr", 0x03),
    ("lcr", 0x100),
    ("mcr", 0x20),
    ("mcr_written", 1),
    ("overrun", None),
    ("msr_delta", 16),
    ("scr", "0"),
    ("divisor", 1 << 16),
    ("thre_pending", 1),
    ("thr_empty", False),
    ("rx", bytes(17)),
    ("rx", bytearray(1)),
    ("rx", b""),
    ("looped", 17),
    ("looped", -1),
    ("staging", bytes(32 + FIFO_SIZE + 1)),
    ("staging", "text"),
    ("output", bytes(8 + FIFO_SIZE + 1)),
    ("output", [1, 2]),
    ("lost", -1),
    ("lost", 1 << 64),
    ("stalled", True),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_field_is_refused_by_name_and_changes_nothing(cpu, name, value):
    state = busy_port(cpu).device.save()
    port = cpu(Serial(output_size=8, input_size=32))
    before = port.device.save()
    culprit = {"rx": "rx|looped", "thr_empty": "thre_pending"}.get(name, name)
    with pytest.raises(DeviceError, match=culprit):
        port.device.load({**state, name: value})
    assert port.device.save() == before
    port.device.load(state)


def test_fields_missing_or_unknown_are_refused(cpu):
    port = busy_port(cpu)
    state = dict(port.device.save())
    for name in state:
        with pytest.raises(DeviceError):
            port.device.load({k: v for k, v in state.items() if k != name})
    with pytest.raises(DeviceError):
        port.device.load({**state, "extra": 0})
    for wrong in (None, [], "state", 5):
        with pytest.raises(DeviceError):
            port.device.load(wrong)


def test_without_fifo_there_is_room_for_one_byte_only(cpu):
    state = cpu(Serial()).device.save()
    with pytest.raises(DeviceError, match="rx"):
        cpu(Serial()).device.load({**state, "rx": b"ab"})


class Host(FrontHost):
    def wakeup(self):
        return threading.Event()  # has `set`


junk = st.sampled_from([None, "text", 1.5, [], {}, -1, 1 << 70, bytes(1000)])


@given(st.data())
def test_hostile_states_are_refused_or_work(data):
    port = Serial(output_size=8, input_size=8)
    port.attach(Host(port, None, None))
    state = dict(port.save())
    for name in data.draw(st.sets(st.sampled_from(sorted(state)))):
        small = st.integers(0, 255) | st.binary(max_size=24) | st.booleans()
        state[name] = data.draw(small | junk)
    try:
        port.load(state)
    except DeviceError:
        return
    uart = port._uart
    loaded = port.save()
    assert loaded["rx"] + loaded["staging"] == state["rx"] + state["staging"]
    for _ in range(50):
        for offset in range(8):
            assert 0 <= uart.read(offset) <= 0xFF
    uart.write(3, 0)
    uart.write(0, 0x41)
    uart.take(None)
