"""Guest memory: sizes as people write them, where RAM lies, and what may be touched."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.arch.x86_64.layout import HOLE_END, HOLE_START
from avmm.arch.x86_64.layout import RAM as PC_RAM
from avmm.errors import ConfigError, GuestMemoryError
from avmm.memory.layout import Region
from avmm.memory.pages import PAGE
from avmm.memory.ram import GuestMemory

MIB, GIB = 1 << 20, 1 << 30
RAM = 16 * PAGE
ROM = 0xFFFC_0000

EDGES = st.sampled_from([0, PAGE, 4 * PAGE, 8 * PAGE, 9 * PAGE, 1 << 64])
ADDRESSES = st.builds(int.__add__, EDGES, st.integers(-20, 20))

Make = Callable[[int | str], GuestMemory]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes memory, on a host that seems to have 64 GiB of it, and closes it."""
    pages = {"SC_PHYS_PAGES": 64 * GIB // PAGE, "SC_PAGE_SIZE": PAGE}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    made: list[GuestMemory] = []

    def make(size: int | str) -> GuestMemory:
        made.append(GuestMemory(size, layout=PC_RAM))
        return made[-1]

    yield make
    for memory in made:
        memory.close()


@pytest.fixture
def memory(make: Make) -> GuestMemory:
    """16 pages of RAM."""
    return make(RAM)


# -- sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "guess"),
    [
        *((0, ""), (-PAGE, ""), ("0M", "")),
        *((1, "1M"), (64, "64M"), ("64", "64M"), (PAGE + 1, "4097M"), ("1K", "1024M")),
        *(((64 << 10) + 1, "68K"), ("1048577", "1028K"), ((4 << 20) - 1, "4M")),
    ],
)
def test_memory_is_a_positive_number_of_pages(size: int | str, guess: str) -> None:
    """And somebody who forgets the unit is told what he may have meant."""
    with pytest.raises(ConfigError) as caught:
        GuestMemory(size)
    expected = f"memory {size!r}: expected a positive multiple of {PAGE} bytes"
    assert str(caught.value) == expected + (f"; did you mean '{guess}'?" if guess else "")


def test_memory_beyond_the_hosts_own_is_refused(make: Make) -> None:
    assert make("64G").size == 64 * GIB
    with pytest.raises(ConfigError, match="memory of 66560 MiB: this host has 65536 MiB"):
        make("65G")


# -- where RAM lies ------------------------------------------------------------------------


def test_memory_that_ends_below_the_hole_is_one_region(make: Make) -> None:
    assert make("3G").ram == (Region(0, HOLE_START, 0),)


def test_memory_goes_on_above_the_hole(make: Make) -> None:
    memory = make("5G")
    assert memory.size == 5 * GIB
    assert memory.ram == (Region(0, HOLE_START, 0), Region(HOLE_END, 2 * GIB, HOLE_START))


def test_one_page_too_many_goes_above_the_hole(make: Make) -> None:
    assert make(HOLE_START + PAGE).ram[1:] == (Region(HOLE_END, PAGE, HOLE_START),)


def test_regions_are_windows_into_one_file(make: Make) -> None:
    memory = make("5G")
    memory.write(HOLE_START - 2, b"ab")
    memory.write(HOLE_END, b"cd")
    assert os.fstat(memory.fd).st_size == memory.size
    assert os.pread(memory.fd, 4, HOLE_START - 2) == b"abcd"


def test_each_region_comes_with_the_memory_behind_it(make: Make) -> None:
    memory = make("5G")
    memory.write(HOLE_END + 7, b"high")
    memory.add_readonly(ROM, b"rom")
    (low, low_view), (high, high_view), (rom, rom_view) = memory.addresses()
    assert (low, high, rom) == memory.regions
    assert (low_view.nbytes, high_view.nbytes) == (low.size, high.size)
    assert bytes(high_view[7:11]) == b"high"
    assert bytes(rom_view) == b"rom".ljust(PAGE, b"\0")


# -- views, reads, writes ------------------------------------------------------------------


def test_fresh_memory_is_zero(memory: GuestMemory) -> None:
    assert memory.read(0, RAM) == bytes(RAM)


def test_a_view_is_not_a_copy(memory: GuestMemory) -> None:
    view = memory.view(0x1000, 4)
    memory.write(0x1001, b"bc")
    assert bytes(view) == b"\0bc\0"
    view[0] = ord("a")
    assert memory.read(0x1000, 4) == b"abc\0"


def test_a_read_is_a_copy(memory: GuestMemory) -> None:
    before = memory.read(0, 4)
    memory.write(0, b"late")
    assert before == bytes(4)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_writes_take_any_bytes(memory: GuestMemory, kind: Callable[[bytes], bytes]) -> None:
    memory.write(RAM - 3, kind(b"end"))
    assert memory.read(RAM - 3, 3) == b"end"


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (RAM, 1),
        (RAM - 1, 2),
        (0, RAM + 1),
        (-1, 1),
        (-1, 2),
        (-RAM, RAM),
        (8, -1),
        (8, -8),
        (1 << 64, 1),
        ((1 << 64) - 1, 2),
        (0, 1 << 64),
    ],
)
def test_a_range_outside_of_memory_is_refused(memory: GuestMemory, gpa: int, length: int) -> None:
    with pytest.raises(GuestMemoryError, match=f"^{length} bytes at {gpa:#x} are not within"):
        memory.view(gpa, length)


def test_a_write_outside_of_memory_changes_nothing(memory: GuestMemory) -> None:
    with pytest.raises(GuestMemoryError):
        memory.write(RAM - 2, b"xyz")
    assert memory.read(RAM - 2, 2) == b"\0\0"


@pytest.mark.parametrize(
    ("gpa", "length"),
    [(HOLE_START, 1), (HOLE_END - 1, 1), (HOLE_START - 1, 2), (HOLE_END - 1, 2), (0, 4 * GIB + 1)],
)
def test_the_hole_is_not_memory_nor_bridged(make: Make, gpa: int, length: int) -> None:
    with pytest.raises(GuestMemoryError):
        make("5G").view(gpa, length)


def test_the_edges_of_the_hole_are_memory(make: Make) -> None:
    memory = make("5G")
    memory.write(HOLE_START - 1, b"a")
    memory.write(HOLE_END, b"b")
    memory.write(HOLE_END + 2 * GIB - 1, b"c")
    with pytest.raises(GuestMemoryError):
        memory.write(HOLE_END + 2 * GIB, b"d")


@settings(deadline=None)
@given(st.lists(st.tuples(ADDRESSES, st.binary(min_size=1, max_size=20)), max_size=10))
def test_memory_is_as_a_naive_model_of_it(writes: list[tuple[int, bytes]]) -> None:
    memory = GuestMemory(4 * PAGE)
    memory.add_readonly(8 * PAGE, b"rom")
    ram = dict.fromkeys(range(4 * PAGE), 0)
    rom = dict(enumerate(b"rom".ljust(PAGE, b"\0"), 8 * PAGE))
    try:
        for gpa, data in writes:
            addresses = range(gpa, gpa + len(data))
            if ram.keys() >= set(addresses):
                memory.write(gpa, data)
                ram.update(zip(addresses, data, strict=True))
            else:
                with pytest.raises(GuestMemoryError):
                    memory.write(gpa, data)
            if ram.keys() >= set(addresses) or rom.keys() >= set(addresses):
                there = ram | rom
                assert memory.read(gpa, len(data)) == bytes(there[at] for at in addresses)
            else:
                with pytest.raises(GuestMemoryError):
                    memory.read(gpa, len(data))
        assert memory.read(0, 4 * PAGE) == bytes(ram.values())
    finally:
        memory.close()


# -- what memory holds ---------------------------------------------------------------------


def test_untouched_memory_holds_nothing(memory: GuestMemory) -> None:
    assert list(memory.contents()) == []


def test_memory_holds_the_pages_that_were_written(memory: GuestMemory) -> None:
    memory.write(2 * PAGE - 1, b"ab")
    memory.write(RAM - 1, b"c")
    expected = [
        (PAGE, b"a".rjust(PAGE, b"\0") + b"b".ljust(PAGE, b"\0")),
        (RAM - PAGE, b"c".rjust(PAGE, b"\0")),
    ]
    assert list(memory.contents()) == expected


def test_what_memory_holds_is_told_by_region(make: Make) -> None:
    memory = make("5G")
    memory.write(HOLE_START - 1, b"a")
    memory.write(HOLE_END, b"b")
    memory.write(HOLE_END + 2 * GIB - 1, b"c")
    memory.add_readonly(ROM, b"rom")
    assert list(memory.contents()) == [
        (HOLE_START - PAGE, b"a".rjust(PAGE, b"\0")),
        (HOLE_END, b"b".ljust(PAGE, b"\0")),
        (HOLE_END + 2 * GIB - PAGE, b"c".rjust(PAGE, b"\0")),
    ]


# -- read-only regions ---------------------------------------------------------------------


def test_a_readonly_region_is_rounded_up_to_pages(memory: GuestMemory) -> None:
    data = b"x" * (PAGE + 1)
    region = memory.add_readonly(ROM, data)
    assert region == Region(ROM, 2 * PAGE, 0, readonly=True)
    assert memory.read(ROM, 2 * PAGE) == data.ljust(2 * PAGE, b"\0")


def test_a_whole_page_is_not_rounded_up(memory: GuestMemory) -> None:
    assert memory.add_readonly(ROM, bytes(PAGE)).size == PAGE


def test_a_readonly_region_is_a_region_but_not_ram(memory: GuestMemory) -> None:
    region = memory.add_readonly(ROM, b"rom")
    assert memory.regions == (Region(0, RAM, 0), region)
    assert memory.ram == (Region(0, RAM, 0),)


def test_readonly_regions_are_no_part_of_ram(memory: GuestMemory) -> None:
    memory.add_readonly(ROM, b"first")
    memory.add_readonly(ROM + PAGE, b"second")
    assert memory.read(ROM, 5) + memory.read(ROM + PAGE, 6) == b"firstsecond"
    assert os.fstat(memory.fd).st_size == RAM
    assert memory.read(0, RAM) == bytes(RAM)


def test_a_readonly_region_cannot_be_written(memory: GuestMemory) -> None:
    memory.add_readonly(ROM, b"rom")
    with pytest.raises(GuestMemoryError, match="2 bytes at 0xfffc0001 are read-only"):
        memory.write(ROM + 1, b"xx")
    with pytest.raises(TypeError):
        memory.view(ROM, 1)[0] = 0
    assert memory.read(ROM, 3) == b"rom"


@pytest.mark.parametrize("gpa", [0, RAM - PAGE, ROM, ROM + PAGE, ROM - PAGE])
def test_a_readonly_region_that_overlaps_is_refused(memory: GuestMemory, gpa: int) -> None:
    memory.add_readonly(ROM, bytes(2 * PAGE))
    with pytest.raises(ConfigError) as caught:
        memory.add_readonly(gpa, bytes(2 * PAGE))
    other = "0x0-0x10000" if gpa < RAM else "0xfffc0000-0xfffc2000"
    assert str(caught.value) == (
        f"read-only region {gpa:#x}-{gpa + 2 * PAGE:#x} overlaps memory at {other}"
    )
    assert len(memory.regions) == 2


def test_readonly_regions_may_touch(memory: GuestMemory) -> None:
    memory.add_readonly(RAM, b"after RAM")
    memory.add_readonly(RAM + 2 * PAGE, b"further on")
    memory.add_readonly(RAM + PAGE, b"between")
    with pytest.raises(GuestMemoryError):
        memory.view(RAM - 1, 2)


@pytest.mark.parametrize(
    ("gpa", "data"),
    [
        (ROM + 1, b"rom"),
        (ROM, b""),
        (-PAGE, b"rom"),
    ],
)
def test_a_readonly_region_is_aligned_and_filled(
    memory: GuestMemory, gpa: int, data: bytes
) -> None:
    with pytest.raises(ConfigError, match="expected a page-aligned address and some data"):
        memory.add_readonly(gpa, data)
    assert memory.regions == memory.ram


# -- the end -------------------------------------------------------------------------------


def mapped() -> str:
    gc.collect()
    return Path("/proc/self/maps").read_text()


@pytest.mark.usefixtures("nothing_left")
def test_closing_unmaps_and_closes_the_file() -> None:
    memory = GuestMemory(RAM)
    memory.add_readonly(ROM, b"rom")
    assert "avmm-ram" in mapped()
    memory.close()
    assert "avmm-ram" not in mapped()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(memory.fd)


def test_closing_twice_closes_no_strangers_file(memory: GuestMemory) -> None:
    memory.close()
    stranger = os.memfd_create("stranger")
    assert stranger == memory.fd
    memory.close()
    os.close(stranger)


def test_closed_memory_has_no_addresses(memory: GuestMemory) -> None:
    memory.close()
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)
    assert memory.addresses() == []


@pytest.mark.usefixtures("nothing_left")
def test_a_view_that_outlives_its_memory_is_warned_of_and_still_works() -> None:
    memory = GuestMemory(RAM)
    memory.write(0, b"kept")
    view = memory.view(0, 4)
    with pytest.warns(ResourceWarning, match="a view of guest memory outlives its machine") as got:
        memory.close()
    assert got[0].filename == __file__
    assert bytes(view) == b"kept"
    assert "avmm-ram" in mapped()
    del view
    assert "avmm-ram" not in mapped()


def test_the_file_is_closed_even_where_the_warning_is_an_error() -> None:
    memory = GuestMemory(RAM)
    view = memory.view(0, 4)
    try:
        with warnings.catch_warnings(), pytest.raises(ResourceWarning):
            warnings.simplefilter("error")
            memory.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(memory.fd)
    finally:
        view.release()
        with suppress(OSError):
            os.close(memory.fd)


@pytest.mark.usefixtures("nothing_left")
def test_memory_that_cannot_be_had_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, size: int) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OSError, match="no"):
        GuestMemory(RAM)
