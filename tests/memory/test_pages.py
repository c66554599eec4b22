"""RAM that is copied, forked and given back while it is written, against plain bytes."""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from avmm.arch.x86_64.layout import HOLE_END, HOLE_START, RAM
from avmm.memory import layers as layers_module
from avmm.memory import ram as memory_module
from avmm.memory.pages import PAGE, RUN_BYTES, Bitmap, Packer, own_pages, unpack
from avmm.memory.ram import GuestMemory
from avmm.native.vring import SplitRing

PAGES = 70
"""More than one word of a bitmap has bits."""
SIZE = PAGES * PAGE
RING = 64 * PAGE
"""Where each guest has a ring of 8: descriptors, then the available and the used ring."""
AVAIL, USED = RING + PAGE, RING + 2 * PAGE
ENTRIES = 8
COUNTS = st.integers(0, 3)


@contextmanager
def shared(content: bytes | bytearray) -> Iterator[tuple[memoryview, int]]:
    """RAM as a destination has it: (a shared mapping, its file)."""
    fd = os.memfd_create("avmm-ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, len(content))
        with mmap.mmap(fd, len(content)) as mapping, memoryview(mapping) as ram:
            ram[:] = content
            yield ram, fd
    finally:
        os.close(fd)


class Guest:
    """A guest's RAM, what it should hold, and a copy of it under way."""

    def __init__(self, memory: GuestMemory, model: bytearray) -> None:
        self.memory = memory
        self.model = model
        self.is_private = False
        self.left: Bitmap | None = None
        self.copy = bytearray(SIZE)
        self.skip_zeros = True
        self.pushed = 0
        self.ring: SplitRing | None = None

    def write(self, at: int, data: bytes) -> None:
        self.memory.write(at, data)
        self.model[at : at + len(data)] = data


def copied(
    packer: Packer, left: Bitmap, into: tuple[memoryview, int], *, skip_zeros: bool
) -> None:
    packer.rewind()
    while (packed := packer.next(left, skip_zeros=skip_zeros)) is not None:
        # Both are used again by the next call: what is kept of them must not depend on it.
        ram, fd = into
        assert unpack(ram, fd, packed.runs, packed.data)
    assert len(left) == 0


class RamMachine(RuleBasedStateMachine):
    """Everything that is done to RAM, on up to four guests that came of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = layers_module._RUNS, layers_module._LEAST, memory_module._SCATTERED
        self.few = memory_module._FEW
        memory_module._FEW = 0  # type: ignore[misc]
        self.guests = [Guest(GuestMemory(SIZE), bytearray(SIZE))]

    @initialize(
        most=st.sampled_from([2, 5, 256]),
        least=st.integers(1, 4),
        scattered=st.sampled_from([1, 2, 100]),
    )
    def limit(self, most: int, least: int, scattered: int) -> None:
        """As small as this RAM is."""
        layers_module._RUNS, layers_module._LEAST = most, least  # type: ignore[misc]
        memory_module._SCATTERED = scattered  # type: ignore[misc]

    def teardown(self) -> None:
        self.limit(*self.limits)
        memory_module._FEW = self.few  # type: ignore[misc]
        for guest in self.guests:
            guest.memory.close()

    def pick(self, which: int) -> Guest:
        return self.guests[which % len(self.guests)]

    @rule(which=COUNTS, at=st.integers(0, RING - 3 * PAGE), data=st.binary(max_size=2 * PAGE + 2))
    def write(self, which: int, at: int, data: bytes) -> None:
        self.pick(which).write(at, data)

    @rule(which=COUNTS, page=st.integers(0, 63), count=st.integers(1, 3))
    def zero(self, which: int, page: int, count: int) -> None:
        self.pick(which).write(page * PAGE, bytes(min(count, 64 - page) * PAGE))

    @rule(
        which=COUNTS, at=st.integers(0, 63 * PAGE), length=st.integers(1, PAGE), more=st.booleans()
    )
    def push(self, which: int, at: int, length: int, more: bool) -> None:
        """A device fills a buffer where it is and gives it back, as virtio devices do it."""
        guest = self.pick(which)
        head, slot = guest.pushed % ENTRIES, guest.pushed % ENTRIES
        if guest.ring is None:
            guest.ring = SplitRing(
                guest.memory.table, ENTRIES, RING, AVAIL, USED, event_idx=False, indirect=False
            )
        guest.write(RING + 16 * head, struct.pack("<QIHH", at, length, 2, 0))
        guest.write(AVAIL + 4 + 2 * slot, struct.pack("<H", head))
        guest.write(AVAIL + 2, struct.pack("<H", guest.pushed + 1))
        assert guest.ring.pop()
        offset, size = guest.ring.parts[:2]
        assert (offset, size) == (at, length)
        filled = bytes([guest.pushed % 255 + 1]) * length
        guest.memory.whole[at : at + length] = filled
        guest.model[at : at + length] = filled
        guest.ring.push(head, length, more)
        guest.pushed += 1
        guest.model[USED + 4 + 8 * slot : USED + 12 + 8 * slot] = struct.pack("<II", head, length)
        if not more:
            guest.model[USED + 2 : USED + 4] = struct.pack("<H", guest.pushed)

    @rule(which=COUNTS, page=st.integers(0, 63), count=st.integers(1, 3))
    def discard(self, which: int, page: int, count: int) -> None:
        guest = self.pick(which)
        start, end = page * PAGE, min(page + count, 64) * PAGE
        guest.memory.discard(start, end - start)
        if guest.is_private:  # what was there at some time
            guest.model[start:end] = guest.memory.read(start, end - start)
        else:
            guest.model[start:end] = bytes(end - start)

    @precondition(lambda self: len(self.guests) < 4)
    @rule(which=COUNTS)
    def fork(self, which: int) -> None:
        guest = self.pick(which)
        memory = guest.memory.fork()
        guest.is_private = True
        twin = Guest(memory, bytearray(guest.model))
        twin.is_private = True
        twin.pushed = 0
        self.guests.append(twin)
        # A ring of its own, from the beginning.
        twin.write(AVAIL, bytes(PAGE))
        twin.write(USED, bytes(PAGE))

    @precondition(lambda self: len(self.guests) > 1)
    @rule(which=COUNTS)
    def end(self, which: int) -> None:
        """Whoever goes on needs nothing of one that has ended, whichever came of which."""
        guest = self.pick(which)
        guest.ring = None
        guest.memory.close()
        self.guests.remove(guest)

    @rule(which=COUNTS)
    def begin_copy(self, which: int) -> None:
        guest = self.pick(which)
        if guest.left is None:
            guest.memory.log()
            guest.left, guest.copy, guest.skip_zeros = (
                guest.memory.populated(),
                bytearray(SIZE),
                True,
            )

    @rule(which=COUNTS, small=st.booleans())
    def copy_round(self, which: int, small: bool) -> None:
        """After it the copy is what RAM is: nothing that was written meanwhile is missed."""
        guest = self.pick(which)
        if guest.left is None:
            return
        guest.memory.take_dirty(guest.left)
        packer = Packer(guest.memory.whole, 2, 3) if small else Packer(guest.memory.whole)
        with shared(guest.copy) as ram:
            copied(packer, guest.left, ram, skip_zeros=guest.skip_zeros)
            guest.copy = bytearray(ram[0])
        guest.skip_zeros = False
        assert guest.copy == guest.model

    @rule(which=COUNTS)
    def end_copy(self, which: int) -> None:
        guest = self.pick(which)
        guest.memory.unlog()
        guest.left = None

    @rule()
    def look(self) -> None:
        """Nobody sees what another one writes."""
        for guest in self.guests:
            assert guest.memory.read(0, SIZE) == guest.model

    @rule(which=COUNTS)
    def look_at_contents(self, which: int) -> None:
        guest, found = self.pick(which), bytearray(SIZE)
        for gpa, data in guest.memory.contents():
            found[gpa : gpa + len(data)] = data
        assert found == guest.model


TestRam = RamMachine.TestCase
TestRam.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ram_at_length() -> None:
    class Long(RamMachine.TestCase):  # type: ignore[misc, name-defined]
        settings = settings(max_examples=1500, stateful_step_count=60, deadline=None)

    Long("runTest").runTest()


def mappings() -> int:
    """How many this process has of forked RAM."""
    return len(re.findall("memfd:avmm-(?:ram|layer)", Path("/proc/self/maps").read_text()))


def held_in_layers(memory: GuestMemory) -> int:
    """Bytes that the layers take in memory."""
    return sum(512 * os.fstat(layer.fd).st_blocks for layer in memory._layers._all)


def test_a_fork_copies_what_was_written_since_the_one_before() -> None:
    memory = GuestMemory(4096 * PAGE)
    memory.fork().close()
    memory.write(0, b"a" * 2048 * PAGE)
    twins = [memory.fork()]
    assert held_in_layers(memory) == 2048 * PAGE
    for turn in range(5):
        memory.write(2 * turn * PAGE, b"b" * PAGE)
        twins.append(memory.fork())
        assert held_in_layers(memory) == 2048 * PAGE
        assert own(twins[-1]) == own(memory) == turn + 1, "what is little is copied each time"
    assert [twin.read(4 * PAGE, 1) for twin in twins] == [b"a", b"a", b"a", b"b", b"b", b"b"]
    memory.write(3000 * PAGE, b"c" * 64 * PAGE)
    twins.append(memory.fork())
    assert held_in_layers(memory) == (2048 + 64) * PAGE
    assert held_in_layers(twins[0]) == 2048 * PAGE
    memory.write(0, b"d" * 4096 * PAGE)
    twins.append(memory.fork())
    assert len(memory._layers._all) == 1, "it takes in what it covers"
    assert own(memory) == own(twins[-1]) == 0
    for twin in [memory, *twins]:
        twin.close()


def test_much_that_is_scattered_is_copied_once() -> None:
    memory = GuestMemory(4096 * PAGE)
    memory.write(0, b"a" * memory.size)
    memory.fork().close()
    model = bytearray(b"a" * 4096)
    for page in range(0, 4096, 2):
        memory.write(page * PAGE, b"b")
        model[page] = ord("b")
    twins = [memory.fork(), memory.fork()]
    assert own(memory) == own(twins[0]) == own(twins[1]) == 0
    assert not memory._layers._all
    memory.write(0, b"c")
    assert all(bytes(twin.whole[::PAGE]) == model for twin in twins)
    for each in [memory, *twins]:
        each.close()


def test_forks_in_several_threads_at_once() -> None:
    """And who asks meanwhile where pages are is told of all."""
    memory = GuestMemory(2048 * PAGE)
    memory.fork().close()
    files = len(list(Path("/proc/self/fd").iterdir()))
    for turn in range(1, 30):
        for run in range(20):
            memory.write((turn + 100 * run) * PAGE, bytes([turn]) * 40 * PAGE)
        model = bytes(memory.whole)
        with ThreadPoolExecutor(4) as pool:
            forking = [pool.submit(memory.fork) for _ in range(4)]
            while not all(each.done() for each in forking):
                assert len(memory.populated()) >= 20 * 40
            twins = [each.result() for each in forking]
        assert all(twin.whole == model for twin in [memory, *twins])
        for twin in twins:
            twin.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == files + len(memory._layers._all)
    memory.close()


def own(memory: GuestMemory) -> int:
    found = Bitmap(memory.size // PAGE)
    own_pages(memory.whole, found)
    return len(found)


def test_who_asks_where_pages_are_waits_for_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-way they are in a layer already, and their own file's still."""
    memory = GuestMemory(SIZE)
    memory.fork().close()
    memory.write(0, b"a" * 64 * PAGE)
    finish = layers_module._map

    def half_way(ram: memoryview, layer: Any) -> None:
        asked.append(pool.submit(memory.populated))
        with pytest.raises(TimeoutError):
            asked[-1].result(0.05)
        finish(ram, layer)

    asked: list[Future[Bitmap]] = []
    monkeypatch.setattr(layers_module, "_map", half_way)
    with ThreadPoolExecutor(1) as pool, closing(memory.fork()):
        assert members(asked[0].result()) >= set(range(64))
    memory.close()


def test_zero_pages_take_no_room_where_they_arrive() -> None:
    with shared(b"x" * 8 * PAGE) as (ram, fd):
        runs = struct.pack("<QII", 2, 4, 0)
        assert unpack(ram, fd, memoryview(runs), memoryview(b""))
        assert os.fstat(fd).st_blocks * 512 == 4 * PAGE  # before it is read
        assert bytes(ram) == b"x" * 2 * PAGE + bytes(4 * PAGE) + b"x" * 2 * PAGE


def test_layers_are_few_and_their_mappings_too() -> None:
    pages = 1 << 14
    memory = GuestMemory(pages * PAGE)
    memory.fork().close()
    before, model = mappings(), bytearray(pages)
    chances = random.Random(1)
    for turn in range(100):
        for _ in range(chances.choice([1, 20, 200])):
            count = chances.choice([1, 1, 40, 40, 400])
            page = chances.randrange(pages - count)
            for at in range(page, page + count):
                model[at] = turn + 1
                memory.write(at * PAGE, bytes([turn + 1]))
        with closing(memory.fork()) as twin:
            assert bytes(twin.whole[::PAGE]) == model
        assert own(memory) * 4 <= len(memory.populated())
        assert len(memory._layers._all) <= 14
        assert mappings() - before <= 2 * layers_module._RUNS
    assert bytes(memory.whole[::PAGE]) == model
    memory.close()


def test_a_host_without_room_leaves_the_guest_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    memory = GuestMemory(SIZE)
    memory.fork().close()
    memory.write(0, b"a" * SIZE)
    files = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails)
        with pytest.raises(OSError, match="No space left"):
            memory.fork()
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    with closing(memory.fork()) as twin:
        assert twin.read(0, SIZE) == memory.read(0, SIZE) == b"a" * SIZE
    memory.close()


# -- the parts -----------------------------------------------------------------------------

SETS = st.sets(st.integers(0, PAGES - 1))


def bitmap(pages: set[int], size: int = PAGES) -> Bitmap:
    result = Bitmap(size)
    for page in pages:
        result.mark(page * PAGE, 1)
    return result


def members(found: Bitmap) -> set[int]:
    return {page for start, end in found.runs() for page in range(start, end)}


@given(SETS, SETS)
def test_a_bitmap_is_a_set(one: set[int], other: set[int]) -> None:
    a, b = bitmap(one), bitmap(other)
    assert members(a) == one
    assert len(a) == len(one)
    assert all(end == PAGES or end not in one for _, end in a.runs())  # runs are whole
    a.move_into(b)
    assert (members(a), members(b)) == (set(), one | other)
    whole = Bitmap(64 + PAGES)
    whole.add(b, 64)
    assert members(whole) == {64 + page for page in one | other}


@given(st.integers(0, SIZE - 1), st.integers(0, 3 * PAGE))
def test_a_mark_is_of_every_page_that_it_touches(at: int, length: int) -> None:
    length = min(length, SIZE - at)
    found = Bitmap(PAGES)
    found.mark(at, length)
    assert members(found) == {byte // PAGE for byte in range(at, at + length)}


RUNS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 3))
NEAR = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2))


@given(st.lists(NEAR | RUNS, max_size=5), st.integers(0, 6), st.binary(max_size=1))
def test_hostile_runs_write_all_that_they_tell_or_nothing(
    runs: list[tuple[int, int, int]], pages: int, odd: bytes
) -> None:
    model = bytearray(b"\xee" * (8 * PAGE))
    data = b"".join(bytes([page + 1]) * PAGE for page in range(pages))
    good = all(kind < 2 and count and page + count <= 8 for page, count, kind in runs)
    good = good and sum(count for _, count, kind in runs if kind == 1) == pages and not odd
    packed = b"".join(struct.pack("<QII", *run) for run in runs)
    with shared(model) as (ram, fd):
        assert unpack(ram, fd, memoryview(packed), memoryview(data + odd)) is good
        found = bytes(ram)
    if good:
        rest = data
        for page, count, kind in runs:
            length = count * PAGE
            part, rest = (rest[:length], rest[length:]) if kind else (bytes(length), rest)
            model[page * PAGE : page * PAGE + length] = part
    assert found == model


def test_half_a_run_is_none() -> None:
    with shared(bytes(PAGE)) as (ram, fd):
        assert not unpack(ram, fd, memoryview(bytes(RUN_BYTES - 1)), memoryview(b""))


def test_without_copies_there_are_runs_only() -> None:
    ram = bytearray(b"\1" * PAGE + bytes(PAGE) + b"\2" * PAGE)
    packer = Packer(memoryview(ram), copies=False)
    packed = packer.next(bitmap({0, 1, 2}, 3))
    assert packed is not None
    assert list(packed.each()) == [(0, 1, True), (1, 1, False), (2, 1, True)]
    assert packed.pages == 0


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Iterator[GuestMemory]:
    """RAM on both sides of the hole, of which hardly any is there."""
    monkeypatch.setattr(memory_module, "check_size", lambda size: size)
    memory = GuestMemory(HOLE_START + 64 * PAGE, layout=RAM)
    yield memory
    memory.close()


def test_pages_above_the_hole_are_counted_on(large: GuestMemory) -> None:
    below = HOLE_START // PAGE
    large.write(HOLE_START - 1, b"a")
    large.log()
    assert members(large.populated()) == {below - 1}
    large.write(HOLE_END + PAGE, b"b")
    large.discard(HOLE_END + 7 * PAGE, PAGE)
    large.mark(HOLE_START, PAGE)  # the hole is no RAM
    found = Bitmap(large.size // PAGE)
    large.take_dirty(found)
    assert members(found) == {below + 1, below + 7}
    assert list(large.contents())[1:] == [(HOLE_END + PAGE, b"b".ljust(PAGE, b"\0"))]


def test_the_host_logs_only_while_it_is_asked_to() -> None:
    memory, found = GuestMemory(4 * PAGE), Bitmap(4)
    memory.write(0, b"a")
    memory.log()
    memory.write(PAGE, b"b")
    memory.unlog()
    memory.log()
    memory.take_dirty(found)
    assert members(found) == set()
    memory.close()


def test_pages_that_are_holes_in_the_file_are_populated_once_they_are_written(
    tmp_path: Path,
) -> None:
    path = tmp_path / "base"
    path.write_bytes(bytes(3 * PAGE) + b"a" * PAGE)
    os.truncate(path, 64 * PAGE)
    with path.open("rb") as file:
        memory = GuestMemory(8 * PAGE, base=(file.fileno(), 2 * PAGE))
    before = members(memory.populated())
    assert 1 in before
    assert 7 not in before
    memory.write(7 * PAGE, b"b")
    assert members(memory.populated()) == before | {7}
    memory.discard(7 * PAGE, PAGE)
    assert members(memory.populated()) == before
    memory.close()
