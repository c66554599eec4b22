"""`avmm doctor --completion` where it meets what a KVM cannot do; test_cli.py has what it can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import engines

from avmm import arch, engine
from avmm.arch.contract import Probe
from avmm.arch.x86_64.kvm import X86System
from avmm.cli import completion_report, doctor
from avmm.cli.completion_report import examine_shape, shapes

pytestmark = pytest.mark.usefixtures("kvm")


def shape_of(name: str) -> Probe:
    return next(shape for shape in shapes() if shape.name == name)


async def test_a_shape_that_never_leaves_kvm_run_is_said_to_be_impossible_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(completion_report, "_PATIENCE_SECONDS", 0.5)
    finding = await examine_shape(Probe("1: jmp 1b", b"\xeb\xfe"))
    assert finding.error == "KVM_RUN did not return within 0.5 s"
    assert not finding.right


async def test_a_shape_that_this_kvm_does_not_offer_is_said_to_be_impossible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kvms, xens = shape_of("hypercall"), shape_of("Xen hypercall")
    lacking = {"KVM_CAP_EXIT_HYPERCALL", "KVM_CAP_XEN_HVM"}
    check = X86System.check
    monkeypatch.setattr(
        X86System, "check", lambda system, name: 0 if name in lacking else check(system, name)
    )
    name = "the software engine" if engines.NAME == engine.SOFT else "its KVM"
    assert (await examine_shape(kvms)).error == f"{name} lacks KVM_CAP_EXIT_HYPERCALL"
    assert (await examine_shape(xens)).error == f"{name} lacks KVM_CAP_XEN_HVM"


HERE = {
    "in al, imm8": "lost",
    "rep insb, 4 times": "repeated",
    "rep outsb, 4 times": "right",
    "rep outsb from MMIO": "lost",
    "MMIO read": "lost",
    "MMIO write": "right",
    "MMIO read across a page": "lost",
    "MMIO write across a page": "lost",
    "inc dword [mmio]": "instead",
    "rdmsr": "lost",
    "wrmsr": "repeated",
}
"""What docs/completion.md says of a guest that is saved uncompleted, whichever the KVM."""


SOFT = {"rep outsb, 4 times": "repeated", "MMIO write": "repeated"}
SOFT["MMIO write across a page"] = SOFT["out imm8, al"] = "repeated"
"""On the software engine an instruction is begun anew in any case."""


@pytest.mark.lab
@pytest.mark.parametrize("name", [n for n in arch.host().probe_names if "hypercall" not in n])
async def test_what_an_uncompleted_exit_costs_is_as_documented(name: str) -> None:
    finding = await examine_shape(shape_of(name))
    assert finding.drained == "right"
    if engines.NAME == engine.SOFT and name in SOFT:
        assert finding.uncompleted.startswith(SOFT[name])
    elif name == "out imm8, al":
        # KVM's fast path leaves RIP at the instruction; this one interprets it.
        interprets = Path("/sys/module/kvm_pvm").exists()
        assert finding.uncompleted.startswith("right" if interprets else "repeated: port write")
    else:
        assert HERE[name] in finding.uncompleted


@pytest.mark.lab(only="stock")
async def test_an_uncompleted_hypercall_is_lost_and_repeated() -> None:
    finding = await examine_shape(shape_of("hypercall"))
    assert (finding.exit, finding.error) == ("KVM_EXIT_HYPERCALL", "")
    assert "lost: the guest got 0x11" in finding.uncompleted
    assert "repeated: hypercall 12" in finding.uncompleted
    assert (finding.drained, finding.exits_until_drained) == ("right", 1)


@pytest.mark.lab(only="newer")
async def test_an_uncompleted_hypercall_of_xens_is_lost_and_repeated() -> None:
    finding = await examine_shape(shape_of("Xen hypercall"))
    assert (finding.exit, finding.error) == ("KVM_EXIT_XEN", "")
    assert "lost: the guest got 0x11" in finding.uncompleted
    assert "repeated: Xen hypercall 17" in finding.uncompleted
    assert (finding.drained, finding.exits_until_drained) == ("right", 1)


@pytest.fixture
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    there = X86System.__init__
    monkeypatch.setattr(
        X86System, "__init__", lambda system, engine=None: there(system, "/nowhere/kvm", engine)
    )


@pytest.mark.usefixtures("no_kvm")
def test_without_kvm_programs_are_told_for_each_shape() -> None:
    done = CliRunner().invoke(doctor.command, ["--completion", "--json", "--engine", "kvm"])
    assert done.exit_code == 1
    findings = json.loads(done.stdout)
    assert [finding["access"] for finding in findings] == list(arch.host().probe_names)
    assert all("open /nowhere/kvm failed" in finding["error"] for finding in findings)
    assert not any(finding["drained"] for finding in findings)


@pytest.mark.usefixtures("no_kvm")
def test_without_kvm_people_are_told_once() -> None:
    done = CliRunner().invoke(doctor.command, ["--completion", "--engine", "kvm"])
    assert done.exit_code == 1
    assert done.stdout.startswith("problem        open /nowhere/kvm failed")
    assert done.stdout.count("/nowhere/kvm") == 1


def test_every_shape_that_is_tried_is_named() -> None:
    assert tuple(shape.name for shape in shapes()) == arch.host().probe_names
