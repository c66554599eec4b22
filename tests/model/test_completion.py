"""The policy: each rule of `avmm.vcpu.completion`'s docstring, and the drain's own bounds."""

from __future__ import annotations

import errno
import itertools
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.errors import VcpuError
from avmm.kvm import KvmError, constants
from avmm.vcpu.completion import (
    COMPLETE,
    DOCUMENTED,
    DRAIN_LIMIT,
    NEEDS_COMPLETION,
    CompletionMode,
    CompletionPolicy,
    drain,
    is_output,
)
from model.production import REAL
from model.solo import Solo
from model.vcpu import UNKNOWN_EXIT, Host, ModelVcpu, Op

IO, MMIO = constants.KVM_EXIT_IO, constants.KVM_EXIT_MMIO
HLT = constants.KVM_EXIT_HLT
SET, CLEAR = NEEDS_COMPLETION, 0
UNKNOWN = [UNKNOWN_EXIT, constants.KVM_EXIT_MEMORY_FAULT, constants.KVM_EXIT_NOTIFY]


def announced() -> CompletionPolicy:
    return CompletionPolicy(capability=300, announced=True)


# -- the documented list -------------------------------------------------------------------


def test_the_list_is_that_of_api_rst() -> None:
    names = "IO MMIO OSI PAPR_HCALL XEN EPR X86_RDMSR X86_WRMSR HYPERCALL"
    assert {getattr(constants, f"KVM_EXIT_{name}") for name in names.split()} == DOCUMENTED
    assert not DOCUMENTED & COMPLETE
    assert NEEDS_COMPLETION == 1 << 15


@pytest.mark.parametrize("reason", sorted(DOCUMENTED))
def test_what_is_documented_is_completed(reason: int) -> None:
    assert CompletionPolicy().needs(reason, CLEAR)
    assert CompletionPolicy(CompletionMode.LIST).needs(reason, CLEAR)


@pytest.mark.parametrize("reason", UNKNOWN)
def test_what_is_unknown_is_completed(reason: int) -> None:
    assert CompletionPolicy().needs(reason, CLEAR)
    assert CompletionPolicy(CompletionMode.LIST).needs(reason, CLEAR)


@pytest.mark.parametrize("reason", sorted(COMPLETE))
def test_what_leaves_nothing_pending_is_not_completed(reason: int) -> None:
    assert not CompletionPolicy().needs(reason, CLEAR)
    assert not CompletionPolicy(CompletionMode.LIST).needs(reason, CLEAR)


@pytest.mark.parametrize("reason", [*sorted(DOCUMENTED | COMPLETE), *UNKNOWN])
@pytest.mark.parametrize("flags", [SET, CLEAR])
def test_always_is_always(reason: int, flags: int) -> None:
    policy = CompletionPolicy(CompletionMode.ALWAYS, capability=300, announced=True)
    assert policy.needs(reason, flags)


@pytest.mark.parametrize("flags", [SET, CLEAR])
def test_by_the_list_the_flag_is_not_looked_at(flags: int) -> None:
    policy = CompletionPolicy(CompletionMode.LIST, capability=300, announced=True)
    for _ in range(2):
        assert policy.needs(IO, flags)
        assert not policy.needs(HLT, flags)
    assert not policy.by_flag
    assert not policy.lie


# -- the flag ------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", UNKNOWN)
def test_where_it_is_announced_the_flag_decides_and_nothing_else(reason: int) -> None:
    policy = announced()
    assert policy.by_flag
    assert policy.needs(reason, SET)
    assert not policy.needs(reason, CLEAR)
    assert policy.needs(IO, SET)
    assert not policy.needs(HLT, CLEAR)


def test_other_flags_are_not_that_flag() -> None:
    assert not announced().needs(UNKNOWN_EXIT, 0xFFFF & ~NEEDS_COMPLETION)


@pytest.mark.parametrize(
    ("capability", "answers"), [(None, True), (None, False), (300, False), (239, False)]
)
def test_a_number_that_nobody_configured_or_no_kernel_announces_means_nothing(
    capability: int | None, answers: bool
) -> None:
    policy = CompletionPolicy(capability=capability, announced=answers)
    assert not policy.by_flag
    assert policy.needs(UNKNOWN_EXIT, CLEAR)


@pytest.mark.parametrize("order", list(itertools.permutations([(IO, SET), (HLT, CLEAR)])))
def test_a_kernel_proves_itself_by_both(order: tuple[tuple[int, int], ...]) -> None:
    policy = CompletionPolicy()
    for reason, flags in order:
        assert not policy.by_flag
        policy.needs(reason, flags)
    assert policy.by_flag
    assert not policy.needs(UNKNOWN_EXIT, CLEAR)
    assert policy.needs(UNKNOWN_EXIT, SET)


@pytest.mark.parametrize(
    "seen", [[(IO, SET)], [(HLT, CLEAR)], [(UNKNOWN_EXIT, SET), (UNKNOWN_EXIT, CLEAR)]]
)
def test_half_a_proof_is_none(seen: list[tuple[int, int]]) -> None:
    policy = CompletionPolicy()
    for reason, flags in seen * 2:
        policy.needs(reason, flags)
    assert not policy.by_flag
    assert policy.needs(UNKNOWN_EXIT, CLEAR)


@pytest.mark.parametrize(
    ("reason", "flags", "how"),
    [(IO, CLEAR, "clear where it must be set"), (HLT, SET, "set where it must be clear")],
)
@pytest.mark.parametrize("proved", [False, True])
def test_a_kernel_that_lies_is_named_once_and_not_believed_again(
    reason: int, flags: int, how: str, proved: bool, caplog: pytest.LogCaptureFixture
) -> None:
    policy = CompletionPolicy() if proved else announced()
    if proved:
        policy.needs(IO, SET)
        policy.needs(HLT, CLEAR)
        assert policy.by_flag
    with caplog.at_level(logging.WARNING, "avmm.vcpu.completion"):
        for _ in range(3):
            assert policy.needs(reason, flags) is (reason == IO)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert how in caplog.text
    assert "KVM_EXIT_" in caplog.text
    assert not policy.by_flag
    assert policy.needs(UNKNOWN_EXIT, CLEAR)
    policy.needs(IO, SET)
    policy.needs(HLT, CLEAR)
    assert not policy.by_flag, "a liar is not believed because it told the truth twice"


def test_a_kernel_without_the_flag_is_no_liar(caplog: pytest.LogCaptureFixture) -> None:
    policy = CompletionPolicy()
    for _ in range(2):
        assert policy.needs(IO, CLEAR)
        assert not policy.needs(HLT, CLEAR)
    assert not caplog.records
    assert policy.describe() == "the documented list"


def test_the_policy_in_force_is_described() -> None:
    assert CompletionPolicy(CompletionMode.ALWAYS).describe() == "every exit"
    assert CompletionPolicy(CompletionMode.LIST).describe() == "the documented list"
    policy = announced()
    assert policy.describe() == "the kernel's flag (capability 300)"
    policy.needs(IO, CLEAR)
    assert policy.describe().startswith("the documented list (")
    proved = CompletionPolicy()
    proved.needs(IO, SET)
    proved.needs(HLT, CLEAR)
    assert proved.describe() == "the kernel's flag (proved)"


exits = st.sampled_from(sorted(DOCUMENTED | COMPLETE) + UNKNOWN)


@given(seen=st.lists(st.tuples(exits, st.booleans()), max_size=12), configured=st.booleans())
@settings(max_examples=500, deadline=None)
def test_no_history_leaves_a_documented_exit_uncompleted(
    seen: list[tuple[int, bool]], configured: bool
) -> None:
    logging.disable(logging.WARNING)
    try:
        policy = announced() if configured else CompletionPolicy()
        for reason, flagged in seen:
            needs = policy.needs(reason, SET if flagged else CLEAR)
            assert needs or reason not in DOCUMENTED
            assert not (needs and reason in COMPLETE)
            if needs != flagged and reason not in DOCUMENTED | COMPLETE:
                assert not policy.by_flag
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("op", "exits"),
    [
        (Op("in", 4), [False]),
        (Op("out", 4), [True]),
        (Op("load", 8, parts=(3, 5)), [False, False]),
        (Op("store", 8, parts=(3, 5)), [True, True]),
        (Op("rmw", 2), [False, True]),
        (Op("outs_mmio", 1), [False, True]),
        (Op("ins_mmio", 1), [False, True]),
    ],
    ids=lambda case: getattr(case, "kind", ""),
)
def test_an_output_is_what_asks_for_nothing(op: Op, exits: list[bool]) -> None:
    solo = Solo(REAL, (op,), Host())
    seen = []
    while not solo.model.finished:
        if (status := solo.model.run()) >= 0:
            seen.append(is_output(solo.model.page))
            solo.serve(status)
    assert seen == exits


@pytest.mark.parametrize("reason", sorted((DOCUMENTED | COMPLETE | {*UNKNOWN}) - {IO, MMIO}))
def test_no_other_exit_is_an_output_whatever_was_before_it(reason: int) -> None:
    page = ModelVcpu(0, (), Host()).page
    page.struct.io.direction, page.struct.mmio.is_write = constants.KVM_EXIT_IO_OUT, 1
    page.struct.exit_reason = reason
    assert not is_output(page)


# -- the drain -----------------------------------------------------------------------------


class Scripted(ModelVcpu):
    """Answers KVM_RUN with what it is told."""

    def __init__(self, *statuses: int) -> None:
        super().__init__(5, (), Host())
        self.statuses = itertools.chain(statuses, itertools.repeat(statuses[-1]))
        self.runs = 0
        self.run = self.answer  # type: ignore[method-assign]

    def answer(self) -> int:
        assert self.page.immediate_exit == 1
        self.runs += 1
        return next(self.statuses)


def test_a_guest_that_does_not_end_its_exit_is_named() -> None:
    vcpu, served = Scripted(constants.KVM_EXIT_MMIO), []
    with pytest.raises(VcpuError, match=r"vCPU 5 was not drained .* was KVM_EXIT_MMIO$"):
        drain(vcpu, served.append, CompletionPolicy())
    assert len(served) == vcpu.runs == DRAIN_LIMIT


@pytest.mark.parametrize(("before", "last"), [((), "none"), ((IO,), "KVM_EXIT_IO")])
def test_an_ap_that_never_says_eintr_is_an_error_too(before: tuple[int, ...], last: str) -> None:
    says = rf"vCPU 5 was not drained .* the last exit was {last}; now it says EAGAIN$"
    with pytest.raises(VcpuError, match=says):
        drain(Scripted(*before, -errno.EAGAIN), lambda reason: None, CompletionPolicy())


def test_a_run_that_fails_is_raised() -> None:
    with pytest.raises(KvmError, match="KVM_RUN"):
        drain(Scripted(-errno.EFAULT), lambda reason: None, CompletionPolicy())


def test_what_serving_raises_is_raised() -> None:
    def serve(reason: int) -> None:
        raise ValueError("a device")

    with pytest.raises(ValueError, match="a device"):
        drain(Scripted(IO), serve, CompletionPolicy())


@pytest.mark.parametrize("reason", sorted(COMPLETE))
def test_an_exit_that_needs_none_ends_the_drain(reason: int) -> None:
    vcpu, served = Scripted(IO, reason), []
    drain(vcpu, served.append, CompletionPolicy())
    assert served == [IO, reason]
    assert vcpu.runs == 2


def test_only_eintr_ends_the_drain_of_others() -> None:
    vcpu, served = Scripted(IO, -errno.EAGAIN, UNKNOWN_EXIT, -errno.EINTR), []
    drain(vcpu, served.append, CompletionPolicy())
    assert served == [IO, UNKNOWN_EXIT]
    assert vcpu.runs == 4


def test_the_measured_table() -> None:
    """Field notes 2: how many exits completion brings, and where the registers are then."""
    shapes = {
        Op("in", 1): 0,
        Op("ins", 1, count=4): 0,
        Op("load", 4, parts=(4,)): 0,
        Op("load", 8, parts=(3, 5)): 1,
        Op("store", 8, parts=(3, 5)): 1,
        Op("rmw", 2): 1,
        Op("outs_mmio", 1, count=4): 1,
        Op("out", 1): 0,
    }
    for op, more in shapes.items():
        solo = Solo(REAL, (op,), Host())
        solo.serve(solo.model.run())
        drain(solo.model, solo.serve, CompletionPolicy())
        assert solo.model.exits == 1 + more, op
        state = solo.model.state()
        left = {"ins": (0, 0), "outs_mmio": (0, 3)}.get(op.kind, (1, 0))
        assert (state.pc, state.count) == left, op


def test_an_output_without_the_flag_is_no_lie() -> None:
    """x86 is through with an element of `rep outs` when it exits, and leaves it unflagged."""
    policy = announced()
    assert policy.needs(IO, CLEAR, is_output=True), "no bit has been seen yet"
    assert policy.needs(IO, SET)
    assert not policy.needs(IO, CLEAR, is_output=True)
    assert policy.needs(IO, SET, is_output=True)
    assert not policy.lie
    assert policy.needs(IO, CLEAR), "an input without it is one"
    assert policy.lie
