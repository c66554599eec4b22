"""The types of what cffi compiles: they are those of the declarations, and they are checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from avmm.kvm import _kvm
from avmm.native import _native, stubs
from avmm.soft import _soft

ROOT = Path(stubs.__file__).parents[2]
COMPILED = {
    "avmm.kvm._kvm": _kvm,
    "avmm.native._native": _native,
    "avmm.soft._soft": _soft,
}


@pytest.fixture(params=stubs.MODULES, ids=lambda module: module.name)
def module(request: pytest.FixtureRequest) -> stubs.StubModule:
    module: stubs.StubModule = request.param
    return module


def test_the_types_are_those_of_the_declarations(module: stubs.StubModule) -> None:
    written = module.path.read_text()
    assert written == stubs.text(module), "run python avmm/native/stubs.py"


def names(compiled: ModuleType) -> set[str]:
    return set(dir(compiled.lib))


def test_all_that_is_compiled_has_a_type(module: stubs.StubModule) -> None:
    text = module.path.read_text()
    for name in names(COMPILED[module.name]):
        assert f"    {name}: Final[int]\n" in text or f"    def {name}(" in text


def test_a_structure_has_the_fields_that_the_compiler_knows(module: stubs.StubModule) -> None:
    ffi = COMPILED[module.name].ffi
    typedefs, structs, _ = ffi.list_types()
    lines = module.path.read_text().splitlines()
    for c_name in (*(f"struct {name}" for name in structs), *typedefs):
        fields = ffi.typeof(c_name).fields
        head = f"class {stubs.class_name(c_name)}(CData):"
        body = lines[lines.index(head) + 1 :] if fields else []
        assert [line.split(":")[0].strip() for line in body[: len(fields)]] == [
            name for name, _ in fields
        ]


SNIPPET = """\
from avmm.arch.x86_64.kvm import X86System, X86Vcpu
from avmm.kvm import RunPage, constants
from avmm.kvm._kvm import ffi, lib
from avmm.kvm.exits import MmioExit, PioExit
from avmm.native._native import ffi as native

def registers(vcpu: X86Vcpu) -> int:
    regs, sregs = vcpu.regs(), vcpu.sregs()
    regs.rax = sregs.cs.base
    regs.rxa = 0  # wrong
    sregs.cs.bose = 0  # wrong
    regs.rax = "0"  # wrong
    vcpu.set_regs(regs)
    vcpu.set_regs(sregs)  # wrong
    return regs.rip

def leaves(system: X86System) -> int:
    cpuid = system.supported_cpuid()
    cpuid.entries[0].eex = 0  # wrong
    return max(leaf.function for leaf in cpuid.entries)

def page(page: RunPage) -> str:
    page.immediate_exit = 1
    page.exit_reason = 0  # wrong
    direction, size, port, count = page.io()  # wrong
    address, data, length, is_write = page.mmio()
    match page.exit():
        case PioExit(port=port):
            return hex(port)
        case MmioExit(adress=address):  # wrong
            return hex(address)
    return constants.KVM_EXIT_MIMO  # wrong

def border(system: X86System) -> None:
    system.check("KVM_CAP_IRQFD")
    system.check("KVM_CAP_IRQDF")  # wrong
    irqfd = ffi.new("struct kvm_irqfd *", {"fd": 1, "gsi": 2})
    lib.avmm_ioctl(3, lib.KVM_IRQFD, irqfd)
    lib.avmm_ioctl(3, irqfd, lib.KVM_IRQFD)  # wrong
    lib.avmm_run(3, irqfd)  # wrong
    ffi.new("struct kvm_irqfd *", {"fd": 1, "gis": 2})  # wrong
    ffi.new("struct kvm_irqdf *")  # wrong
    words, halves = native.new("uint64_t[]", 4), native.new("uint32_t[]", 4)
    words = halves  # wrong
"""


def test_a_misspelt_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "snippet.py"),
            *("--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache"),
            *("--no-error-summary", "--hide-error-context", "--no-pretty"),
        ],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    lines = SNIPPET.splitlines()
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error: " in line}
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert found == wrong, done.stdout
