"""What goes wrong on the line while a guest counts: it runs on one side then, and never on two.

The guest has one disk, a file that both sides have: whoever does not hold it must not write it,
and a number that is not there, or is there twice, is found.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Final

import pytest
import trio
from support.counting import SECTOR, Counting
from support.faults import KINDS, Fault, Line, Message, MessageKind, Way

import avmm
from avmm.disks import RawDisk
from avmm.errors import ConfigError, HandOverUnknownError, MigrationError, RunstateError

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("kvm", "nothing_left"),
]

SECTORS = 4000
MANY = int(os.environ.get("AVMM_FAULTS", "200"))
"""How many random bytes the slow test takes; half a second each."""
PATIENCE = 0.5
"""How long a side waits, in seconds, where it is to find out that nothing comes any more."""
SILENT = ("end", "stall", "lose", "double", "corrupt")
CHANNELS = ("serial", "hvc", "vsock", "disk")


class Trial:
    """A guest that counts, one attempt to migrate it, and what has become of it."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk
        disk.write_bytes(b"")
        os.truncate(disk, SECTORS * SECTOR)
        self.counting = Counting(SECTORS, *CHANNELS)
        self.outcome = self.why = ""
        self.arrived = False

    def machine(self) -> avmm.Machine:
        return avmm.Machine(
            memory="8M",
            disks=[str(self.disk)],
            vsock="cid=3",
            devices=[avmm.virtio(avmm.Console())],
        )

    async def run(self, line: Line) -> None:
        async with self.machine() as vm:
            await vm.console.send_all(self.counting.command)
            async with trio.open_nursery() as nursery:
                read = trio.CancelScope()
                nursery.start_soon(self._read, vm, read)
                await self.counting.reached(5)
                async with line.open(), trio.open_nursery() as sides:
                    ended = trio.Event()
                    here, go_on = trio.Event(), trio.Event()
                    sides.start_soon(self._destination, line, read, here, go_on, ended)
                    await self._migrate(vm, line)
                    if self.outcome != "migrated":
                        await self._sort_out(vm, here, ended)
                    if self.outcome in ("failed", "unknown, here"):
                        await self._is_well(vm)
                    go_on.set()
                read.cancel()
        self._check_disk()

    async def _read(self, vm: avmm.Machine, scope: trio.CancelScope) -> None:
        with scope:
            async with self.counting.attached(vm):
                await trio.sleep_forever()

    async def _migrate(self, vm: avmm.Machine, line: Line) -> None:
        try:
            patience = PATIENCE if line.fault.kind in SILENT else 20
            # Where it can be seen that the line is broken somebody says so, on a busy host later.
            answer = PATIENCE if line.fault.kind in ("end", "stall") else 5
            await vm.migrate(line.source, stall_seconds=patience, answer_seconds=answer)
        except HandOverUnknownError as error:
            self.outcome, self.why = "unknown", str(error)
        except MigrationError as error:
            self.outcome, self.why = "failed", str(error)
        else:
            self.outcome = "migrated"
            assert (await vm.wait()).cause is avmm.Cause.MOVED

    async def _destination(
        self,
        line: Line,
        read: trio.CancelScope,
        here: trio.Event,
        go_on: trio.Event,
        ended: trio.Event,
    ) -> None:
        try:
            async with avmm.receive(
                line.destination,
                devices=[avmm.virtio(avmm.Console())],
                disks=[str(self.disk)],
                vsock="cid=4",
                stall_seconds=PATIENCE + 0.3 if line.fault.kind in SILENT else 20,
            ) as twin:
                self.arrived = True
                here.set()
                # Whatever was received there was so before it was released.
                read.cancel()
                await trio.lowlevel.checkpoint()
                async with self.counting.attached(twin):
                    await self._is_well(twin)
                await go_on.wait()
        except (MigrationError, avmm.AvmmError):
            assert not self.arrived
        finally:
            ended.set()

    async def _sort_out(self, vm: avmm.Machine, here: trio.Event, ended: trio.Event) -> None:
        if self.outcome == "failed":
            await ended.wait()
            assert not self.arrived, "it runs on both sides"
            return
        assert vm.is_paused
        assert vm.state is avmm.Runstate.UNSETTLED
        with pytest.raises(RunstateError, match=r"^migrate: this machine .* waits for settle\(\)"):
            await vm.migrate(trio.testing.memory_stream_pair()[0])
        async with trio.open_nursery() as nursery:

            async def first(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(first, here)
            nursery.start_soon(first, ended)
        if self.arrived:
            await vm.settle(runs_here=False)
            assert (await vm.wait()).cause is avmm.Cause.MOVED
            self.outcome = "unknown, there"
        else:
            await vm.settle(runs_here=True)
            self.outcome = "unknown, here"

    async def _is_well(self, vm: avmm.Machine) -> None:
        """It goes on counting, and holds its disk; nobody else does."""
        await self.counting.reached(min(self.counting.got.values()) + 8)
        with pytest.raises(ConfigError, match="in use"):
            RawDisk(self.disk)
        vm.stop()
        await vm.wait()

    def _check_disk(self) -> None:
        with self.disk.open("rb") as file:
            data = file.read().rstrip(b"\0 ")
        numbers = [int(data[at : at + SECTOR].rstrip(b"\0")) for at in range(0, len(data), SECTOR)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= max(self.counting.got.values()) - 1


async def attempt(folder: Path, fault: Fault) -> tuple[str, Line]:
    trial, line = Trial(folder / "disk"), Line(fault)
    with trio.fail_after(30):
        await trial.run(line)
    line.why = trial.why
    return trial.outcome, line


async def test_a_line_on_which_nothing_goes_wrong(tmp_path: Path) -> None:
    for _ in range(3):
        outcome, line = await attempt(tmp_path, Fault())
        assert outcome == "migrated", line.why
        said = line.frames["there"].seen
        assert sorted(said) == sorted({message for way, message, _ in SAID if way == "there"})
        assert 1 <= len(said[Message.PAGES]) <= len(said[Message.ROUND]) <= 3
        assert [Message(kind).name for kind in line.frames["back"].seen] == [
            "HELLO",
            "ACCEPT",
            "READY",
            "RUNNING",
        ]


SAID: list[tuple[Way, Message, int]] = [
    *(
        ("there", Message[name], number)
        for name, number in (
            ("HELLO", 0),
            ("OFFER", 0),
            ("PAGES", 0),
            ("ROUND", 0),
            ("PAGES", 1),  # of the standstill, as this guest goes
            ("ROUND", 1),
            ("STATE", 0),
            ("STATE_END", 0),
            ("COMMIT", 0),
        )
    ),
    *(("back", Message[name], 0) for name in ("HELLO", "ACCEPT", "READY", "RUNNING")),
]


IMPATIENT: Final = re.compile("nothing came for|took less than")
"""The reasons of a side that has waited for too long."""


async def at_messages(folder: Path, kind: MessageKind, at: int) -> None:
    """Before COMMIT nothing has happened; without RUNNING nobody knows."""
    for way, message, number in SAID:
        fault = Fault(kind, way, at, message, number)
        for tries in range(20):  # the one that comes twice may come once
            outcome, line = await attempt(folder, fault)
            if line.has_happened:
                break
            # A busy host may be slower than the short patience of both sides here.
            assert number or tries < 2, (fault, line.why)
        assert line.has_happened, fault
        if kind == "double" and message in (Message.COMMIT, Message.RUNNING):
            wanted = "migrated"  # what comes after the last word is not listened to
        elif kind == "double" and message is Message.READY:
            wanted = "unknown, there"  # it has begun, and then the line is seen to be broken
        elif kind == "corrupt" and message is Message.COMMIT:
            wanted = "failed"  # it was seen, and the answer says so
        elif message is Message.COMMIT:
            # Decided where the destination gives up before the source does, and can say so.
            wanted = "failed" if outcome == "failed" else "unknown, here"
        else:
            wanted = "unknown, there" if message is Message.RUNNING else "failed"
        assert outcome == wanted, (way, message, line.why)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "end"])
async def test_at_the_boundary_of_each_message(tmp_path: Path, kind: MessageKind) -> None:
    await at_messages(tmp_path, kind, 0)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1, -1])
@pytest.mark.parametrize("kind", KINDS)
async def test_near_the_boundary_of_each_message(
    tmp_path: Path, kind: MessageKind, at: int
) -> None:
    """`double` repeats the last byte, which is the first of what follows, if anything does."""
    if (kind, at) != ("double", -1):
        await at_messages(tmp_path, kind, at)


async def at_random(folder: Path, count: int, seed: int) -> Counter[str]:
    moments = random.Random(seed)
    _, line = await attempt(folder, Fault())
    ends = line.gone
    seen = Counter[str]()
    impatient = 0
    while seen.total() < count:
        way: Way = moments.choice(("there", "there", "back"))
        # Most bytes are RAM; the rest, the state and the end, are worth as many.
        at = moments.randrange(ends[way])
        if way == "there" and moments.random() < 0.5:
            at = ends[way] - 1 - moments.randrange(20_000)
        fault = Fault(moments.choice(KINDS), way, at)
        try:
            outcome, line = await attempt(folder, fault)
        except BaseException as error:
            error.add_note(f"{fault}")
            raise
        if line.has_happened:
            seen[outcome] += 1
        elif outcome == "failed" and IMPATIENT.search(line.why):
            # A busy host may be slower than the short patience of both sides here.
            impatient += 1
            assert impatient < 3 + count / 100, (fault, line.why)
        else:  # less was said this time, as the guest had written less
            assert outcome == "migrated", (fault, line.why)
            ends = line.gone
    return seen


async def test_at_random_bytes(tmp_path: Path) -> None:
    seen = await at_random(tmp_path, 20, 1)
    assert seen["failed"] > 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_at_many_random_bytes(tmp_path: Path) -> None:
    seen = await at_random(tmp_path, MANY, 2)
    assert min(seen["failed"], seen["unknown, there"]) > MANY / 100
