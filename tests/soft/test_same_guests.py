"""The bundled guests do the same on the software engine as on KVM: what they say, the accesses
that their devices see, and how they end."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from support import torture

import avmm
from avmm import arch, engine, guests
from avmm.engine import EngineUnavailable
from avmm.kvm import KvmUnavailable

pytestmark = [pytest.mark.lab(also="stock", long=True), pytest.mark.timeout(120)]

PROMPT = b"avmm> "
COMMANDS = (
    "help", "echo one two", "nonsense", "mem", "poke.q 0x300000 0x1122334455667788",
    "peek.b 0x300003", "peek.w 0x300002", "peek.l 0x300001", "peek.q 0x300000", "peek.q 0x300ffd",
    "poke.b 0x300ffe 0x5a", "peek.q 0x300ffd", "sum 0x300000 0x2000", "in.b 0x64",
    "peek 0xfee00030", "out.b 0x80 7", "in.b 0x4ff", "peek.l 0xd0000000",
    "peek.q 0xffffffffffff0000", "poke 0x8000000000000000 1", "cpus",
)  # fmt: skip
"""What the shell answers does not depend on time, but for the time that it took."""
EXITS = (
    "kind=pio op=write width=1", "kind=pio op=read width=2", "kind=pio op=read width=4 ring=3",
    "kind=pio op=write width=4 ring=3", "kind=mmio op=write width=1", "kind=mmio op=read width=2",
    "kind=mmio op=read width=4 ring=3", "kind=mmio op=write width=8",
    "kind=mmio op=read width=8", "kind=mmio op=write width=4 straddle=1",
    "kind=mmio op=read width=8 straddle=1", "kind=pio op=write width=1 string=64",
    "kind=pio op=read width=2 string=64", "kind=pio op=read width=4 string=8 ring=3",
)  # fmt: skip
Result = TypeVar("Result")


@pytest.fixture(autouse=True, scope="module")
def _both() -> None:
    kind = arch.host()
    try:
        kind.open_system().close()
        engine.software(kind).close()
    except (KvmUnavailable, EngineUnavailable) as error:
        pytest.skip(str(error))


async def on_both(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], Awaitable[Result]]
) -> tuple[Result, Result]:
    """What `run` gives on KVM, and on the software engine."""
    results = []
    for name in (engine.KVM, engine.SOFT):
        monkeypatch.setenv(engine.VARIABLE, name)
        results.append(await run())
    return results[0], results[1]


async def test_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk() -> tuple[list[bytes], avmm.Outcome]:
        answers = []
        async with avmm.Machine(memory="16M", cpus=2) as vm:
            await vm.console.receive_until(PROMPT)
            for command in COMMANDS:
                await vm.console.send_all(command.encode() + b"\r")
                answer = await vm.console.receive_until(PROMPT)
                answers.append(re.sub(rb" in \d+\.\d+ s.*/s\)|\d+ us", b"", answer))
            await vm.console.send_all(b"exit 3\r")
            return answers, await vm.wait()

    kvm, soft = await on_both(monkeypatch, talk)
    for command, there, here in zip(COMMANDS, kvm[0], soft[0], strict=True):
        assert there == here, command
    assert kvm[1] == soft[1]


@pytest.mark.parametrize("command", ["crash", "reboot", "exit 77", "\x04"])
async def test_the_shells_ends(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    async def end() -> avmm.Outcome:
        async with avmm.Machine(memory="16M") as vm:
            await vm.console.receive_until(PROMPT)
            await vm.console.send_all(command.encode() + b"\r")
            return await vm.wait()

    kvm, soft = await on_both(monkeypatch, end)
    assert (kvm.cause, kvm.status) == (soft.cause, soft.status)  # RIP after a crash is anything


class Log(avmm.Device):
    """Reads a number that depends on how many accesses there were; every access is logged."""

    def __init__(self) -> None:
        self.log: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        value = (len(self.log) * 0x9E37_79B9_7F4A_7C15 + offset) & ((1 << 8 * size) - 1)
        self.log.append((offset, size, -1))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append((offset, size, value))


@pytest.mark.parametrize("words", EXITS)
async def test_exits(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    async def run() -> tuple[str, Any, avmm.Outcome]:
        device = Log()
        async with avmm.Machine(
            kernel=guests.path("exits"),
            cmdline=f"{words} count=300",
            memory="16M",
            devices=[avmm.pio(device, 0xE0, 8), avmm.mmio(device, 0xD000_0000, 0x4000)],
        ) as vm:
            said = b"".join([bytes(data) async for data in vm.console]).decode()
            return re.sub(r"cycles=\d+", "", said), device.log, await vm.wait()

    kvm, soft = await on_both(monkeypatch, run)
    assert kvm == soft
    assert len(kvm[1]) >= 300


def in_bytes(log: list[list[int]]) -> list[tuple[int, int, int]]:
    """The accesses as (way, offset, value) of single bytes; what comes twice in a row counts once.
    KVM reads a port ahead for INS into a device, writes what it has read at once, and downwards
    reads some of it again. The engine does as a CPU does, element by element. CMPS's two reads are
    put to the end, sorted: the engine makes the second one first."""
    log = [entry for entry in log if not 0x2C0 <= entry[1] < 0x2C8] + sorted(
        entry for entry in log if 0x2C0 <= entry[1] < 0x2C8
    )
    once = [entry for at, entry in enumerate(log) if not at or entry != log[at - 1]]
    return [
        (way, offset + i, value >> 8 * i & 255)
        for way, offset, size, value in once
        for i in range(size)
    ]


@pytest.mark.parametrize("cpus", [1, 3])
async def test_torture(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    def access(recorder: torture.Recorder, way: int, offset: int, size: int, value: int) -> int:
        if way == 0:  # whatever came before
            value = (offset * 0x9E37_79B9_7F4A_7C15 + 1) & ((1 << 8 * size) - 1)
        recorder.log.append([way, offset, size, value])
        return value

    monkeypatch.setattr(torture.Recorder, "_next", access)
    options = Namespace(capability=None, cpus=cpus, loops=2, long=0, hypercall=False)
    kvm, soft = await on_both(monkeypatch, lambda: torture.run(options))
    assert kvm[1], kvm[0]
    assert soft[0] == kvm[0]
    for there, here in zip(kvm[1], soft[1], strict=True):
        assert in_bytes(here) == in_bytes(there)
