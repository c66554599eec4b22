"""A machine's guest while it runs: a nursery, the tasks in it, and what becomes of their errors.

**The nursery is not the user's.** Errors of the block, of the guest's handlers, and of the
devices' `run` and `finish` are kept as they are (`avmm.failures`), and raised when the nursery is
gone. Only errors of tasks that devices start in their host's nursery travel through that nursery.
They come out in the one group that also holds our own `_LeftError`. A group without `_LeftError`
was raised by somebody else.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from avmm.ctrl_c import interruptible, undisturbed
from avmm.devices.base import Device
from avmm.errors import AvmmError, DeviceError
from avmm.failures import Failures, keep, parted, raise_together
from avmm.migration import Coordinator
from avmm.parts import Parts
from avmm.runstate import OPERATIONS, Life, Runstate, refusal

logger = logging.getLogger(__name__)


class _LeftError(Exception):
    """Raised in a machine's nursery when its block is over. It marks that nursery's group."""


@dataclass
class Inside:
    """What a machine has while its block is run."""

    parts: Parts
    coordinator: Coordinator
    nursery: trio.Nursery
    _ongoing: set[trio.CancelScope] = field(default_factory=set)
    _calm: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    @contextmanager
    def operation(self, name: str, life: Life) -> Iterator[None]:
        """Put this around an operation that uses the parts for longer than a moment. Leaving the
        machine cancels the operation and waits until it is over. The operation then raises
        `RunstateError`. Raises `AvmmError` in a task that serves an exit of the machine."""
        self.demand_other_task(name)
        with trio.CancelScope() as scope:
            self._ongoing.add(scope)
            try:
                yield
            finally:
                self._ongoing.discard(scope)
                self._calm.unpark_all()
        if scope.cancelled_caught:
            needed, expected = OPERATIONS[name]
            raise refusal(name, Runstate.LEFT, needed, expected)

    def demand_other_task(self, name: str) -> None:
        """Raise `AvmmError` if this task serves an exit of the machine, which cannot stand still
        before that is done."""
        if not trio.lowlevel.in_trio_task():
            return  # a block that is only made here is entered in a task that serves no exit
        if (index := self.parts.group.served_by(trio.lowlevel.current_task())) is not None:
            raise AvmmError(
                f"{name}: this task serves an exit of the machine's vCPU {index}, so it would "
                "wait for itself; start a task of its own for it, in a nursery that does not "
                "belong to the handler"
            )

    def cancel_operations(self) -> None:
        """Cancel all operations. A hand-over that has begun is decided first."""
        for scope in self._ongoing:
            scope.cancel()

    async def operations_over(self) -> None:
        """Wait until all operations are over."""
        while self._ongoing:
            await self._calm.park()


@asynccontextmanager
async def running(parts: Parts, life: Life) -> AsyncIterator[Inside]:
    """Run the guest of these parts while the block is run. Raises what has failed in here and
    what the block raises, as `raise_together` does."""
    coordinator = Coordinator(parts.group, parts.quiescable, parts.deliver_coalesced)
    left = _LeftError()
    own: list[BaseException] = []
    cancelled: list[BaseException] = []
    scope = trio.CancelScope()
    failures = Failures(scope.cancel)
    try:
        with scope:
            try:
                async with trio.open_nursery() as nursery:
                    try:
                        inside = Inside(parts, coordinator, nursery)
                        _begin(inside, life, failures)
                        yield inside
                    except BaseException as error:
                        keep(error, cancelled, own)
                    inside.cancel_operations()
                    nursery.cancel_scope.cancel()
                    raise left
            except BaseException as error:
                failures.errors.extend(_strays(error, left))
            await undisturbed(inside.operations_over)
            if cancelled and not own and not failures.errors:
                # If somebody outside has cancelled the block, this is theirs. If nobody has,
                # a device has cancelled the nursery, and the cancellation ends here.
                scope.cancel()
                raise cancelled[0]
        raise_together([*own, *failures.errors], "a machine and its block have failed")
    finally:
        del left
        for kept in (own, cancelled, failures.errors):
            kept.clear()


def _begin(inside: Inside, life: Life, failures: Failures) -> None:
    parts, nursery = inside.parts, inside.nursery
    life.start(parts.group.stop)
    for device, host in zip(parts.devices, parts.hosts, strict=True):
        host.start(nursery)
        if type(device).run is not Device.run:
            run = partial(_run_device, device)
            nursery.start_soon(failures.guard, run, name=f"{device.name}.run")
    run_vcpus = partial(_run_vcpus, parts, life, failures)
    nursery.start_soon(failures.guard, run_vcpus, name="vCPUs")


async def _run_vcpus(parts: Parts, life: Life, failures: Failures) -> None:
    """Run the vCPUs until the guest has ended and the devices know it. An error that a device
    raises then does not hide why the guest has ended."""
    cause: BaseException | None = None
    late: list[Exception] = []
    try:
        await parts.group.run()
    except BaseException as error:  # raised below, because the next steps may fail as well
        cause = error
    try:
        for step in (parts.deliver_coalesced, *(device.finish for device in parts.devices)):
            try:
                step()
            except Exception as error:  # of any type: the other devices must learn of the end
                late.append(error)
    finally:
        with trio.CancelScope(shield=True):
            await life.decided()
        life.finish()
    if isinstance(cause, Exception):
        # The caller needs to know why the guest has ended. Often these errors only repeat it.
        for failure in late:
            logger.error("after the guest had failed:", exc_info=failure)
            cause.add_note(f"and at the guest's end: {failure!r}")
    else:
        for failure in late:
            failures.add(failure)
    try:
        if cause is not None:
            raise cause
    finally:
        del cause
    logger.debug("guest ended: %s", await life.over())


async def _run_device(device: Device) -> None:
    """Ctrl-C may interrupt a user's device. avmm's own say themselves that they are protected."""
    work: object = device.run()
    if not isinstance(work, Awaitable):
        raise DeviceError(f"{device.name}: run() returned {work!r}; expected a coroutine")
    await interruptible(work)


def _strays(error: BaseException, left: _LeftError) -> list[BaseException]:
    """The errors that have come out of a machine's nursery, except its mark and cancellations.

    If there is only the mark, it may come without a group, because trio can be configured so.
    """
    found: Sequence[BaseException] = [error]
    if isinstance(error, BaseExceptionGroup) and left in error.exceptions:
        found = error.exceptions
    parts = [parted(one)[1] for one in found if one is not left]
    return [own for own in parts if own is not None]
