"""Clones, one at a time and by the dozen, compared with the bare requests to KVM that make a VM.

The bare VM has what every machine of avmm has (interrupt controllers, a timer, RAM, a vCPU with
its CPUID and registers), and is made in one thread. Clones are of the bundled shell, waiting at
its prompt, and are timed until their block is entered: their vCPUs run then. The ratio of many
clones is to as many bare VMs.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from avmm import arch
from avmm.arch.contract import AnyArchitecture
from avmm.bench import shell
from avmm.bench.row import BenchRow, medians
from avmm.boot.entry import Entry, Mode
from avmm.kvm import System
from avmm.machine import Machine
from avmm.threads import in_thread

MEMORY: Final = 16 << 20


async def measure(count: int, rounds: int, progress: Callable[[], None]) -> list[BenchRow]:
    """The cases, with `count` clones at once. The bare requests wait in a thread."""
    one, many = [], []
    async with Machine(memory=MEMORY, acpi=False) as origin:
        await shell.read_until(origin.console, shell.PROMPT)
        async with origin.clone():
            pass  # the first makes the origin copy-on-write
        for _ in range(rounds):
            bare = await in_thread(_bare, count)
            progress()
            begin = time.perf_counter()
            async with origin.clone():
                one.append(((time.perf_counter() - begin) * 1e6, bare * 1e6))
            progress()
            begin = time.perf_counter()
            async with origin.fork_many(count):
                many.append(((time.perf_counter() - begin) * 1e6, count * bare * 1e6))
            progress()
    return [BenchRow("clone", *medians(one)), BenchRow(f"fork_many({count})", *medians(many))]


def steps(rounds: int) -> int:
    """How often `measure` calls `progress`."""
    return 3 * rounds


def _bare(count: int) -> float:
    """How many seconds a bare VM takes, as the mean of `count`, which exist at the same time."""
    kind = arch.host()
    with ExitStack() as stack:
        system = kind.open_system()
        stack.callback(system.close)
        begin = time.perf_counter()
        for _ in range(count):
            bare_vm(stack, kind, system)
        return (time.perf_counter() - begin) / count


def bare_vm(stack: ExitStack, kind: AnyArchitecture, system: System) -> None:
    """Make one, which `stack` closes. Blocks."""
    ram = mmap.mmap(-1, MEMORY)
    view = memoryview(ram)
    stack.callback(view.release)
    vm = kind.create_vm(system)
    stack.callback(vm.close)
    vm.set_memory(0, 0, view)
    vcpu = vm.create_vcpu(0)
    stack.callback(vcpu.close)
    kind.set_up(system, [vcpu], Entry(Mode.PROTECTED, 0))
