"""What the programs have in common: a device on memory with canaries, and checks at the end."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import atheris
import trio
from support.hostile import Island, a_while
from support.virtio_driver import Bench, Driver

from avmm.devices.virtio.device import VirtioDevice

SECONDS: Final = 5.0
"""What no input may take; thousands of times what one usually takes."""


@asynccontextmanager
async def hostile_guest(model: VirtioDevice) -> AsyncIterator[Driver]:
    """`model` with its driver at work; leaving it checks what must hold whatever was done."""
    memory = Island()
    bench = Bench(model, memory)
    async with bench.running() as driver:
        await driver.start()
        yield driver
        await a_while()
        await bench.device.quiesce()
        state = bench.device.save()
        bench.device.load(state)
        assert bench.device.save() == state
    assert memory.canaries_live()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.close()


def fuzz(one: Callable[[atheris.FuzzedDataProvider], Awaitable[None]]) -> None:
    """Run `one` with one input after the other, in trio, until libFuzzer has had enough."""
    logging.disable(logging.CRITICAL)

    def run(data: bytes) -> None:
        began = time.monotonic()
        trio.run(one, atheris.FuzzedDataProvider(data))
        assert time.monotonic() - began < SECONDS

    program, *options = sys.argv
    defaults = ["-max_len=2000", "-len_control=0", f"-timeout={2 * SECONDS:.0f}"]
    atheris.Setup([program, *defaults, *options], run)
    atheris.Fuzz()
