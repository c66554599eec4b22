"""What avmm costs a process: to import it, to run a guest, to run a thousand of them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support import engines
from support.leftovers import resources

import avmm
from avmm import engine, guests

PROMPT = b"avmm> "

IMPORT = """
import time
start = time.process_time()
import trio
yardstick = time.process_time() - start
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before, start = resident(), time.process_time()
import avmm
print((time.process_time() - start) / yardstick, (resident() - before) / 2**20)
"""


def test_importing_avmm_is_cheap(tmp_path: Path) -> None:
    """At most two fifths of the CPU time that trio's own import takes, and 8 MiB more; the best of
    six, for busy machines."""
    # With bytecode, as an installed package has it, whatever this environment says.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    costs = []
    for _ in range(6):
        done = subprocess.run(
            [sys.executable, "-c", IMPORT], capture_output=True, check=True, env=environment
        )
        costs.append(tuple(map(float, done.stdout.split())))
    assert min(cost[0] for cost in costs) <= 0.4
    assert min(cost[1] for cost in costs) <= 8


def test_importing_avmm_imports_nothing_that_only_some_need() -> None:
    code = "import avmm, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    loaded = done.stdout.decode().split()
    heavy = ("click", "elftools", "tomllib", "cffi", "xxhash", "msgpack")
    for name in (
        *heavy,
        "avmm.cli",
        "avmm.bench",
        "avmm.control",
        "avmm.snapshot",
        "avmm.transfer",
    ):
        assert name not in loaded


RUN = """
import trio, avmm
def private():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith(("RssAnon", "RssFile"))) / 1024
async def main():
    before = private()
    async with avmm.Machine() as vm:
        said = b""
        while not said.endswith(b"avmm> "):
            said += await vm.console.receive_some()
        print(private() - before)
trio.run(main)
"""


@pytest.mark.usefixtures("kvm")
def test_a_running_guest_costs_little_beside_its_memory() -> None:
    """Guest pages are shared memory and not counted here. What the software engine has translated
    is."""
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, check=True)
    assert float(done.stdout) <= (16 if engines.NAME == engine.SOFT else 12)


@pytest.mark.usefixtures("kvm")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
async def test_machines_leave_nothing_behind(count: int) -> None:
    async def cycle() -> None:
        async with avmm.Machine(
            kernel=guests.path("exits"), cmdline="count=1", memory="4M", cpus=2
        ) as vm:
            await vm.wait()

    for _ in range(20):
        await cycle()
    before = resources()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        await cycle()
    assert resources() == before
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
    assert grown < 4096, f"{grown} KiB more at the peak"
