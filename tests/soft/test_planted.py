"""Bugs planted in the engine's C are found by the tests.

Each is compiled into an extension of its own. A process with that extension in the place of
`avmm.soft._soft` runs the tests that must notice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from support.required import not_here

from avmm.soft import build

TESTS: Final = Path(__file__).parents[1]
FLAGS: Final = (
    "-O1",
    "-std=gnu11",
    "-fPIC",
    "-w",
    "-fvisibility=hidden",
    "-ftls-model=initial-exec",
)
RUN: Final = """\
import importlib.util, sys
spec = importlib.util.spec_from_file_location("avmm.soft._soft", sys.argv[1])
planted = importlib.util.module_from_spec(spec)
sys.modules["avmm.soft._soft"] = planted
spec.loader.exec_module(planted)
import avmm.soft, pytest
avmm.soft._soft = planted
sys.exit(pytest.main(["-n", "0", "-x", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


class Bug(NamedTuple):
    """A line of the source and what takes its place, and who must notice."""

    file: str
    line: str
    planted: str
    noticed_by: str


EXITS, TRAPS, VCPUS = (f"soft/test_{name}.py" for name in ("exits", "traps", "vcpus"))
TORTURE: Final = "guests/test_torture.py::test_a_guest_moved_at_an_exit_is_as_if_it_had_not_been"
BUGS: Final = {
    "an access that was answered is made again": Bug(
        "native/access.c", "if (a->kind == kind && a->at == at", "if (0 && a->at == at", EXITS
    ),
    "an answered instruction is not finished": Bug(
        "native/access.c",
        "    v->position = 0;\n    v->replay = REPLAY_WANTED;\n}",
        "    v->position = v->count = 0;\n    v->replay = NOT_REPLAYING;\n}",
        EXITS,
    ),
    "a stop is honoured with an exit in hand": Bug(
        "native/engine.c",
        "if (stop && v->replay == NOT_REPLAYING && v->pending == NOTHING)",
        "if (stop)",
        EXITS,
    ),
    "an access shares its block with others": Bug(
        "native/engine.c",
        "AT(vm->cpu, CPU_CFLAGS_NEXT, uint32_t) = 1;",
        ";",
        f"{EXITS} {TORTURE}",
    ),
    "an early kick is lost": Bug("native/engine.c", "        kicked_outside = 1;\n", "", TRAPS),
    "the next vCPU finds the last one's TLB": Bug(
        "native/engine.c",
        "    soft_order_pin_tlb(vm);\n    lib.tlb_flush(vm->cpu);",
        "    soft_order_pin_tlb(vm);",
        f"{VCPUS} {EXITS}",
    ),
    "a pause does not look at what waits": Bug(
        "native/engine.c",
        "v->exit_reason || v->stop || ",
        "v->exit_reason || ",
        f"{EXITS} {TORTURE}",
    ),
    "a store is not in the dirty log": Bug(
        "native/overrides.c",
        "        if (s->dirty)\n            *word",
        "        if (0)\n            *word",
        EXITS,
    ),
    "the second store to a page is not logged again": Bug(
        "native/memory.c",
        "    memset(s->dirty, 0, bitmap_size(s->size));\n    lib.tlb_flush(vm->cpu);",
        "    memset(s->dirty, 0, bitmap_size(s->size));",
        EXITS,
    ),
    "code that the host has changed runs on": Bug(
        "native/memory.c", "            found = 1;\n", "            found = 0;\n", TRAPS
    ),
    "a page with code becomes fast for stores": Bug(
        "native/overrides.c",
        "            return;\n    }\n    lib.tlb_set_dirty(cpu, address);",
        "            ;\n    }\n    lib.tlb_set_dirty(cpu, address);",
        TRAPS,
    ),
    "ring 3 reaches every port": Bug(
        "native/overrides.c",
        "    lib.raise(env, 13, 0, from);\n}\n\nstatic uint64_t port_in",
        "}\n\nstatic uint64_t port_in",
        EXITS,
    ),
    "syscall returns to where it was called": Bug(
        "native/overrides.c",
        "        REG(1) = eip;",
        "        REG(1) = eip - length;",
        EXITS,
    ),
    "an exception's place is after its instruction": Bug(
        "native/engine.c",
        "        AT(vm->env, ENV_EIP, uint64_t) = v->interrupted_eip;",
        "        ;",
        EXITS,
    ),
    "the flags are the last operation's": Bug(
        "native/state.c", "AT(env, ENV_CC_OP, uint32_t) = CC_OP_EFLAGS", "(void)0", EXITS
    ),
    "the flags of a SETcc that faults are lost": Bug(
        "native/corrections.c", "uint32_t) = EFLAGS;", "uint32_t) += 0;", "soft/test_mended.py"
    ),
    "LOCK is no lock": Bug(
        "native/turn.c", "    while (vm->serving != ticket) {", "    while (0) {", VCPUS
    ),
}
"""By what goes wrong."""
FAILED: Final = pytest.ExitCode.TESTS_FAILED
SAMPLE: Final = "an access that was answered is made again"


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine's sources, each with its object, and the face that cffi makes."""
    if shutil.which("cc") is None:
        not_here("there is no C compiler")
    place = tmp_path_factory.mktemp("engine")
    for folder in build.FOLDERS[:2]:
        shutil.copytree(folder, place / folder.name, ignore=shutil.ignore_patterns("*.o"))
    shutil.copytree(build.FOLDERS[2], place / "kvm", ignore=shutil.ignore_patterns("*.[!h]*"))
    build.ffibuilder.emit_c_code(str(place / "face.c"))
    for source in sources(place):
        compile_one(place, source)
    return place


def sources(place: Path) -> Iterator[Path]:
    return place.rglob("*.c")


def compile_one(place: Path, source: Path) -> None:
    import sysconfig  # noqa: PLC0415 - only here

    include = [f"-I{place / folder.name}" for folder in build.FOLDERS]
    include.append(f"-I{sysconfig.get_path('include')}")
    command = ["cc", *FLAGS, *include, "-c", source, "-o", source.with_suffix(".o")]
    subprocess.run(command, check=True, timeout=60)


def linked(place: Path) -> Path:
    library = place / "_soft.abi3.so"
    command = ["cc", "-shared", "-o", library, *place.rglob("*.o"), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, timeout=60)
    return library


def run(library: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """The tests with that extension; the first that fails ends it."""
    nodes = [str(TESTS / test) for test in tests.split()]
    return subprocess.run(
        [sys.executable, "-c", RUN, library, "--timeout=20", f"--rootdir={TESTS.parent}", *nodes],
        env=os.environ | {"AVMM_ENGINE": "soft"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_can_be_planted(name: str) -> None:
    bug = BUGS[name]
    assert (build.HERE / bug.file).read_text().count(bug.line) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_a_bug_all_of_them_pass(objects: Path) -> None:
    done = run(linked(objects), f"{EXITS} {TRAPS} {VCPUS} {TORTURE}")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", [n if n == SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in BUGS]
)
def test_a_planted_bug_is_found(objects: Path, tmp_path: Path, name: str) -> None:
    bug = BUGS[name]
    place = tmp_path / "engine"
    shutil.copytree(objects, place)
    source = place / bug.file
    text = source.read_text()
    source.write_text(text.replace(bug.line, bug.planted))
    compile_one(place, source)
    done = run(linked(place), bug.noticed_by)
    has_crashed, is_stuck = done.returncode < 0, "Timeout" in done.stdout + done.stderr
    has_failed = done.returncode == FAILED and " failed" in done.stdout[-100:]
    assert has_failed or has_crashed or is_stuck, done.stdout[-3000:] + done.stderr[-3000:]
