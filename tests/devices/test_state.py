"""What a device's state is made of: fields with a version, refused with `DeviceError`."""

from __future__ import annotations

import pytest

import avmm
from avmm.devices.state import DeviceState, Stateless
from avmm.errors import DeviceError
from avmm.plain import U8, Bytes


class State(DeviceState, version=3):
    n = U8
    line = Bytes(most=5)


GOOD = {"version": 3, "n": 7, "line": b"abc"}


def test_what_was_saved_is_loaded() -> None:
    assert State.plain(n=7, line=b"abc") == GOOD
    saved = State.load("Foo", GOOD)
    assert (saved.n, saved.line) == (7, b"abc")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, "Foo's state has version 2, expected 3"),
        ({"n": True}, "Foo's state: n is True, expected a number from 0 to 255"),
        ({"line": b"abcd"}, r"Foo's state: line is b'abcd', expected 0 to 3 bytes"),
        ({"more": 1}, "Foo's state has 'more', expected the keys version, n, line"),
    ],
)
def test_what_is_wrong_is_a_device_error(change: dict[str, object], why: str) -> None:
    with pytest.raises(DeviceError, match=f"^{why}$"):
        State.load("Foo", {**GOOD, **change}, line=Bytes(most=3))


def test_fields_that_are_wrong_together() -> None:
    saved = State.load("Foo", GOOD)
    error = saved.wrong("n", "less than line")
    assert type(error) is DeviceError
    assert str(error) == "Foo's state: n is 7, expected less than line"
    assert str(saved.refusal("it is odd")) == "Foo's state: it is odd"


def test_a_state_without_a_version_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match="version"):

        class Unversioned(DeviceState):  # type: ignore[call-arg]
            n = U8


def test_stateless() -> None:
    device = Stateless()
    assert device.save() == {"version": 1}
    device.load({"version": 1})
    for wrong in ({}, {"version": 2}, {"version": 1, "a": 1}, None, []):
        with pytest.raises(DeviceError, match="Stateless's state"):
            device.load(wrong)  # type: ignore[arg-type]


def test_an_embedder_has_it_at_hand() -> None:
    class Thermometer(avmm.Device):
        class State(avmm.DeviceState, version=1):
            celsius = avmm.plain.Int(-60, 150)

        celsius = 21

        def save(self):
            return self.State.plain(celsius=self.celsius)

        def load(self, state):
            self.celsius = self.State.load(self.name, state).celsius

    device = Thermometer()
    device.load({"version": 1, "celsius": -5})
    assert (device.celsius, device.save()) == (-5, {"version": 1, "celsius": -5})
    with pytest.raises(avmm.DeviceError, match="Thermometer's state: celsius is 151, expected a"):
        device.load({"version": 1, "celsius": 151})
