"""A device's saved state: fields with a version of their own, hostile until they were read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from avmm.devices.base import Device
from avmm.errors import DeviceError
from avmm.plain import Fields, Kind


class DeviceState(Fields, error=DeviceError):
    """What a device's `save` gives and its `load` gets. Declare it beside the device:

        class Thermometer(avmm.Device):
            class State(avmm.DeviceState, version=1):
                celsius = avmm.plain.Int(-60, 150)

            def save(self):
                return self.State.plain(celsius=self.celsius)

            def load(self, state):
                self.celsius = self.State.load(self.name, state).celsius

    The version stands in the saved mapping. Raise it whenever the fields change, or what they
    mean: a state with another version is refused by name, and never taken for what it is not.
    `avmm.plain` has the kinds of fields that there are.
    """

    def __init_subclass__(cls, *, version: int) -> None:
        super().__init_subclass__(version=version)

    @classmethod
    def load(cls, device: str, state: object, /, **narrower: Kind[object]) -> Self:
        """The fields of a saved `state` of the device that messages call `device`.

        Raises `DeviceError` where it is none of this version, these keys and these kinds of
        values: "Serial's state has version 2, expected 1". `narrower` is as in `Fields.read`. So
        that a state which is refused changes nothing, look at all of it before taking over any.
        """
        return cls.read(f"{device}'s state", state, **narrower)


class Stateless(Device):
    """A device that has nothing to save, and says so rather than leave it out in silence."""

    class State(DeviceState, version=1):
        """Nothing but the version."""

    def save(self) -> Mapping[str, Any]:
        return self.State.plain()

    def load(self, state: Mapping[str, Any]) -> None:
        self.State.load(self.name, state)
