"""What reads saved states: exact types, exact bounds, messages that name the device."""

from __future__ import annotations

import pytest

from avmm.devices.state import Fields, Stateless
from avmm.errors import DeviceError


def fields(**state):
    return Fields("Foo", state, state)


def test_what_is_right_is_returned():
    state = fields(n=-3, m=5, yes=True, line=b"abc")
    assert state.number("n", 5, least=-3) == -3
    assert state.number("m", 5) == 5
    assert state.flag("yes") is True
    assert state.data("line", 3, least=3) == b"abc"


class Odd(int):
    pass


HUGE = 1 << 100_000  # more digits than Python prints


@pytest.mark.parametrize(
    "value", [-1, 6, True, Odd(1), 1.0, "1", None, pytest.param(HUGE, id="huge")]
)
def test_what_is_no_number_in_range_is_refused(value):
    with pytest.raises(DeviceError, match=r"Foo: n is .*expected a number from 0 to 5"):
        fields(n=value).number("n", 5)


@pytest.mark.parametrize("value", [0, 1, None, "True"])
def test_what_is_no_flag_is_refused(value):
    with pytest.raises(DeviceError, match=r"Foo: yes is .*expected True or False"):
        fields(yes=value).flag("yes")


@pytest.mark.parametrize("value", [b"", b"abc", bytearray(b"a"), "a", [1]])
def test_what_are_no_bytes_of_that_length_is_refused(value):
    with pytest.raises(DeviceError, match=r"Foo: line is .*expected 1 to 2 bytes"):
        fields(line=value).data("line", 2, least=1)


@pytest.mark.parametrize(
    "state", [{}, {"a": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, 2: 2}, None, 5]
)
def test_the_fields_are_those_and_no_others(state):
    with pytest.raises(DeviceError, match="Foo: expected the fields a, b"):
        Fields("Foo", state, ("b", "a"))


def test_stateless():
    device = Stateless()
    assert device.save() == {}
    device.load({})
    for wrong in ({"a": 1}, None, []):
        with pytest.raises(DeviceError, match="Stateless"):
            device.load(wrong)
