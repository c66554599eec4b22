"""`avmm doctor --completion` where it meets what a KVM cannot do; test_cli.py has what it can."""

from __future__ import annotations

import time

import pytest

from avmm.cli.completion_report import Shape, examine_shape, hypercall

pytestmark = pytest.mark.usefixtures("kvm")


async def test_a_shape_that_never_leaves_kvm_run_is_said_to_be_impossible_in_time() -> None:
    began = time.monotonic()
    finding = examine_shape(Shape("1: jmp 1b", b"\xeb\xfe"))
    assert finding.error == "KVM_RUN does not return within 1 s"
    assert not finding.right
    assert time.monotonic() - began < 10


async def test_a_shape_that_this_kvm_does_not_offer_is_said_to_be_impossible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("avmm.kvm.Vm.check", lambda vm, capability: 0)
    assert examine_shape(hypercall()).error == "its KVM lacks KVM_CAP_EXIT_HYPERCALL"


@pytest.mark.lab(only="stock")
async def test_an_uncompleted_hypercall_is_lost_and_repeated() -> None:
    finding = examine_shape(hypercall())
    assert (finding.exit, finding.error) == ("KVM_EXIT_HYPERCALL", "")
    assert "lost: the guest got 0x11" in finding.uncompleted
    assert "repeated: hypercall 12" in finding.uncompleted
    assert (finding.drained, finding.exits_until_drained) == ("right", 1)
