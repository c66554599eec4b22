"""The drain has one rule, in avmm/vcpu/completion.py, and is done twice: in Python and, for a vCPU
that is in the guest when it is asked to park, in C (avmm/kvm/parking.h). Both do the same.

A script says what KVM_RUN answers. Compared are the KVM_RUNs, each with the `immediate_exit` that
it is entered with, the exits that are served, and how it ends.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.parking import HEADERS, SUPPORT, planted

from avmm.errors import AvmmError
from avmm.kvm import RunPage, constants
from avmm.kvm._kvm import ffi
from avmm.loop import VcpuLoop
from avmm.vcpu.completion import NEEDS_COMPLETION, CompletionMode, CompletionPolicy, drain

INTR: Final = constants.KVM_EXIT_INTR
"""Also what an older kernel leaves in `exit_reason` from a run before."""
POLICIES: Final[dict[str, Callable[[], CompletionPolicy]]] = {
    "auto": CompletionPolicy,
    "announced": lambda: CompletionPolicy(capability=300, announced=True),
    "list": lambda: CompletionPolicy(CompletionMode.LIST),
    "always": lambda: CompletionPolicy(CompletionMode.ALWAYS),
}


@dataclass(frozen=True)
class Answer:
    """What a KVM_RUN comes to: its status, and what it writes into `kvm_run`."""

    status: int
    reason: int | None = None
    """Where it is not an exit: None leaves the reason as it was."""
    flagged: bool = False


DONE: Final = Answer(-errno.EINTR, INTR)
"""What each KVM_RUN answers after the script's end."""


@dataclass
class Scripted:
    """A vCPU that answers KVM_RUN by a script; the log of what is done with it."""

    script: Sequence[Answer]
    immediate: bool
    index: int = 0
    log: list[str] = field(default_factory=list)
    reasons: list[tuple[int, int]] = field(default_factory=list)
    """(the reason that the kernel wrote last, the one that it found) at each KVM_RUN."""

    def __post_init__(self) -> None:
        self.page = RunPage(-1, 2 * mmap.PAGESIZE)
        self.page.struct.exit_reason = self._wrote = INTR
        self.page.immediate_exit = int(self.immediate)
        self._answers = iter(self.script)

    def run(self) -> int:
        page = self.page
        self.log.append(f"KVM_RUN, immediate_exit={page.immediate_exit}")
        self.reasons.append((self._wrote, page.exit_reason))
        answer = next(self._answers, DONE)
        reason = answer.status if answer.status >= 0 else answer.reason
        if reason is not None:
            page.struct.exit_reason = self._wrote = reason
        page.struct.flags = NEEDS_COMPLETION if answer.flagged else 0
        return answer.status

    def serve(self, reason: int) -> None:
        self.log.append(f"exit {reason} is served")


class PythonSpot:
    """A place whose vCPU never parks by itself, so that all goes by completion.py."""

    asked = True
    stopping = False

    def __init__(self, vcpu: Scripted) -> None:
        self._vcpu = vcpu

    def run(self) -> int:
        self._vcpu.page.struct.exit_reason = constants.KVM_EXIT_UNKNOWN  # as parking.h does
        return self._vcpu.run()


class CSpot:
    """A place of parking.h's."""

    asked = True
    stopping = False

    def __init__(self, library: Any, vcpu: Scripted, always: bool) -> None:
        self._library = library
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int)(vcpu.run)
        where = int(ffi.cast("uintptr_t", vcpu.page.struct))
        library.begin(ctypes.c_void_p(where), self._callback, int(always))

    def run(self) -> int:
        status: int = self._library.spot_run()
        return status


def ended(vcpu: Scripted, work: Callable[[], None]) -> list[str]:
    """The log after that, and how it has ended."""
    try:
        work()
    except AvmmError as error:
        return [*vcpu.log, str(error)]
    return [*vcpu.log, "parked"]


def looped(vcpu: Scripted, spot: Any, policy: CompletionPolicy) -> list[str]:
    """What avmm's own loop does with a vCPU that is asked to park."""
    loop = VcpuLoop(vcpu, vcpu, policy, spot)  # type: ignore[arg-type]

    def park() -> None:
        spot.stopping = True

    spot.park = park
    try:
        return ended(vcpu, loop._run)
    finally:
        loop._bridge.close()


def by_c(library: Any, script: Sequence[Answer], immediate: bool, policy: str) -> list[str]:
    vcpu = Scripted(script, immediate)
    return looped(vcpu, CSpot(library, vcpu, policy == "always"), POLICIES[policy]())


def by_the_rule(script: Sequence[Answer], immediate: bool, policy: str) -> list[str]:
    """Without any C: a vCPU that is entered with `immediate_exit` set is drained by that."""
    vcpu, decide = Scripted(script, immediate), POLICIES[policy]()
    if immediate:
        return ended(vcpu, lambda: drain(vcpu, vcpu.serve, decide))
    return looped(vcpu, PythonSpot(vcpu), decide)


def compiled(folder: Path, header: str, *flags: str) -> Any:
    (folder / "parking.h").write_text(header)
    library = folder / "parking_drain.so"
    options = ["-O1", "-std=gnu11", "-shared", "-fPIC", f"-I{folder}", f"-I{HEADERS}", *flags]
    source = SUPPORT / "parking_drain.c"
    subprocess.run(["cc", *options, "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compiled(tmp_path_factory.mktemp("drain"), (HEADERS / "parking.h").read_text())


EXITS: Final = (
    constants.KVM_EXIT_IO,
    constants.KVM_EXIT_MMIO,
    constants.KVM_EXIT_X86_RDMSR,
    constants.KVM_EXIT_HLT,
    INTR,
    9999,
)
answers = st.one_of(
    st.builds(Answer, st.sampled_from(EXITS), st.none(), st.booleans()),
    st.builds(Answer, st.just(-errno.EINTR), st.sampled_from((INTR, None)), st.booleans()),
    st.sampled_from((Answer(-errno.EAGAIN), Answer(-errno.EFAULT))),
)
scripts = st.lists(answers, max_size=6)


@given(script=scripts, immediate=st.booleans(), policy=st.sampled_from(sorted(POLICIES)))
@example(script=[], immediate=False, policy="auto")
@example(script=[], immediate=False, policy="always")
@example(script=[Answer(-errno.EINTR, INTR, flagged=True)], immediate=False, policy="auto")
@example(script=[Answer(-errno.EINTR)], immediate=False, policy="auto")
@example(script=[], immediate=True, policy="auto")
@example(
    script=[Answer(-errno.EINTR, INTR, flagged=True), Answer(9999)],
    immediate=False,
    policy="announced",
)
@settings(max_examples=1000, deadline=None)
def test_c_does_what_the_rule_says(
    library: Any, script: list[Answer], immediate: bool, policy: str
) -> None:
    assert by_c(library, script, immediate, policy) == by_the_rule(script, immediate, policy)


@pytest.mark.parametrize(
    ("script", "immediate", "policy", "entries"),
    [
        ([], False, "auto", [0]),
        ([], True, "auto", [1]),
        ([], False, "always", [0, 1]),
        ([Answer(-errno.EINTR)], False, "auto", [0, 1]),
        ([Answer(-errno.EINTR, INTR, flagged=True)], False, "list", [0, 1]),
        ([Answer(constants.KVM_EXIT_IO)], False, "auto", [0, 1]),
        ([Answer(constants.KVM_EXIT_HLT)], False, "auto", [0]),
        ([Answer(-errno.EINTR), Answer(constants.KVM_EXIT_IO)], False, "auto", [0, 1, 1]),
    ],
)
def test_how_often_a_vcpu_is_entered(
    library: Any, script: list[Answer], immediate: bool, policy: str, entries: list[int]
) -> None:
    log = by_c(library, script, immediate, policy)
    assert [line for line in log if line.startswith("KVM_RUN, ")] == [
        f"KVM_RUN, immediate_exit={entry}" for entry in entries
    ]
    assert log[-1] == "parked"


DIFFERENT: Final = {
    "parks without a second KVM_RUN": ("if (!drained) {", "if (0) {"),
    "takes no heed of the flag": ("\n            && !(run->flags & KVM_RUN_NEEDS_COMPLETION)", ""),
    "takes no heed of the mode": (" && !s->lot->always", ""),
    "takes INTR for this KVM_RUN's": (
        "            run->exit_reason = KVM_EXIT_UNKNOWN;\n",
        "            ;\n",
    ),
    "enters again whatever it was entered with": (
        "int drained = run->immediate_exit;",
        "int drained = 0;",
    ),
    "enters again whatever it was interrupted with": (
        "drained |= run->exit_reason == KVM_EXIT_INTR",
        "drained |= 0",
    ),
    "parks with an exit in hand": (
        "            if (answer >= 0)\n                return run->exit_reason;\n",
        "            answer = answer < 0 ? answer : -EINTR;\n",
    ),
}


@pytest.mark.parametrize("bug", DIFFERENT)
def test_a_c_that_does_otherwise_is_found(tmp_path: Path, bug: str) -> None:
    library = compiled(tmp_path, planted(*DIFFERENT[bug]), "-w")
    cases = [
        ([first, second], immediate, policy)
        for first in (
            DONE,
            Answer(-errno.EINTR),
            Answer(-errno.EINTR, INTR, flagged=True),
        )
        for second in (DONE, Answer(constants.KVM_EXIT_MMIO))
        for immediate in (False, True)
        for policy in POLICIES
    ]
    assert any(by_c(library, *case) != by_the_rule(*case) for case in cases)


@pytest.fixture(scope="module")
def by_reason(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As it is compiled for arm64 and RISC-V."""
    header = (HEADERS / "parking.h").read_text()
    return compiled(tmp_path_factory.mktemp("by_reason"), header, "-DCOMPLETES_BY_REASON=1")


@given(script=scripts, immediate=st.booleans(), policy=st.sampled_from(sorted(POLICIES)))
@settings(max_examples=500, deadline=None)
def test_the_reason_is_left_alone_where_kvm_decides_by_it(
    by_reason: Any, script: list[Answer], immediate: bool, policy: str
) -> None:
    vcpu = Scripted(script, immediate)
    looped(vcpu, CSpot(by_reason, vcpu, policy == "always"), POLICIES[policy]())
    for wrote, found in vcpu.reasons:
        assert found == wrote or (wrote, found) == (INTR, constants.KVM_EXIT_UNKNOWN)
