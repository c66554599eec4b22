"""What fails reaches the user as it was raised: no nursery's group around it, and a group that
somebody has raised as that group."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.guest import machine

import avmm
from avmm.failures import gathered, parted, raise_together

pytestmark = [pytest.mark.usefixtures("kvm", "nothing_left")]

WAITS = "1: cmp dword ptr [0x200000], 0; je 1b; mov dx, 0x300; in eax, dx; jmp 1b"
"""Reads a port of the device's, as soon as the host writes there."""


class Special(ExceptionGroup[Exception]):
    """A group with something that a copy of it would not have."""

    def __init__(self, message: str, errors: list[Exception]) -> None:
        self.mine = True


def special() -> Special:
    return Special("mine", [ValueError("one"), KeyError("two")])


class Failing(avmm.Device):
    """Raises what it is given, where it is told to."""

    def __init__(self, where: str, error: BaseException) -> None:
        self.where = where
        self.error = error
        self.go = trio.Event()

    def read(self, offset: int, size: int) -> Any:
        if self.where == "thread":
            raise self.error
        if self.where == "awaitable":
            return self._later()
        return 0

    async def _later(self) -> int:
        await trio.lowlevel.checkpoint()
        raise self.error

    async def run(self) -> None:
        await self.go.wait()
        if self.where == "run":
            raise self.error
        if self.where == "nursery":
            self.host.nursery.start_soon(self._later)
        await trio.sleep_forever()

    def finish(self) -> None:
        if self.where == "finish":
            raise self.error

    async def quiesce(self) -> None:
        pass

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: Any) -> None:
        pass


async def made(
    how: str, folder: Path, device: Failing, stack: AsyncExitStack
) -> AbstractAsyncContextManager[avmm.Machine]:
    """A machine with this device, of a guest that waits; what it needs beside is in `stack`."""
    places = [avmm.pio(device, 0x300, 4)]
    if how == "Machine":
        return machine(folder, WAITS, devices=places)
    harmless = [avmm.pio(Failing("nowhere", ValueError()), 0x300, 4)]
    origin = await stack.enter_async_context(machine(folder, WAITS, devices=harmless))
    if how == "clone":
        return origin.clone(devices=places)
    if how == "restore":
        await origin.snapshot(folder / "snap")
        return avmm.restore(folder / "snap", devices=places)
    here, there = trio.testing.memory_stream_pair()
    nursery = await stack.enter_async_context(trio.open_nursery())
    nursery.start_soon(origin.migrate, here)
    return avmm.receive(there, devices=places)


def fail(vm: avmm.Machine, device: Failing) -> None:
    vm.memory.write(0x20_0000, b"\1")
    device.go.set()


HOWS = pytest.mark.parametrize("how", ["Machine", "clone", "restore", "receive"])


@HOWS
@pytest.mark.parametrize("where", ["thread", "awaitable", "run", "finish"])
@pytest.mark.parametrize("make", [special, lambda: ValueError("alone")], ids=["group", "alone"])
async def test_what_is_raised_comes_out_as_that_very_object(
    tmp_path: Path, how: str, where: str, make: Callable[[], Exception]
) -> None:
    error = make()
    device = Failing(where, error)
    async with AsyncExitStack() as stack:
        opened = await made(how, tmp_path, device, stack)
        with pytest.raises(type(error)) as caught:
            async with opened as vm:
                fail(vm, device)
                if where != "finish":
                    await trio.sleep_forever()
    assert caught.value is error
    assert error.__context__ is None


@HOWS
async def test_the_blocks_own_group_stays_the_blocks(tmp_path: Path, how: str) -> None:
    error = special()
    async with AsyncExitStack() as stack:
        opened = await made(how, tmp_path, Failing("nowhere", error), stack)
        with pytest.raises(Special) as caught:
            async with opened:
                raise error
    assert caught.value is error


@HOWS
async def test_where_both_fail_both_are_told(tmp_path: Path, how: str) -> None:
    """The block, because its machine has failed: as it would be in any nursery."""
    error, own = special(), KeyError("own")
    device = Failing("run", error)
    async with AsyncExitStack() as stack:
        opened = await made(how, tmp_path, device, stack)
        with pytest.raises(ExceptionGroup, match="a machine and its block have failed") as caught:
            async with opened as vm:
                fail(vm, device)
                try:
                    await trio.sleep_forever()
                finally:
                    raise own
    assert caught.value.exceptions == (own, error)


@HOWS
@pytest.mark.parametrize("make", [special, lambda: ValueError("alone")], ids=["group", "alone"])
async def test_what_a_device_has_started_in_its_nursery_fails_without_a_group(
    tmp_path: Path, how: str, make: Callable[[], Exception]
) -> None:
    """It has come through the machine's nursery, and groups are copied on their way."""
    error = make()
    device = Failing("nursery", error)
    async with AsyncExitStack() as stack:
        opened = await made(how, tmp_path, device, stack)
        with pytest.raises(type(error) if make is not special else ExceptionGroup) as caught:
            async with opened as vm:
                fail(vm, device)
                await trio.sleep_forever()
    found = caught.value
    if isinstance(error, ExceptionGroup):
        assert isinstance(found, ExceptionGroup)
        assert (found.message, found.exceptions) == (error.message, error.exceptions)
    else:
        assert found is error


def test_a_user_of_the_old_nurseries_gets_the_same(tmp_path: Path) -> None:
    """Those give no group where there is one error: then there is none of ours to take away."""
    found: list[BaseException] = []

    async def main(where: str, error: Exception) -> None:
        device = Failing(where, error)
        try:
            async with machine(tmp_path, WAITS, devices=[avmm.pio(device, 0x300, 4)]) as vm:
                fail(vm, device)
                await trio.sleep_forever()
        except Exception as caught:
            found.append(caught)

    for where in ("run", "nursery", "awaitable"):
        error = special()
        with pytest.warns(trio.TrioDeprecationWarning):
            trio.run(main, where, error, strict_exception_groups=False)
        (caught,) = found
        assert isinstance(caught, ExceptionGroup)
        assert (caught.message, caught.exceptions) == (error.message, error.exceptions)
        found.clear()


async def test_several_vcpus_that_fail_are_told_together(tmp_path: Path) -> None:
    """Each with its own; a group that one of them has raised is one of these."""
    errors: list[Exception] = [special(), ValueError("two")]
    both = trio.Event()

    class Late(avmm.Device):
        asked = 0

        async def read(self, offset: int, size: int) -> int:
            self.asked += 1
            if self.asked == 2:
                both.set()
            with trio.CancelScope(shield=True):
                await both.wait()
            raise errors[offset]

    code = """
        mov ebx, 0xfee00000
        mov dword ptr [rbx + 0xf0], 0x1ff
        mov esi, offset ap
        mov edi, 0x8000
        mov ecx, offset ap_end - ap
        rep movsb
        mov dword ptr [rbx + 0x300], 0xc4500
        mov dword ptr [rbx + 0x300], 0xc4608
        mov dx, 0x300; in al, dx
    1:  jmp 1b
    .code16
    ap: mov dx, 0x301; in al, dx
    2:  jmp 2b
    ap_end:
    """
    place = avmm.pio(Late(), 0x300, 2)
    with pytest.raises(ExceptionGroup, match="several vCPUs have failed") as caught:
        async with machine(tmp_path, code, devices=[place], cpus=2):
            await trio.sleep_forever()
    assert sorted(caught.value.exceptions, key=str) == sorted(errors, key=str)


async def test_a_cancellation_goes_to_who_has_cancelled(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with machine(tmp_path, WAITS):
            scope.cancel()
            await trio.sleep_forever()
        pytest.fail("the block was cancelled, and what is behind it with it")
    assert scope.cancelled_caught


async def test_a_device_that_cancels_its_nursery_ends_the_block(tmp_path: Path) -> None:
    class Ending(avmm.Device):
        async def run(self) -> None:
            self.host.nursery.cancel_scope.cancel()

    async with machine(tmp_path, WAITS, devices=[avmm.pio(Ending(), 0x300, 4)]) as vm:
        await trio.sleep_forever()
    assert (await vm.wait()).detail == "the machine was left"


async def test_an_error_beside_a_cancellation_is_the_error(tmp_path: Path) -> None:
    """Of a device's own nursery, whose tasks were cancelled by another one's failure."""
    error = ValueError("the reason")

    class Two(avmm.Device):
        async def run(self) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._fail)
                await trio.sleep_forever()

        async def _fail(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise error

    device = Failing("run", KeyError("first"))
    places = [avmm.pio(device, 0x300, 4), avmm.pio(Two(), 0x310, 4)]
    with pytest.raises(ExceptionGroup, match="a machine and its block have failed") as caught:
        async with machine(tmp_path, WAITS, devices=places) as vm:
            await trio.testing.wait_all_tasks_blocked()
            fail(vm, device)
            await trio.sleep_forever()
    first, second = caught.value.exceptions
    assert first is device.error
    assert isinstance(second, ExceptionGroup)
    assert second.exceptions == (error,)


# -- its parts -----------------------------------------------------------------------------


def test_errors_without_a_cancellation_are_left_as_they_are() -> None:
    for error in (ValueError("x"), KeyboardInterrupt(), special()):
        assert parted(error) == (None, error)
        assert parted(error)[1] is error


async def test_cancellations_are_parted_from_the_rest() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled as cancelled:
            assert parted(cancelled) == (cancelled, None)
            own = ValueError("x")
            mixed = BaseExceptionGroup("m", [BaseExceptionGroup("n", [cancelled]), own])
            theirs, rest = parted(mixed)
            assert isinstance(theirs, BaseExceptionGroup)
            assert isinstance(rest, BaseExceptionGroup)
            assert rest.exceptions == (own,)
            raise


def test_an_error_keeps_its_context() -> None:
    before = KeyError("before")
    error = ValueError("then")
    error.__context__ = before
    with pytest.raises(ValueError, match="then") as caught:
        try:
            raise OSError("being handled")
        except OSError:
            raise_together([error], "")
    assert caught.value.__context__ is before
    raise_together([], "nothing")
    with pytest.raises(ExceptionGroup, match="both"):
        raise_together([error, before], "both")


async def test_a_gathered_block_that_fails_ends_its_tasks() -> None:
    with trio.move_on_after(5) as limit, pytest.raises(KeyError, match="mine"):
        async with gathered("several") as tasks:
            tasks.start(trio.sleep_forever)
            raise KeyError("mine")
    assert not limit.cancel_called


async def test_gathered_errors_come_as_they_are_and_several_in_one_group() -> None:
    both = trio.Event()

    async def fail() -> None:
        try:
            await both.wait()
        finally:
            raise KeyError("a task's")

    with trio.fail_after(5), pytest.raises(ExceptionGroup, match="several") as caught:
        async with gathered("several") as tasks:
            tasks.start(fail)
            tasks.start(fail)
            await trio.lowlevel.checkpoint()
            both.set()
    assert [type(error) for error in caught.value.exceptions] == [KeyError, KeyError]
