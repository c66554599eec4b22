"""The keyboard controller, and the keyboard that can press Ctrl-Alt-Del."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm.devices.pc.i8042 import I8042
from avmm.errors import DeviceError

DATA, COMMAND = 0, 4


class Resets:
    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1


@pytest.fixture
def resets():
    return Resets()


@pytest.fixture
def port(cpu, resets):
    return cpu(I8042(resets))


def ask(port, command):
    """A command with an answer; drivers wait for the output buffer to fill."""
    port.out(COMMAND, command)
    assert port.inp(COMMAND) & 0x01, "no answer"
    answer = port.inp(DATA)
    assert not port.inp(COMMAND) & 0x01
    return answer


def tell(port, command, value):
    port.out(COMMAND, command)
    assert port.inp(COMMAND) & 0x08
    port.out(DATA, value)
    assert not port.inp(COMMAND) & 0x08


def test_the_input_buffer_is_never_full(port, resets):
    """Linux waits for that before each of its ten attempts to reset by 0xfe."""
    for command in (0x20, 0x60, 0xD4, 0xFE):
        port.out(COMMAND, command)
        assert not port.inp(COMMAND) & 0x02


def test_reset(port, resets):
    port.out(COMMAND, 0xFE)
    assert resets.count == 1


@pytest.mark.parametrize("command", range(0xF0, 0x100))
def test_pulses_reset_where_bit_0_is_pulled(port, resets, command):
    port.out(COMMAND, command)
    assert resets.count == (command % 2 == 0)


def test_reset_by_the_output_port(port, resets):
    tell(port, 0xD1, 0xCF)
    assert resets.count == 0
    tell(port, 0xD1, 0xCE)
    assert resets.count == 1
    assert ask(port, 0xD0) & 1, "the line comes up again"


def test_nothing_else_resets(port, resets):
    for command in range(0xF0):
        port.out(COMMAND, command)
        if command != 0xD1:
            port.out(DATA, 0)
    port.out(DATA, 0xFE)
    assert resets.count == 0


def test_self_tests(port):
    assert ask(port, 0xAA) == 0x55
    assert ask(port, 0xAB) == 0x00
    assert ask(port, 0xA9) not in (0x00, 0xFA, 0xFF), "what Linux takes for a mouse port"


def test_command_byte(port):
    for mode in (0x00, 0x47, 0xFF):
        tell(port, 0x60, mode)
        port.out(DATA, 0x00)  # this one is for the keyboard
        port.out(COMMAND, 0x20)
        assert port.inp(DATA) == mode


@pytest.mark.parametrize(("off", "on", "bit"), [(0xA7, 0xA8, 0x20), (0xAD, 0xAE, 0x10)])
def test_ports_are_turned_off_and_on(port, off, on, bit):
    tell(port, 0x60, 0x45)
    port.out(COMMAND, off)
    assert ask(port, 0x20) == 0x45 | bit
    port.out(COMMAND, on)
    assert ask(port, 0x20) == 0x45


def test_a20(port):
    assert ask(port, 0xD0) & 0x02
    port.out(COMMAND, 0xDD)
    assert not ask(port, 0xD0) & 0x02
    port.out(COMMAND, 0xDF)
    assert ask(port, 0xD0) & 0x02
    tell(port, 0xD1, 0xDD)
    assert ask(port, 0xD0) == 0xDD


@pytest.mark.parametrize("byte", [0xED, 0xEE, 0xF2, 0xF4, 0xFF, 0x00])
def test_nobody_answers_for_a_mouse(port, byte):
    tell(port, 0xD4, byte)
    assert not port.inp(COMMAND) & 0x01


def test_a_new_answer_replaces_an_old_one(port):
    port.out(COMMAND, 0xAA)
    assert ask(port, 0xAB) == 0x00


def test_a_new_command_ends_one_that_waits_for_its_byte(port):
    tell(port, 0x60, 0x45)
    port.out(COMMAND, 0x60)
    port.out(COMMAND, 0xAE)
    port.out(DATA, 0x00)
    assert ask(port, 0x20) == 0x45


def test_linux_probe_is_quick(port, resets):
    """i8042_controller_check to i8042_check_aux: no wait for an answer ever times out."""
    assert port.inp(COMMAND) != 0xFF
    assert not port.inp(COMMAND) & 0x01, "flush ends"
    ctr = ask(port, 0x20)
    assert ask(port, 0x20) == ctr, "read twice alike"
    assert port.inp(COMMAND) & 0x10, "keyboard not locked"
    assert ctr & 0x40, "translating, or Linux drives it raw"
    tell(port, 0x60, (ctr | 0x10) & ~0x01)

    port.out(COMMAND, 0xD3)
    port.out(DATA, 0x5A)
    status = port.inp(COMMAND)
    assert status & 0x01
    assert not status & 0x20, "not from the mouse: Linux stops waiting, and leaves the byte"
    assert ask(port, 0xA9) not in (0x00, 0xFA, 0xFF)

    tell(port, 0x60, ctr & ~0x10 | 0x01)
    assert say(port, 0xF2) == [0xFA, 0xAB, 0x41], "atkbd asks who is there"
    assert resets.count == 0


# -- the keyboard --------------------------------------------------------------------------

RAW, TRANSLATED = 0x01, 0x41
"""Command bytes: with interrupts, without translation and with it."""
PRESSED = {
    RAW: [0x14, 0x11, 0xE0, 0x71, 0xE0, 0xF0, 0x71, 0xF0, 0x11, 0xF0, 0x14],
    TRANSLATED: [0x1D, 0x38, 0xE0, 0x53, 0xE0, 0xD3, 0xB8, 0x9D],
}


def heard(port):
    """All bytes that wait to be read."""
    found = []
    while port.inp(COMMAND) & 0x01:
        found.append(port.inp(DATA))
    return found


def say(port, *values):
    """Bytes for the keyboard, and its answers."""
    found = []
    for value in values:
        port.out(DATA, value)
        found += heard(port)
    return found


@pytest.mark.parametrize(
    ("values", "answers"),
    [
        ([0xFF], [0xFA, 0xAA]),
        ([0xED, 0x07], [0xFA, 0xFA]),
        ([0xF3, 0x00], [0xFA, 0xFA]),
        ([0xF0, 0x02], [0xFA, 0xFA]),
        ([0xF0, 0x00], [0xFA, 0xFA, 0x02]),
        ([0xEE], [0xEE]),
        ([0xF4], [0xFA]),
        ([0x55], [0xFE]),
    ],
)
def test_the_keyboard_answers(port, values, answers):
    tell(port, 0x60, RAW)
    assert say(port, *values) == answers


@pytest.mark.parametrize("mode", [RAW, TRANSLATED])
def test_ctrl_alt_del(port, mode):
    tell(port, 0x60, mode)
    say(port, 0xF4)
    assert port.device.hears_keys
    before = port.line.edges
    port.device.press_ctrl_alt_del()
    assert port.line.edges == before + 1
    assert heard(port) == PRESSED[mode]
    assert port.line.edges == before + len(PRESSED[mode]), "an interrupt for each byte"


def test_keys_are_only_for_those_who_listen(port):
    tell(port, 0x60, TRANSLATED)
    port.device.press_ctrl_alt_del()
    assert not port.device.hears_keys
    assert heard(port) == []
    say(port, 0xF4)
    for mode in (0x40, 0x51):
        tell(port, 0x60, mode)
        assert not port.device.hears_keys
    tell(port, 0x60, TRANSLATED)
    assert port.device.hears_keys
    say(port, 0xF5)
    assert not port.device.hears_keys


def test_a_command_ends_what_the_keyboard_was_saying(port):
    tell(port, 0x60, TRANSLATED)
    say(port, 0xF4)
    port.device.press_ctrl_alt_del()
    port.out(DATA, 0xEE)
    assert heard(port) == [PRESSED[TRANSLATED][0], 0xEE], "one byte was in the controller"


def test_keys_wait_while_the_keyboard_is_off(port):
    tell(port, 0x60, TRANSLATED)
    say(port, 0xF4)
    port.out(COMMAND, 0xAD)
    for _ in range(10):
        port.device.press_ctrl_alt_del()
    assert not port.inp(COMMAND) & 0x01
    port.out(COMMAND, 0xAE)
    assert heard(port) == 2 * PRESSED[TRANSLATED], "no more than wait is pressed"


def test_a_key_that_was_pressed_before_a_save(cpu, port, resets):
    tell(port, 0x60, TRANSLATED)
    say(port, 0xF4)
    port.device.press_ctrl_alt_del()
    other = cpu(I8042(resets))
    other.device.load(port.device.save())
    assert other.line.edges == 1, "the interrupt may have been lost"
    assert heard(other) == PRESSED[TRANSLATED]


def test_the_ports_between_are_somebody_elses(port):
    before = port.device.save()
    for offset in (1, 2, 3):
        assert port.inp(offset) == 0xFF
        port.out(offset, 0xFE)
    assert port.device.save() == before


@given(st.lists(st.tuples(st.sampled_from([DATA, COMMAND]), st.none() | st.integers(0, 0xFF))))
def test_whatever_happens_can_be_saved_and_loaded(accesses):
    device = I8042(lambda: None)
    for offset, value in accesses:
        if value is None:
            assert 0 <= device.read(offset, 1) <= 0xFF
        else:
            device.write(offset, 1, value)
    other = I8042(lambda: None)
    other.load(device.save())
    assert other.save() == device.save()
    assert other.read(COMMAND, 1) == device.read(COMMAND, 1)
    assert other.read(DATA, 1) == device.read(DATA, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": 256},
        {"out": -1},
        {"out": 0xCE},
        {"status": 0x02},
        {"status": "0"},
        {"answer": None},
        {"pending": 0x20},
        {"extra": 1},
    ],
)
def test_hostile_states(wrong):
    device = I8042(lambda: None)
    state = device.save()
    with pytest.raises(DeviceError, match="I8042"):
        device.load({**state, **wrong})
    with pytest.raises(DeviceError):
        device.load({})
    assert device.save() == state
