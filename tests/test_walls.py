"""The walls between the rooms: import contracts (pyproject.toml), and who may start threads.

Each contract is seen to fail: an import that it forbids is planted in a copy of the package.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import avmm

PACKAGE: Final = Path(avmm.__file__).parent
ROOT: Final = PACKAGE.parent
PLANTED: Final = {
    "Imports run downwards through the rooms": ("memory/pages.py", "import avmm.config"),
    "No modules import each other in a circle": ("devices/uart.py", "import avmm.devices.serial"),
    "Nothing outside arch/ names an architecture": (
        "machine.py",
        "import avmm.arch.x86_64.layout",
    ),
    "The border to KVM knows no trio": ("kvm/ring.py", "import trio"),
    "Devices know no KVM and no vCPU": ("devices/serial.py", "from avmm.kvm import Vm"),
    "The protocols of migration and control do no I/O": ("control/protocol.py", "import socket"),
    "A program that imports avmm pays for no command and no image format": (
        "parts/builder.py",
        "import click",
    ),
}
"""By the contract's name: a file, and the import that breaks it there."""
COMPILED: Final = {"_kvm": {"arch/x86_64/kvm.py", "kvm"}, "_native": {"native", "memory", "disks"}}
"""By the compiled module: the rooms that call it, and the files of architectures. The linter does
not see it."""
THREADS: Final = {
    "loop.py": "vCPUs",
    "disks/pool.py": "requests of disks",
    "threads.py": "work that may block",
    "cli/completion_report.py": "the doctor's patience with a KVM_RUN",
}
"""Who starts threads, and for what."""


def lint(folder: Path) -> str:
    """What the linter says of the package in `folder`."""
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {program}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package's Python, with the contracts beside it."""
    shutil.copytree(PACKAGE, tmp_path / "avmm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_all_contracts_are_kept_and_each_is_known_here(copy: Path) -> None:
    said = lint(copy)
    kept = {line.split(" KEPT")[0] for line in said.splitlines() if " KEPT" in line}
    assert kept == set(PLANTED), said


@pytest.mark.parametrize("contract", PLANTED)
def test_a_planted_import_breaks_the_contract(copy: Path, contract: str) -> None:
    name, statement = PLANTED[contract]
    path = copy / "avmm" / name
    future = "from __future__ import annotations\n"
    source = path.read_text()
    assert source.count(future) == 1
    path.write_text(source.replace(future, f"{future}\n{statement}\n"))
    assert f"{contract} BROKEN" in lint(copy)


@pytest.mark.parametrize("compiled", COMPILED)
def test_what_is_compiled_is_called_from_few_rooms(compiled: str) -> None:
    importing = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                if compiled in names:
                    where = path.relative_to(PACKAGE)
                    importing.add(str(where) if where.parts[0] == "arch" else where.parts[0])
    assert importing == COMPILED[compiled]


def test_nothing_near_kvm_is_of_any_type() -> None:
    for room in ("kvm", "vcpu"):
        for path in (PACKAGE / room).glob("*.py*"):
            named = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.alias)]
            assert "Any" not in {name.name for name in named}, path


def test_threads_are_started_in_few_places() -> None:
    starting = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "bench":
            continue  # it measures, with what it takes
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "threading.Thread",
                "threading.Timer",
                "trio.to_thread.run_sync",
            ):
                starting.add(str(path.relative_to(PACKAGE)))
    assert starting == set(THREADS)
