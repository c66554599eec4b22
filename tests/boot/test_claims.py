"""The book of claims, against a model that marks every page."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm.arch.x86_64.boot.assembly import PC
from avmm.boot.claims import Claims, MapEntry, MapKind
from avmm.errors import ImageError
from avmm.memory.layout import Region

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
RAM, RESERVED = MapKind.RAM, MapKind.RESERVED


def claims(size: int = 16 * MIB) -> Claims:
    return Claims([Region(0, size, 0)], PC)


def test_overlap_names_both_and_their_ranges() -> None:
    book = claims()
    book.claim(0x1000, 0x2000, "first")
    with pytest.raises(ImageError) as caught:
        book.claim(0x2FFF, 1, "second")
    assert str(caught.value) == "second at 0x2fff-0x3000 overlaps first at 0x1000-0x3000"
    book.claim(0x3000, 1, "behind")
    book.claim(0xFFF, 1, "before")
    with pytest.raises(ImageError, match=r"around .* overlaps "):
        book.claim(0, 0x10000, "around")


def test_out_of_ram_is_another_message() -> None:
    book = Claims([Region(0, 0x4000, 0), Region(1 << 32, 0x4000, 0x4000)], PC)
    for gpa, size in ((0x3FFF, 2), (0x4000, 1), (1 << 63, 1 << 63), (0, 1 << 33), (-1, 2)):
        with pytest.raises(ImageError, match=r"kernel at .* outside guest RAM"):
            book.claim(gpa, size, "kernel")
    with pytest.raises(ImageError, match=r"\(0x0-0x4000, 0x100000000-0x100004000\)"):
        book.claim(0x3FFF, 2, "kernel")
    book.claim(0, 0x4000, "low")
    book.claim(1 << 32, 0x4000, "high")


def test_empty_claim_takes_nothing() -> None:
    book = claims()
    book.claim(0x1000, 0x1000, "one")
    book.claim(0x1800, 0, "empty")
    book.claim(1 << 60, 0, "empty")


def test_map_of_a_plain_pc() -> None:
    book = Claims([Region(0, 3 << 30, 0), Region(4 << 30, 1 << 30, 3 << 30)], PC)
    book.claim(0x9_0000, 0x6000, "info", reserved=True)
    book.claim(0x9_6000, 0x1000, "command line", reserved=True)
    book.claim(0xF_0000, 0x200, "MP table", reserved=True)
    book.claim(0x10_0000, 0x1000, "kernel")
    assert book.memory_map() == [
        MapEntry(0, 0x9_0000, RAM),
        MapEntry(0x9_0000, 0x7000, RESERVED),
        MapEntry(0x9_7000, 0x8C00, RAM),
        MapEntry(0x9_FC00, 0x400, RESERVED),
        MapEntry(0xF_0000, 0x1_0000, RESERVED),
        MapEntry(0x10_0000, (3 << 30) - 0x10_0000, RAM),
        MapEntry(0xFFFB_C000, 0x4000, RESERVED),
        MapEntry(4 << 30, 1 << 30, RAM),
    ]


def test_map_of_little_ram() -> None:
    entries = claims(0x8000).memory_map()
    assert [e for e in entries if e.kind is RAM] == [MapEntry(0, 0x8000, RAM)]


def test_place_goes_to_the_top_and_stays_below_the_limit() -> None:
    book = Claims([Region(0, 3 << 30, 0), Region(4 << 30, 1 << 30, 3 << 30)], PC)
    assert book.place(1, "a") == 0xBFFF_F000
    assert book.place(0x1001, "b") == 0xBFFF_D000
    book.claim(0xBFF0_0000, 0x1001, "in the way")
    assert book.place(0xB_C000, "fits below b exactly") == 0xBFF4_1000
    assert book.place(0x3_F000, "fits on what is in the way exactly") == 0xBFF0_2000
    assert book.place(0x1000, "c") == 0xBFEF_F000
    assert book.place(0x2000, "d", limit=0x200_0000) == 0x1FF_E000


def test_no_room_says_what_there_is() -> None:
    book = claims()
    book.claim(4 * MIB, 1, "kernel")
    with pytest.raises(ImageError) as caught:
        book.place(12 * MIB, "initrd.img")
    assert str(caught.value) == (
        f"initrd.img has {12 * MIB} bytes, for which there is no room in guest RAM below "
        f"0xc0000000: the biggest free range has {12 * MIB - 4096} bytes"
    )
    with pytest.raises(ImageError, match="biggest free range has 0 bytes"):
        claims(64 << 10).place(1, "initrd.img")


PAGE = 4096
PAGES = 512
spans = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 40), st.booleans())


@given(st.lists(spans, max_size=30), st.integers(1, 300))
def test_against_a_model_by_pages(wanted: list[tuple[int, int, bool]], room: int) -> None:
    book = claims(PAGES * PAGE)
    owner: list[int | None] = [None] * PAGES
    told = [True] * PAGES  # as RAM
    for number, (first, count, reserved) in enumerate(wanted):
        pages = range(first, first + count)
        fits = pages.stop <= PAGES and all(owner[page] is None for page in pages)
        if fits:
            book.claim(first * PAGE, count * PAGE, f"{number}", reserved=reserved)
            for page in pages:
                owner[page], told[page] = number, not reserved
        else:
            with pytest.raises(ImageError, match=f"^{number} at "):
                book.claim(first * PAGE, count * PAGE, f"{number}", reserved=reserved)
    free = [
        page
        for page in range(256, PAGES - room + 1)
        if all(other is None for other in owner[page : page + room])
    ]
    if free:
        assert book.place(room * PAGE, "room") == free[-1] * PAGE
    else:
        with pytest.raises(ImageError, match="there is no room"):
            book.place(room * PAGE, "room")

    entries = book.memory_map()
    for left, right in itertools.pairwise(entries):
        assert left.end < right.gpa or (left.end == right.gpa and left.kind != right.kind)
    low = [e for e in entries if e.gpa < PAGES * PAGE]
    for page in range(PAGES):
        kinds = {e.kind for e in low if e.gpa <= page * PAGE < e.end}
        if page < 0x9F or page >= 0x100:
            assert kinds == {RAM if told[page] else RESERVED}
        elif page >= 0xA0:
            assert RAM not in kinds
