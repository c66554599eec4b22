"""Descriptions and states as the previous version of avmm wrote them, made of today's."""

from __future__ import annotations

import copy
from typing import Any


def previous_description(description: dict[str, Any]) -> dict[str, Any]:
    """It did not tell the version of the state."""
    old = {name: value for name, value in description.items() if name != "state"}
    return {**old, "version": 1}


def previous_state(state: dict[str, Any]) -> dict[str, Any]:
    """Of its devices only the serial port and virtio-mmio had a version."""
    old = {**copy.deepcopy(state), "version": 1}
    for name, device in old["devices"]:
        if name.startswith("virtio "):
            _strip(device["model"])
            _strip(device["queues"])
        elif name != "Serial":
            _strip(device)
    return old


def _strip(state: Any) -> None:
    if isinstance(state, dict):
        state.pop("version", None)
        state = list(state.values())
    if isinstance(state, list):
        for part in state:
            _strip(part)
