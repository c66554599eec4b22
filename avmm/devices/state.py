"""Reading a device's saved state: hostile until each field was looked at."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from avmm.devices.base import Device
from avmm.errors import DeviceError


class Fields:
    """A saved state of the device that messages call `device`: just the fields `names`.

    Types are compared exactly: True is no number, and no subclass gets in.
    """

    def __init__(self, device: str, state: Mapping[str, Any], names: Collection[str]) -> None:
        self._device = device
        self._state = state
        if not isinstance(state, Mapping) or set(state) != set(names):
            raise self.refusal(f"expected the fields {', '.join(sorted(names)) or '(none)'}")

    def refusal(self, why: str) -> DeviceError:
        """What to raise for a state that is wrong as a whole."""
        return DeviceError(f"this is not a state of {self._device}: {why}")

    def error(self, name: str, expected: str) -> DeviceError:
        """What to raise for a field that is wrong."""
        try:
            found = reprlib.repr(self._state[name])
        except ValueError:  # Python refuses to print numbers of more than 4300 digits
            found = "a huge number"
        return self.refusal(f"{name} is {found}, expected {expected}")

    def number(self, name: str, most: int, *, least: int = 0) -> int:
        value = self._state[name]
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, f"a number from {least} to {most}")
        return value

    def flag(self, name: str) -> bool:
        value = self._state[name]
        if type(value) is not bool:
            raise self.error(name, "True or False")
        return value

    def data(self, name: str, most: int, *, least: int = 0) -> bytes:
        value = self._state[name]
        if type(value) is not bytes or not least <= len(value) <= most:
            raise self.error(name, f"{least} to {most} bytes")
        return value


class Stateless(Device):
    """A device that has nothing to save, and says so rather than leave it out in silence."""

    def save(self) -> Mapping[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        Fields(self.name, state, ())
