"""Static PIEs: where they are loaded, that they are relocated, and what is refused."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.images import Elf, Segment, multiboot_header, pvh_note

import avmm
from avmm.arch.x86_64.boot.load import load
from avmm.errors import ImageError
from avmm.memory.ram import GuestMemory

pytestmark = pytest.mark.timeout(60)
Write = Callable[..., Path]

ET_DYN, PT_DYNAMIC, PT_NOTE = 3, 2, 4
RELA, RELASZ, REL, RELSZ, RELR, RELRSZ, NEEDED, PLTRELSZ = 7, 8, 17, 18, 36, 35, 1, 2
RELATIVE = 8

SOURCE = """
typedef unsigned long u64;
static const char *const words[] = {"one", "two", "three"};
static const char *const *volatile table = words;
int volatile zero;

__attribute__((used, noreturn)) void _start(void)
{
    int status = 0;
    for (int at = 0; at < 3; at++)
        for (const char *c = table[at]; *c; c++)
            status += *c;
    status = (status & 0x7f) + zero;
    __asm__ volatile("outl %0, %1" : : "a"(status), "Nd"((unsigned short)0xf8));
    for (;;)
        __asm__ volatile("hlt");
}
"""
STATUS = sum(b"onetwothree") & 0x7F


def image(
    dynamic: dict[int, int],
    tables: bytes = b"",
    *,
    start: int = 0,
    bits: int = 64,
    **fields: object,
) -> Elf:
    """Code that is linked to `start`, `tables` at `start` + 0x1000, and the dynamic section."""
    form = "<qQ" if bits == 64 else "<iI"
    section = b"".join(struct.pack(form, *entry) for entry in [*dynamic.items(), (0, 0)])
    segments = [
        Segment(b"\xf4" * 64, start, memsz=0x100),
        Segment(tables, start + 0x1000, memsz=max(len(tables), 8)),
        Segment(section, start + 0x3000, kind=PT_DYNAMIC),
        Segment(section, start + 0x3000),
    ]
    settings: dict[str, object] = {"entry": start + 0x10, **fields}
    return Elf(segments, kind=ET_DYN, bits=bits, **settings)  # type: ignore[arg-type]


def rela(*entries: tuple[int, int], kind: int = RELATIVE) -> bytes:
    return b"".join(struct.pack("<QQq", place, kind, addend) for place, addend in entries)


def with_rela(*entries: tuple[int, int], start: int = 0, kind: int = RELATIVE) -> Elf:
    data = rela(*entries, kind=kind)
    return image({RELA: start + 0x1000, RELASZ: len(data)}, data, start=start)


def number(memory: GuestMemory, at: int, size: int = 8) -> int:
    return int.from_bytes(memory.read(at, size), "little")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def build(*flags: str) -> Path:
        folder = tmp_path_factory.mktemp("pie")
        (folder / "guest.c").write_text(SOURCE)
        # fmt: off
        subprocess.run(
            ["gcc", "-O1", "-ffreestanding", "-nostdlib", "-static-pie", "-fpie", "-mno-sse",
             "-fno-stack-protector", "-Wl,--build-id=none", "-Wl,-z,noexecstack", *flags,
             "-o", folder / "guest", folder / "guest.c"],
            check=True,
        )
        # fmt: on
        return folder / "guest"

    return build


@pytest.mark.usefixtures("kvm", "nothing_left")
@pytest.mark.parametrize(
    "flags",
    [(), ("-Wl,-z,max-page-size=0x200000",), ("-Wl,-z,pack-relative-relocs",)],
    ids=["at 0", "2 MiB pages", "compact relocations"],
)
async def test_what_a_compiler_makes_runs(
    compiled: Callable[..., Path], flags: tuple[str]
) -> None:
    path = compiled(*flags)
    assert path.read_bytes()[16] == ET_DYN
    async with avmm.Machine(kernel=path, memory="16M") as vm:
        assert (await vm.wait()).status == STATUS


def test_an_image_at_0_is_moved_to_1_mib(memory: GuestMemory, write: Write) -> None:
    entry = load(memory, write(with_rela((0x20, 0x1234), (0x28, -8))))
    assert entry.ip == 0x100010
    assert memory.read(0x100000, 0x20) == b"\xf4" * 0x20
    assert number(memory, 0x100020) == 0x101234
    assert number(memory, 0x100028) == 0xFFFF8


def test_a_relocation_of_type_none_changes_nothing(memory: GuestMemory, write: Write) -> None:
    load(memory, write(with_rela((0x20, 0x1234), kind=0)))
    assert memory.read(0x100020, 8) == b"\xf4" * 8


def test_an_image_stays_where_it_is_linked_to(memory: GuestMemory, write: Write) -> None:
    entry = load(memory, write(with_rela((0x200020, 0x201234), start=0x200000)))
    assert entry.ip == 0x200010
    assert number(memory, 0x200020) == 0x201234


def test_one_that_is_linked_above_ram_is_moved(memory: GuestMemory, write: Write) -> None:
    start = 0x4000_0000
    entry = load(memory, write(with_rela((start + 0x20, start + 0x1234), start=start)))
    assert entry.ip == 0x100010
    assert number(memory, 0x100020) == 0x101234


def test_relocations_without_addends_and_compact_ones(memory: GuestMemory, write: Write) -> None:
    cells = [0x1800 + 8 * at for at in range(140)]
    data = struct.pack("<QQ", cells[0], RELATIVE)
    # An address, the word behind it, and the one after 63 more.
    compact = struct.pack("<QQQ", cells[1], 1 | 1 << 1, 1 | 1 << 2)
    tables = (data + compact).ljust(0x800, b"\0") + struct.pack("<Q", 7) * len(cells)
    dynamic = {REL: 0x1000, RELSZ: len(data), RELR: 0x1000 + len(data), RELRSZ: len(compact)}
    load(memory, write(image(dynamic, tables)))
    changed = [at for at, cell in enumerate(cells) if number(memory, 0x100000 + cell) != 7]
    assert changed == [0, 1, 2, 2 + 63 + 1]
    assert number(memory, 0x100000 + cells[0]) == 0x100007


def test_a_32_bit_multiboot_image(memory: GuestMemory, write: Write) -> None:
    data = struct.pack("<II", 0x20, RELATIVE)
    made = image({REL: 0x1000, RELSZ: len(data)}, data, bits=32)
    made.segments[0].data = multiboot_header().ljust(0x20, b"\0") + struct.pack("<I", 0x55)
    entry = load(memory, write(made))
    assert entry.ip == 0x100010
    assert number(memory, 0x100020, 4) == 0x100055


def test_a_pvh_note_moves_with_the_image(memory: GuestMemory, write: Write) -> None:
    made = with_rela()
    made.segments.append(Segment(pvh_note(0x18), kind=PT_NOTE))
    assert load(memory, write(made)).ip == 0x100018


BAD = {
    "a type": (with_rela((0x20, 0), kind=6), "has a relocation of type 6 at 0x20"),
    "below": (with_rela((-8 & (1 << 64) - 1, 0)), "has a relocation at 0xfffffffffffffff8, 8 by"),
    "behind": (with_rela((0xFC, 0)), "has a relocation at 0xfc, 8 bytes, which are not within"),
    "avmm's own": (with_rela((0x90000 - 0x100000 & (1 << 64) - 1, 0)), "not within one of its"),
    "no table": (image({RELA: 0x5000, RELASZ: 24}), "has a table of relocations at 0x5000, 24"),
    "huge": (image({RELA: 0x1000, RELASZ: 24 << 40}), "has a table of relocations at 0x1000"),
    "odd": (image({RELA: 0, RELASZ: 25}), "table of relocations of 25 bytes; expected a multiple"),
    "needed": (image({NEEDED: 1}), "is a shared library"),
    "plt": (image({PLTRELSZ: 24}), "has a procedure linkage table"),
    "no entry": (image({}, entry=0), "is a shared library"),
    "differ": (
        Elf([Segment(b"\xf4", 0, vaddr=0xFFFF_FFFF_8000_0000)], kind=ET_DYN, entry=1),
        "its virtual and physical addresses differ",
    ),
    "alignment": (Elf([Segment(b"\xf4", 0, align=3 << 12)], kind=ET_DYN, entry=1), "power of two"),
    "large alignment": (Elf([Segment(b"\xf4", 0, align=1 << 40)], kind=ET_DYN, entry=1), "power"),
    "no room": (image({}, b"", start=0, entry=1 << 40), "has its entry point at"),
}


@pytest.mark.parametrize(("elf", "text"), BAD.values(), ids=BAD)
def test_what_is_refused(memory: GuestMemory, write: Write, elf: Elf, text: str) -> None:
    path = write(elf)
    with pytest.raises(ImageError) as caught:
        load(memory, path)
    assert str(path) in str(caught.value)
    assert text in str(caught.value)


@given(
    tags=st.dictionaries(
        st.sampled_from([RELA, RELASZ, REL, RELSZ, RELR, RELRSZ]),
        st.integers(0, 0x1100) | st.integers(0, (1 << 64) - 1),
    ),
    tables=st.binary(max_size=96),
    start=st.sampled_from([0, 0x200000, 1 << 40]),
)
def test_hostile_tables_change_nothing_but_the_image(
    tmp_path_factory: pytest.TempPathFactory, tags: dict[int, int], tables: bytes, start: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile-pie"
    path.write_bytes(bytes(image(tags, tables, start=start)))
    memory = GuestMemory("4M")
    try:
        load(memory, path)
    except ImageError as error:
        assert str(path) in str(error)
    finally:
        memory.close()
