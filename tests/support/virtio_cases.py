"""The virtio devices that the conformance suite runs, each with a request that it holds on to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from avmm.devices.virtio.console import Console
from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.port import Port
from avmm.devices.virtio.rng import Rng
from support.virtio_driver import Driver


@dataclass(frozen=True)
class Case:
    """`make` gives a device that does not finish what `submit` makes the driver send before
    `let_go`. `queue` is where that is sent, `written` what the device writes for it in all."""

    name: str
    make: Callable[[], VirtioDevice]
    submit: Callable[[Driver], None]
    let_go: Callable[[Any], None]
    queue: int
    written: int


def _rng() -> Rng:
    gate = trio.Event()

    async def source(count: int) -> bytes:
        await gate.wait()
        return b"r" * count

    rng = Rng(source)
    rng.gate = gate  # type: ignore[attr-defined]
    return rng


def _submit_rng(driver: Driver) -> None:
    ring = driver.rings[0]
    for n in range(3):
        ring.add([(driver.end + 64 * n, 64, True)])
    ring.kick()


def _console() -> Console:
    return Console(Port("hvc0", output_size=100), Port("data"), queue_size=8)


def _submit_console(driver: Driver) -> None:
    ring = driver.rings[1]
    driver.bench.memory.write(driver.end, bytes(range(240)))
    for n in range(3):
        ring.add([(driver.end + 80 * n, 40, False), (driver.end + 80 * n + 40, 40, False)])
    ring.kick()


def _read_console(console: Console) -> None:
    """From now on it waits for no reader."""
    port = console.ports["hvc0"]
    port.stall = 0
    port.drained.set()


CASES = [
    Case("rng", _rng, _submit_rng, lambda rng: rng.gate.set(), 0, 192),
    Case("console", _console, _submit_console, _read_console, 1, 0),
]
