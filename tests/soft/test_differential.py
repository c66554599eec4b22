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

from avmm import arch, engine
from avmm.arch.x86_64.kvm import X86System
from avmm.engine import EngineUnavailable
from avmm.kvm import KvmUnavailable
from tests.soft import streams
from tests.soft.twins import Twin, compared

pytestmark = pytest.mark.lab(also="stock")

IN_LAB = KIND in os.environ
FEW, MANY = (150, 3000) if IN_LAB else (6000, 150_000)
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
