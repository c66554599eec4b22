"""The software engine and KVM do the same: random streams of instructions, and the bundled guests.

Streams (tests/soft/streams.py) run in ring 3 of a guest (tests/soft/twins.py) on both engines, and
where KVM runs ring 0 as a CPU does, in ring 0. Registers, flags, memory, and a fault's vector,
error code and address must be the same afterwards. Here the other processor is this host's; in the
lab it is what QEMU emulates, behind a stock KVM.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from lab.plugin import KIND
from support.assembler import assemble

from avmm import arch, engine
from avmm.arch.x86_64.kvm import X86System
from avmm.engine import EngineUnavailable
from avmm.kvm import KvmUnavailable
from tests.soft import streams
from tests.soft.streams import READ_ONLY
from tests.soft.twins import CODE, Twin, compared

pytestmark = pytest.mark.lab(also="stock")

IN_LAB = KIND in os.environ
FEW, MANY = (150, 3000) if IN_LAB else (6000, int(os.environ.get("AVMM_STREAMS", "40000")))
SHOWN = 20


@pytest.fixture(scope="module")
def systems() -> Iterator[tuple[X86System, X86System]]:
    kind = arch.host()
    try:
        real = kind.open_system()
    except KvmUnavailable as error:
        pytest.skip(str(error))
    try:
        soft = engine.software(kind)
    except EngineUnavailable as error:
        pytest.skip(str(error))
    assert isinstance(real, X86System)
    assert isinstance(soft, X86System)
    yield soft, real
    real.close()
    soft.close()


def options(real: X86System, ring: int) -> streams.Options:
    without = {"bmi"}
    if not arch.host().runs_kernels(real):
        without.add("interpreter")
        if ring == 0:
            pytest.skip("this host's KVM interprets ring 0")
    if IN_LAB:
        without.add("emulated")
    return streams.Options(ring, frozenset(without))


def compare(systems: tuple[X86System, X86System], ring: int, seeds: range) -> None:
    soft, real = systems
    chosen = options(real, ring)
    one, other = Twin(soft), Twin(real)
    try:
        found = compared(one, other, seeds, chosen)
    finally:
        one.close()
        other.close()
    assert not found, f"{len(found)} of {len(seeds)} (engine, KVM):\n" + "\n".join(found[:SHOWN])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ring", [3, 0])
def test_streams_of_instructions(systems: tuple[X86System, X86System], ring: int) -> None:
    compare(systems, ring, range(FEW))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ring", [3, 0])
def test_many_streams_of_instructions(systems: tuple[X86System, X86System], ring: int) -> None:
    compare(systems, ring, range(1_000_000, 1_000_000 + MANY))


PAGE = READ_ONLY
USER, WRITABLE, PRESENT, NX = 4, 2, 1, 1 << 63
SMEP, SMAP = 1 << 20, 1 << 21
READ, WRITE, FETCH = f"mov eax, [{PAGE}]", f"mov [{PAGE}], eax", f"mov eax, {PAGE}; jmp rax"
WRONGLY = "mov rax, 0x8000000000; "


@pytest.mark.parametrize(
    ("ring", "entry", "cr4", "source", "error"),
    [
        (3, 0, 0, READ, 4), (3, 0, 0, WRITE, 6), (3, 0, 0, FETCH, 0x14),
        (3, PRESENT | USER, 0, WRITE, 7), (3, PRESENT | WRITABLE, 0, READ, 5),
        (3, PRESENT | WRITABLE, 0, WRITE, 7), (3, PRESENT | WRITABLE, 0, FETCH, 0x15),
        (3, PRESENT | USER | NX, 0, FETCH, 0x15), (3, PRESENT | USER | NX, 0, READ, None),
        (3, 0, 0, WRONGLY + "mov ecx, [rax]", 0xD), (3, 0, 0, WRONGLY + "mov [rax], ecx", 0xF),
        (3, 0, 0, WRONGLY + "jmp rax", 0x1D),
        (0, 0, 0, READ, 0), (0, 0, 0, WRITE, 2), (0, 0, 0, FETCH, 0x10),
        (0, PRESENT, 0, WRITE, 3), (0, PRESENT | NX, 0, FETCH, 0x11),
        (0, PRESENT | USER, SMAP, READ, 1), (0, PRESENT | USER, SMAP, "stac; " + READ, None),
        (0, PRESENT | USER, SMEP, FETCH, 0x11), (0, PRESENT, SMEP | SMAP, READ, None),
    ],
)  # fmt: skip
def test_page_faults(
    systems: tuple[X86System, X86System],
    ring: int,
    entry: int,
    cr4: int,
    source: str,
    error: int | None,
) -> None:
    """The error codes of Intel's SDM, volume 3A, 4.7, on both."""
    options(systems[1], ring)
    is_wild = source.startswith(WRONGLY)
    if is_wild and IN_LAB:
        pytest.skip("QEMU 7.2 calls a page with a wrong entry absent")
    results = []
    for system in systems:
        twin = Twin(system)
        twin.map(PAGE, entry and PAGE | entry)
        twin.map_wrongly()
        if cr4:
            twin.set_cr4(cr4)
        stream = streams.Stream(0, ring, CODE, regs=[0] * 16)
        stream.code += assemble(source, origin=CODE) + b"\x0f\x0b"
        twin.load(0, stream)
        result = twin.run(stream)
        results.append((result.vector, result.error, result.cr2))
        twin.close()
    address = 0x80_0000_0000 if is_wild else PAGE
    expected = (6, -1, 0) if error is None else (14, error, address)
    assert results == [expected, expected]
