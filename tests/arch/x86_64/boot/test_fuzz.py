"""Hostile images: `load` loads them or raises a `ConfigError`, in little time and memory."""

from __future__ import annotations

import gzip
import itertools
import resource
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.images import BzImage, Elf, Segment, multiboot_elf, multiboot_header, note, pvh_elf

from avmm.arch.x86_64.boot.load import load
from avmm.boot import Entry
from avmm.errors import ConfigError, ImageError
from avmm.memory.ram import GuestMemory

pytestmark = pytest.mark.timeout(120)
SECONDS = 5
"""More than any small image may take, on a busy machine too."""
MEMORY = 512 << 20
"""More bytes of address space than one may take: unpacked, an image may have 256 MiB here."""
fuzz = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Try = Callable[[bytes], Entry | None]


@pytest.fixture
def attempt() -> Iterator[Try]:
    """Load the bytes into 2 MiB of RAM; the entry, or None where they were refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"

        def attempt(data: bytes) -> Entry | None:
            path.write_bytes(data)
            memory = GuestMemory("2M")
            start = time.process_time()
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
            try:
                return load(memory, path, cmdline="x", cpus=2)
            except ImageError as error:
                assert str(path) in str(error)
                return None
            except ConfigError:
                return None
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
                memory.close()
                assert time.process_time() - start < SECONDS

        yield attempt


KRUNFW = """
__attribute__((aligned(4096))) char KERNEL_BUNDLE[4096] = "K";
char *krunfw_get_kernel(unsigned long *address, unsigned long *entry, unsigned long *size)
{ *address = 0x100000; *entry = 0x100010; *size = 4096; return KERNEL_BUNDLE; }
"""


def krunfw() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "libkrunfw.so")
        command = ["cc", "-shared", "-fPIC", "-O1", "-nostdlib", "-s", "-x", "c", "-", "-o", made]
        subprocess.run(command, input=KRUNFW, text=True, check=True)
        return made.read_bytes()


def endless_names(count: int) -> bytes:
    """A shared object with so many symbols, none of whose names comes to an end."""
    names, entry = b"x" * (24 * count), struct.pack("<IBBHQQ", 0, 0x11, 0, 1, 0, 1)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\2\1\1", 3, 62, 1, 0, 0, 64, 0, 64, 56, 0, 64, 3, 0),
    )
    rest = 64 + 3 * 64
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 0, 11, 0, 0, rest, 24 * count, 2, 0, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, rest + 24 * count, len(names), 0, 0, 1, 0)
    return header + sections + entry * count + names


ADDRESSES = multiboot_header(1 << 16, 0x100000, 0x100000, 0, 0, 0x100020)
GOOD = {
    "elf64": bytes(Elf([Segment(b"a" * 64), Segment(b"b" * 64, paddr=0x102000, memsz=256)])),
    "pvh": bytes(pvh_elf()),
    "pvh32": bytes(pvh_elf(bits=32)),
    "multiboot": bytes(multiboot_elf()),
    "addresses": ADDRESSES + b"code" * 10,
    "krunfw": krunfw(),
    "bzimage": bytes(BzImage(gzip.compress(bytes(Elf())), payload_offset=0)),
}

interesting = st.one_of(
    st.sampled_from([0, 1, 2, 4, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 0x10000, 1 << 20, 1 << 31]),
    st.sampled_from([(1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1, (1 << 64) - 4096]),
    st.integers(0, (1 << 64) - 1),
)
patches = st.lists(
    st.tuples(st.integers(0, 700) | st.integers(0, 20_000), st.sampled_from("BHIQ"), interesting),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("kind", GOOD)
def test_unharmed_images_load(attempt: Try, kind: str) -> None:
    assert attempt(GOOD[kind]) is not None


def test_names_without_an_end(attempt: Try) -> None:
    assert attempt(endless_names(1 << 16)) is None


@pytest.mark.parametrize("kind", GOOD)
@fuzz
@given(patches=patches, cut=st.one_of(st.none(), st.integers(1, 400)), packed=st.booleans())
def test_mutated(
    attempt: Try, kind: str, patches: list[tuple[int, str, int]], cut: int | None, packed: bool
) -> None:
    data = bytearray(GOOD[kind])
    for offset, size, value in patches:
        patch = (value & ((1 << 8 * struct.calcsize(size)) - 1)).to_bytes(
            struct.calcsize(size), "little"
        )
        at = offset % len(data)
        data[at : at + len(patch)] = patch[: len(data) - at]
    if packed:
        data = bytearray(gzip.compress(bytes(data), 1))
    attempt(bytes(data[:cut]))


@fuzz
@given(
    prefix=st.sampled_from([b"", b"\x7fELF\2\1\1", b"\x7fELF\1\1\1", b"\x1f\x8b\x08", ADDRESSES]),
    data=st.binary(min_size=1, max_size=600),
)
@example(prefix=b"\x7fELF", data=b"\2")
def test_noise(attempt: Try, prefix: bytes, data: bytes) -> None:
    attempt(prefix + data)


@fuzz
@given(data=st.binary(max_size=200), align=st.sampled_from([0, 1, 4, 8, 3]))
def test_noise_for_notes(attempt: Try, data: bytes, align: int) -> None:
    attempt(bytes(Elf([Segment(b"x" * 16), Segment(data, kind=4, align=align)])))


word = st.integers(0, 1 << 64)
segments = st.lists(
    st.builds(
        Segment,
        data=st.binary(max_size=300),
        paddr=st.one_of(st.integers(0, 2 << 20), st.integers(0, (1 << 32) - 1)),
        vaddr=st.one_of(st.none(), st.integers(0, (1 << 32) - 1)),
        memsz=st.one_of(st.none(), st.integers(0, 1 << 20), st.integers(0, (1 << 32) - 1)),
        flags=st.integers(0, 7),
    ),
    min_size=1,
    max_size=5,
)


@fuzz
@given(segments=segments, chosen=st.integers(0, 4), inside=st.integers(0, 300))
def test_round_trip(segments: list[Segment], chosen: int, inside: int) -> None:
    """What loads lies where its headers say, with zeros behind it, and no two overlap."""
    first = segments[chosen % len(segments)]
    entry = (first.paddr if first.vaddr is None else first.vaddr) + inside
    data = bytes(Elf(segments, entry=entry))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        path.write_bytes(data)
        memory = GuestMemory("2M")
        try:
            load(memory, path)
        except ImageError:
            return
        else:
            ends = []
            for s in segments:
                size = len(s.data) if s.memsz is None else s.memsz
                if size:
                    found = memory.read(s.paddr, size)
                    assert found == s.data + bytes(size - len(s.data))
                    ends.append((s.paddr, s.paddr + size))
            ends.sort()
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
        finally:
            memory.close()


@fuzz
@given(owner=st.binary(max_size=12), kind=st.integers(0, 300), desc=st.binary(max_size=20))
def test_any_note_before_the_right_one(attempt: Try, owner: bytes, kind: int, desc: bytes) -> None:
    right = note(b"Xen\0", 18, (0x100000).to_bytes(8, "little"))
    elf = Elf([Segment(b"x" * 16), Segment(note(owner, kind, desc) + right, kind=4)])
    if (owner.rstrip(b"\0"), kind) != (b"Xen", 18):
        entry = attempt(bytes(elf))
        assert entry is not None
        assert entry.ip == 0x100000
