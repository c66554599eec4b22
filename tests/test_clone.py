"""Clones: what they share with the machine that they came of, and what they must not."""

from __future__ import annotations

import random
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

import avmm
from avmm import clones
from avmm.errors import ConfigError
from avmm.memory.pages import PAGE, Bitmap, own_pages
from avmm.parts import dismantle

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kvm")]

PROMPT = b"avmm> "


async def ask(vm: avmm.Machine, line: bytes) -> str:
    """Type a line: what is printed up to the next prompt, without the line."""
    await vm.console.send_all(line + b"\r")
    said = b""
    with trio.fail_after(20):
        while not said.endswith(b"\n" + PROMPT):
            said += await vm.console.receive_some()
    return said.decode().partition("\r\n")[2].removesuffix(PROMPT.decode())


async def checksum(vm: avmm.Machine) -> str:
    """Of 16 MiB, of which some was written."""
    return (await ask(vm, b"sum 0x1000000 0x1000000")).split()[1]


async def greeted(vm: avmm.Machine) -> None:
    said = b""
    with trio.fail_after(20):
        while not said.endswith(PROMPT):
            said += await vm.console.receive_some()


async def test_each_has_a_disk_of_its_own(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(64 * 512))
    disk = f"{image},overlay"
    async with avmm.Machine(memory="8M", disks=[disk]) as vm:
        await greeted(vm)
        with pytest.raises(
            ConfigError,
            match=r"expected `disks` to have a file on this host for each of them, got 0",
        ):
            async with vm.clone():
                pytest.fail("it has no disk")
        async with vm.clone(disks=[disk]) as twin:
            for each in twin, vm:
                assert "not empty" not in await ask(each, b"count 20 disk")
            async with twin.clone(disks=[disk]) as third:
                assert "holds" in await ask(third, b"count 20 disk"), "it has what the twin wrote"
        await ask(vm, b"echo")
    assert image.read_bytes() == bytes(64 * 512)


async def test_a_disk_that_is_written_can_be_copied_at_the_standstill(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(bytes(64 * 512))
    async with avmm.Machine(memory="8M", disks=[str(first)]) as vm:
        await greeted(vm)
        await ask(vm, b"count 10 disk")
        with pytest.raises(ConfigError, match="it is in use"):
            async with vm.clone(disks=[str(first)]):
                pytest.fail("two write the same disk")
        async with vm.paused():
            second.write_bytes(first.read_bytes())
            async with vm.clone(disks=[str(second)]) as twin:
                assert "holds" in await ask(twin, b"count 20 disk")
        await ask(vm, b"echo")
    assert second.read_bytes() == first.read_bytes()


class Bell(avmm.Device):
    """A write to it says that what came before has happened."""

    def __init__(self) -> None:
        self.rung = trio.Event()

    async def write(self, offset: int, size: int, value: int) -> None:
        self.rung.set()

    def save(self) -> Mapping[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """It has none."""


@pytest.mark.parametrize("keep", [False, True])
async def test_output_that_nobody_has_received(keep: bool) -> None:
    bell = Bell()
    async with avmm.Machine(memory="8M", devices=[avmm.pio(bell, 0x5000, 1)]) as vm:
        await greeted(vm)
        await vm.console.send_all(b"echo on\rout 0x5000 1\r")
        with trio.fail_after(10):
            await bell.rung.wait()
        async with vm.clone(devices=[avmm.pio(Bell(), 0x5000, 1)], keep_output=keep) as twin:
            await twin.console.send_all(b"echo twin\r")
            said = b""
            with trio.fail_after(10):
                while not said.endswith(b"\ntwin\r\navmm> "):
                    said += await twin.console.receive_some()
            assert (b"echo on\r\non\r\n" in said) is keep
        said = b""
        with trio.fail_after(10):
            while not said.endswith(b"out 0x5000 1\r\navmm> "):
                said += await vm.console.receive_some()
        assert b"echo on\r\non\r\n" in said


async def test_a_restored_guest_that_has_written_much_is_cloned_again_and_again(
    tmp_path: Path,
) -> None:
    """Copied is what was written since the last time, and meanwhile the program's other tasks run;
    what clones have in common is there once."""
    snap = tmp_path / "snap"
    async with avmm.Machine(memory="128M") as vm:
        await greeted(vm)
        await vm.snapshot(snap)
    async with avmm.restore(snap) as vm, trio.open_nursery() as nursery:
        # From the last half of what is summed on.
        vm.memory.write(0x180_0000, random.Random(1).randbytes(64 << 20))
        sums = [await checksum(vm)]
        rounds = [0]

        async def count() -> None:
            while True:
                rounds[0] += 1
                await trio.sleep(0.001)

        nursery.start_soon(count)
        own: list[Bitmap] = []
        for turn in range(4):
            before = rounds[0]
            async with vm.clone() as twin:
                assert turn or rounds[0] > before + 3, "the others stood still"
                own.append(Bitmap(twin.memory.size // PAGE))
                own_pages(twin.memory.whole, own[-1])
                assert await checksum(twin) == sums[-1]
                await ask(twin, b"poke 0x1000000 %d" % turn)
            await ask(vm, b"poke.q 0x1800000 %d" % (100 + turn))
            sums.append(await checksum(vm))
        assert len(set(sums)) == len(sums)
        assert len(vm.memory.populated()) > 16384
        assert max(map(len, own)) < 2048, "clones have in common what was written before them"
        nursery.cancel_scope.cancel()


async def test_several_clones_at_a_time() -> None:
    async with avmm.Machine(memory="64M") as vm:
        await greeted(vm)
        async with vm.clone():
            pass  # from here on it is copy-on-write
        for turn in range(3):
            await ask(vm, b"burn 4000 1")
            await ask(vm, b"poke.q 0x1000000 %d" % turn)
            wanted = await checksum(vm)

            async def look(wanted: str = wanted) -> None:
                async with vm.clone() as twin:
                    assert await checksum(twin) == wanted

            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(look)
            assert await checksum(vm) == wanted


async def peeked(vm: avmm.Machine) -> int:
    return int(await ask(vm, b"peek.q 0x800000"), 16)


async def test_many_of_one_standstill() -> None:
    """Each continues from the same moment, and none sees what another one writes."""
    async with avmm.Machine(memory="16M") as vm:
        await greeted(vm)
        await ask(vm, b"poke.q 0x800000 77")
        async with vm.fork_many(6) as twins:
            assert len(twins) == 6
            for number, twin in enumerate(twins):
                assert await peeked(twin) == 77
                await ask(twin, b"poke.q 0x800000 %d" % number)
            for number, twin in enumerate(twins):
                assert await peeked(twin) == number
            assert await peeked(vm) == 77
        assert [(await twin.wait()).cause for twin in twins] == [avmm.Cause.STOPPED] * len(twins)
        async with vm.fork_many(1) as (twin,):
            assert await peeked(twin) == 77


async def test_each_of_many_has_what_it_was_given(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(64 * 512))
    own = [tmp_path / f"own{number}" for number in range(3)]
    for path in own:
        path.write_bytes(bytes(64 * 512))
    async with avmm.Machine(memory="8M", disks=[str(image)]) as vm:
        await greeted(vm)
        given: list[int] = []

        def each(index: int) -> avmm.Fork:
            given.append(index)
            return avmm.Fork(settings={"disks": [str(own[index])]})

        async with vm.fork_many(3, each, unclaimed="ignore") as twins:
            for number, twin in enumerate(twins):
                await ask(twin, b"count %d disk" % (number + 1))
        assert given == [0, 1, 2]
    written = [path.read_bytes().rstrip(b"\0") for path in own]
    assert [len(data) // 512 for data in written] == [0, 1, 2]
    assert not image.read_bytes().strip(b"\0")


@pytest.mark.usefixtures("nothing_left")
async def test_when_one_of_many_cannot_be_made_none_is_left(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(64 * 512))
    async with avmm.Machine(memory="8M", disks=[f"{image},overlay"]) as vm:
        await greeted(vm)

        def each(index: int) -> avmm.Fork:
            disk = f"{tmp_path}/gone" if index == 2 else f"{image}"
            return avmm.Fork(settings={"disks": [f"{disk},overlay"]})

        with pytest.raises(ConfigError, match="gone"):
            async with vm.fork_many(4, each):
                pytest.fail("one of them has no disk")

        def given(whatever: Any, index: int) -> Any:
            return whatever

        for count, wrong in ((0, avmm.Fork()), (2, {"disks": []})):
            with pytest.raises(ConfigError, match=r"^fork_many: .*; expected "):
                async with vm.fork_many(count, partial(given, wrong)):
                    pytest.fail("nothing sensible was asked for")
        assert "not empty" not in await ask(vm, b"count 3 disk")


@pytest.mark.usefixtures("nothing_left")
async def test_many_are_left_with_their_block_whatever_ends_it() -> None:
    async with avmm.Machine(memory="64M") as vm:
        await greeted(vm)
        with pytest.raises(KeyError, match="mine"):
            async with vm.fork_many(3) as twins:
                raise KeyError("mine")
        assert [(await twin.wait()).cause for twin in twins] == [avmm.Cause.STOPPED] * len(twins)
        with trio.CancelScope() as scope:
            async with vm.fork_many(3) as twins:
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert [(await twin.wait()).cause for twin in twins] == [avmm.Cause.STOPPED] * len(twins)
        with trio.move_on_after(0):
            async with vm.fork_many(3):
                pytest.fail("it was cancelled before")

        async with vm.fork_many(2) as twins:
            assert await checksum(twins[1])


@pytest.mark.usefixtures("nothing_left")
async def test_no_error_of_many_is_lost_to_a_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    async with avmm.Machine(memory="8M") as vm:
        await greeted(vm)
        with (
            pytest.raises(ValueError, match="the block's"),
            trio.CancelScope() as scope,
        ):
            async with vm.fork_many(2):
                scope.cancel()
                try:
                    await trio.sleep_forever()
                finally:
                    raise ValueError("the block's")

        real = clones.build
        turns = iter(range(2))
        waits = trio.Event()

        async def build(*arguments: Any) -> Any:
            if next(turns) == 0:
                parts = await real(*arguments)
                try:
                    waits.set()
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await dismantle(parts)
                    scope.cancel()
            await waits.wait()
            raise ValueError("a clone's")

        with monkeypatch.context() as patched:
            patched.setattr(clones, "build", build)
            with (
                pytest.raises(ValueError, match="a clone's"),
                trio.CancelScope() as scope,
            ):
                async with vm.fork_many(2):
                    pytest.fail("one was not built")


@pytest.mark.usefixtures("nothing_left")
async def test_a_clone_that_was_built_is_dismantled_if_another_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with avmm.Machine(memory="8M") as vm:
        await greeted(vm)
        real, turns, one_is_built = clones.build, iter(range(2)), trio.Event()

        async def build(*arguments: Any) -> Any:
            if next(turns) == 0:
                parts = await real(*arguments)
                one_is_built.set()
                return parts
            await one_is_built.wait()
            raise ValueError("a clone's")

        monkeypatch.setattr(clones, "build", build)
        with pytest.raises(ValueError, match="a clone's"):
            async with vm.fork_many(2):
                pytest.fail("one was not built")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("when", ["building", "inside", "leaving"])
def test_ctrl_c_among_many_is_no_group(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed_in(module: ModuleType, name: str) -> None:
        real = getattr(module, name)

        async def call(*arguments: Any) -> Any:
            monkeypatch.undo()  # once: trio raises a second one by itself, at the very end
            signal.raise_signal(signal.SIGINT)
            return await real(*arguments)

        monkeypatch.setattr(module, name, call)

    async def main() -> None:
        async with avmm.Machine(memory="8M") as vm:
            await greeted(vm)
            if when == "building":
                pressed_in(clones, "build")
            async with vm.fork_many(2):
                if when == "inside":
                    signal.raise_signal(signal.SIGINT)
                if when == "leaving":
                    pressed_in(avmm.machine, "dismantle")

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)


@pytest.mark.usefixtures("nothing_left")
async def test_one_of_many_that_is_ended_by_its_own_device_ends_the_block() -> None:
    class Ending(avmm.Device):
        def save(self) -> Mapping[str, Any]:
            return {}

        def load(self, state: Mapping[str, Any]) -> None:
            pass

        async def quiesce(self) -> None:
            pass

    devices = [Ending() for _ in range(3)]

    def place(device: Ending) -> avmm.Placement:
        return avmm.pio(device, 0x5000, 1)

    async with avmm.Machine(memory="8M", devices=[place(devices[0])]) as vm:
        await greeted(vm)
        reached = False
        async with vm.fork_many(2, lambda n: avmm.Fork(devices=[place(devices[1 + n])])):
            devices[2].host.nursery.cancel_scope.cancel()
            with trio.fail_after(20):
                await trio.sleep_forever()
            reached = True
        assert not reached
