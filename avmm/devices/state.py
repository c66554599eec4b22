"""A device's saved state: fields with a version of their own, which are hostile until `load` has
checked them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from avmm.devices.base import Device
from avmm.errors import DeviceError
from avmm.plain import Fields, Kind


class DeviceState(Fields, error=DeviceError):
    """What a device's `save` returns and its `load` gets. Declare it in the device's class:

        class Thermometer(avmm.Device):
            class State(avmm.DeviceState, version=1):
                celsius = avmm.plain.Int(-60, 150)

            def save(self):
                return self.State.plain(celsius=self.celsius)

            def load(self, state):
                self.celsius = self.State.load(self.name, state).celsius

    The version stands in the saved mapping. Raise it whenever the fields or their meanings change:
    a state with another version is refused with a message that names the device, and is never
    misread. `avmm.plain` has all kinds of fields.
    """

    def __init_subclass__(cls, *, version: int) -> None:
        super().__init_subclass__(version=version)

    @classmethod
    def load(cls, device: str, state: object, /, **narrower: Kind[object]) -> Self:
        """The fields of a saved `state` of the device that messages call `device`.

        Raises `DeviceError` if it has another version, other keys or other kinds of values:
        "Serial's state has version 2, expected 1". `narrower` is as in `Fields.read`. Check the
        whole state before you take over any of it, so that a refused state changes nothing.
        """
        return cls.read(f"{device}'s state", state, **narrower)


class Stateless(Device):
    """A device with nothing to save. It says so explicitly."""

    class State(DeviceState, version=1):
        """Nothing but the version."""

    def save(self) -> Mapping[str, Any]:
        return self.State.plain()

    def load(self, state: Mapping[str, Any]) -> None:
        self.State.load(self.name, state)
