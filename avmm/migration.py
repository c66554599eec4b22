"""The coordinator: brings a machine to a standstill in which its state can be read.

    async with vm.paused(deadline=2.0):
        state = vm.save()

In this order, each step for all before the next begins:

1. Every vCPU is asked to pause, all at once, and then awaited, so that they drain side by side.
   Each serves what it has in hand and lets the kernel finish it (`avmm.completion`).
2. Coalesced writes, which no exit has shown, reach their devices (`avmm.coalesced`).
3. The devices are quiesced: what is in flight finishes, and after it nothing writes guest
   memory or raises an interrupt. Not earlier: both steps before still call devices.

Whatever ends it, leaving the block or a failure, timeout or cancellation at any point, the
same is undone in reverse, and the guest runs on as if nothing had been asked.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, Protocol

import trio

from avmm.errors import PauseTimeout

logger = logging.getLogger(__name__)

_THROTTLE_SECONDS: Final = 0.04
"""A period of throttling: as long may a pause have to wait for it."""


class PausableVcpus(Protocol):
    """What the coordinator needs of the vCPUs; `avmm.group.VcpuGroup` is such."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    async def parked(self) -> None: ...
    def late(self) -> list[str]: ...


class QuiescableDevice(Protocol):
    """What it needs of a device; `avmm.devices.base.Device` is one."""

    @property
    def name(self) -> str: ...
    async def quiesce(self) -> None: ...
    async def resume(self) -> None: ...


class Coordinator:
    """Pauses one machine for whoever asks, from trio; pauses count."""

    def __init__(
        self,
        vcpus: PausableVcpus,
        devices: Collection[QuiescableDevice],
        deliver_coalesced: Callable[[], None] = lambda: None,
    ) -> None:
        self._vcpus = vcpus
        self._deliver_coalesced = deliver_coalesced
        self._devices = devices
        self._holders = 0
        self._standstill: AsyncExitStack | None = None
        # Held while the machine is on its way to a standstill or back. Whoever else asks
        # meanwhile waits, within its own deadline; no vCPU and no device ever takes it.
        self._moving = trio.Lock()
        self._waiting_for = ""
        """What the pause that failed last had waited for."""
        self._forsaken = False
        self._stage = ""
        """What the way to a standstill or back waits for, other than vCPUs; for a person."""

    @property
    def is_paused(self) -> bool:
        """Does the machine stand still now?"""
        return self._standstill is not None

    @asynccontextmanager
    async def paused(self, deadline: float | None = None) -> AsyncIterator[None]:
        """The machine stands still inside the block.

        Pauses nest and overlap: the guest runs on when the last one is left. Raises
        `PauseTimeout` where it does not stand still within `deadline` seconds, saying what it
        waited for, and what a device raises at it. Cancelling is a checkpoint's, at any
        moment on the way there; after any of these the guest runs on.
        """
        why = ""
        with trio.move_on_after(float("inf") if deadline is None else deadline) as scope:
            try:
                await self._hold()
            except trio.Cancelled:
                why = self._waiting_for
                raise
        if scope.cancelled_caught:
            raise PauseTimeout(f"the pause was given up after {deadline} s: {why}")
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._release()

    async def _hold(self) -> None:
        try:
            self._moving.acquire_nowait()  # no round of the scheduler before the first kick
        except trio.WouldBlock:
            try:
                await self._moving.acquire()
            except trio.Cancelled:
                self._waiting_for = f"another pause is under way: {self._describe()}"
                raise
        try:
            if self._standstill is None:
                self._standstill = await self._stand_still()
            self._holders += 1
        finally:
            self._moving.release()

    # -- for a guest that is handed over to another process --------------------------------------

    def forsake(self) -> None:
        """The guest runs elsewhere: this standstill is never left, whoever holds it. While
        paused."""
        self._forsaken = True

    def retain(self) -> None:
        """Hold the standstill until `relinquish`, with nobody inside of a block. While paused."""
        self._holders += 1

    async def relinquish(self) -> None:
        """Let go of what `retain` held; the guest runs on unless somebody else holds it."""
        with trio.CancelScope(shield=True):
            await self._release()

    @asynccontextmanager
    async def throttled(self, share: Callable[[], float]) -> AsyncIterator[None]:
        """Let the vCPUs stand still for a share of their time inside the block: `share()` tells
        which, 0 to 1, and is asked all the time. Devices are not quiesced."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._throttle, share)
            yield
            nursery.cancel_scope.cancel()

    async def _throttle(self, share: Callable[[], float]) -> None:
        while True:
            part = share()
            await trio.sleep(_THROTTLE_SECONDS * (1 - part))
            if not part:
                continue
            async with self._moving:
                if self._standstill is not None:
                    continue
                try:
                    self._vcpus.pause()
                    await self._vcpus.parked()
                    await trio.sleep(_THROTTLE_SECONDS * part)
                finally:
                    self._vcpus.resume()

    def _describe(self) -> str:
        return "; ".join(self._vcpus.late()) or self._stage or "nothing keeps it any more"

    async def _release(self) -> None:
        async with self._moving:
            self._holders -= 1
            if not self._holders and self._standstill is not None and not self._forsaken:
                standstill, self._standstill = self._standstill, None
                await standstill.aclose()

    async def _stand_still(self) -> AsyncExitStack:
        """All steps; gives what undoes them, and undoes them itself where it fails."""
        undo = AsyncExitStack()
        try:
            undo.callback(self._vcpus.resume)
            self._vcpus.pause()
            await self._vcpus.parked()
            self._deliver_coalesced()
            for device in self._devices:
                undo.push_async_callback(self._resume, device)
                self._stage = f"{device.name} has not finished what it has in flight"
                await device.quiesce()
        except BaseException as error:
            self._waiting_for = self._describe()
            with trio.CancelScope(shield=True):
                try:
                    await undo.aclose()
                except Exception as failure:
                    # The guest runs on; why it was not paused is what is to be known.
                    logger.exception("a pause was given up, and on the way back:")
                    error.add_note(f"and on the way back: {failure!r}")
            raise
        finally:
            self._stage = ""
        return undo

    async def _resume(self, device: QuiescableDevice) -> None:
        self._stage = f"{device.name} has not resumed"
        await device.resume()
        self._stage = ""
