"""A host for devices without a machine around them, and a vCPU that keeps the contract."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from support.front import FrontHost

from avmm.devices.base import Device


class FakeLine:
    """Records what the device does to its interrupt line."""

    def __init__(self) -> None:
        self.level = False
        self.edges = 0

    def set(self, asserted: bool) -> None:
        self.edges += asserted and not self.level
        self.level = asserted

    def pulse(self) -> None:
        self.set(True)
        self.set(False)


class FakeWakeup:
    """As the contract has it: any thread sets, one task waits, cancelling loses nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending = False
        self._token: trio.lowlevel.TrioToken | None = None
        self._event: trio.Event | None = None
        self.sets = 0

    def set(self) -> None:
        with self._lock:
            self.sets += 1
            self._pending = True
            if self._token is not None:
                self._token.run_sync_soon(self._wake)

    def _wake(self) -> None:
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        assert self._event is None, "two tasks wait for one wake-up"
        try:
            while True:
                self._event = trio.Event()
                with self._lock:
                    self._token = trio.lowlevel.current_trio_token()
                    if self._pending:
                        self._pending = False
                        return
                await self._event.wait()
        finally:
            self._event = None


class FakeHost(FrontHost):
    """`lock` is a real, non-reentrant one: a device that takes it twice hangs its test."""

    def __init__(self, device: Device, *, irq: bool = True) -> None:
        self.line = FakeLine()
        super().__init__(device, None, self.line if irq else None)
        self.wakeups: list[FakeWakeup] = []

    @property
    def nursery(self) -> trio.Nursery:
        raise AssertionError("no device tested here needs a nursery")

    def wakeup(self) -> FakeWakeup:
        self.wakeups.append(FakeWakeup())
        return self.wakeups[-1]


class Cpu:
    """Makes accesses as a vCPU does: under the lock, within the device's width and region, to its
    registers first."""

    def __init__(self, device: Device, *, irq: bool = True) -> None:
        self.device = device
        self.host = FakeHost(device, irq=irq)
        self.line = self.host.line
        device.attach(self.host)

    def inp(self, offset: int, size: int = 1) -> int:
        assert size <= self.device.max_width
        with self.host.lock:
            value = self.host.registers.read(offset, size)
        assert isinstance(value, int)
        return value & (1 << 8 * size) - 1

    def out(self, offset: int, value: int, size: int = 1) -> None:
        """A write that is answered at once."""
        assert self.try_out(offset, value, size) is None

    def try_out(self, offset: int, value: int, size: int = 1) -> Awaitable[None] | None:
        assert size <= self.device.max_width
        assert value < 1 << 8 * size
        with self.host.lock:
            return self.host.registers.write(offset, size, value)

    def puts(self, data: bytes) -> None:
        for byte in data:
            self.out(0, byte)

    def gets(self) -> bytes:
        """What a polling guest gets from a serial port now."""
        data = bytearray()
        while self.inp(5) & 1:
            data.append(self.inp(0))
        return bytes(data)


class Clock:
    def __init__(self) -> None:
        self.now: Any = 1000

    def __call__(self) -> Any:
        return self.now


@pytest.fixture
def cpu() -> Callable[..., Cpu]:
    return Cpu


@pytest.fixture
def clock() -> Clock:
    return Clock()
