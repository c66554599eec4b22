"""Whatever bytes a guest executes, in ring 3 or ring 0: its run ends, or can be stopped, and the
process goes on. A fault of the library's here ends the process that runs this test."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator

import pytest

from avmm import arch, engine
from avmm.arch.x86_64.kvm import X86System
from avmm.engine import EngineUnavailable
from tests.soft import streams
from tests.soft.bare import kicked_by
from tests.soft.twins import CODE, MOST, STEP, Twin, UnexpectedExit

LENGTH, SECONDS = 60, 0.05
BEGINNINGS = (
    b"\x0f", b"\x66\x0f", b"\xf3\x0f", b"\xf2\x0f", b"\x0f\x38", b"\x66\x0f\x38", b"\x0f\x3a",
    b"\x66\x0f\x3a", b"\x0f\x01", b"\x0f\x00", b"\x0f\xae", b"\x0f\xc7",
)  # fmt: skip
PREFIXES = (
    b"\xc4",
    b"\xc5",
    b"\x62",
    b"\xf0",
    b"\x64",
    b"\x65",
    b"\x67",
    b"\x66",
    b"\xf2",
    b"\xf3",
)


@pytest.fixture
def system() -> Iterator[X86System]:
    """The software engine, and SIGALRM stops its guests."""
    try:
        found = engine.software(arch.host())
    except EngineUnavailable as error:
        pytest.skip(str(error))
    assert isinstance(found, X86System)
    with kicked_by(signal.SIGALRM):
        yield found
        signal.setitimer(signal.ITIMER_REAL, 0)
    found.close()


def some_code(rng: random.Random) -> bytes:
    """Bytes among which there are many instructions, some with [r14 + n] or [rsi + n]."""
    code = bytearray()
    while len(code) < LENGTH:
        kind = rng.random()
        if kind < 0.3:
            code += rng.choice(BEGINNINGS)
        elif kind < 0.4:
            code.append(0xD8 + rng.randrange(8))
        elif kind < 0.45:
            code.append(0x40 + rng.randrange(16))
        elif kind < 0.48:
            code += rng.choice(PREFIXES)
        code += rng.randbytes(rng.randrange(1, 4))
        if rng.random() < 0.5:
            code += bytes([0x46 | rng.randrange(8) << 3, rng.randrange(128)])
    return bytes(code)


def execute(system: X86System, ring: int, seeds: range) -> None:
    twin, ended = Twin(system), 0
    for number, seed in enumerate(seeds):
        place = number % MOST
        if ring == 0 and place == 0 and number:  # it may have written anywhere
            twin.close()
            twin = Twin(system)
        stream = streams.make(seed, CODE + STEP * place, streams.Options(ring))
        stream.code[:] = some_code(random.Random(seed)) + b"\x0f\x0b"
        twin.load(place, stream)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            twin.run(stream)
            ended += 1
        except UnexpectedExit:  # stopped, or HLT, or an access to a device
            twin.close()
            twin = Twin(system)
        signal.setitimer(signal.ITIMER_REAL, 0)
    twin.close()
    assert ended > len(seeds) // 2


@pytest.mark.parametrize("ring", [3, 0])
def test_any_bytes(system: X86System, ring: int) -> None:
    execute(system, ring, range(1000))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ring", [3, 0])
def test_many_bytes(system: X86System, ring: int) -> None:
    execute(system, ring, range(1_000_000, 1_060_000))
