"""Which exits need completion: the policy, as data and as the reasons for it.

`KVM_RUN` may return with an instruction half done: the access has been handed to user space, and
only the next `KVM_RUN` writes a loaded value to its register, moves RIP past an `out`, or hands
over the second half of a page-crossing store. User space cannot read what is pending, so a state
that is saved before then is wrong. Documentation/virt/kvm/api.rst names the exits for which user
space must assume this (`DOCUMENTED` below).

**What the list thread said.** In January 2025 Sean Christopherson proposed ("[PATCH 0/5] KVM: Add
a kvm_run flag to signal need for completion") that the kernel say so itself: bit 15 of
`kvm_run.flags`, set on each exit that must be completed, announced by a capability. User space
would then re-enter if and only if the flag is set, and need no list of exit types again. Marc
Zyngier objected for arm64: there the PC still points at the load or store when it exits, so the
guest's state is consistent by itself, and a restored guest simply makes the access again.
Christopherson answered that making it again is just as wrong: the device has acted on the store
already, and a load may have side effects. Both are right. On arm64 the guest's own state is
consistent; yet after an uncompleted save, the device sees both stores and loads a second time. So
avmm completes exits on arm64 too. There KVM completes the exit only if it still finds
`KVM_EXIT_MMIO` in `kvm_run` at the next entry, so nobody may change that field in between. Chao
Gao noted that the flag must only be set by `KVM_RUN` itself, because user space reads it nowhere
else.

**Why the capability is not believed by its number.** The series was not merged, and the number
that it proposed, 239, is `KVM_CAP_ARM_WRITABLE_IMP_ID_REGS` in mainline. A kernel that answers
1 for it says nothing about completion. The flag decides only if

- the user configured the capability's number and this kernel announces it, or
- the kernel has proved itself: it set the bit on an exit that must carry it, and left it clear
  on one that must not.

In both cases avmm keeps checking: if an exit must carry the bit and does not, or the reverse, the
kernel uses bit 15 for something else. The contradiction is named in the log, and from then on the
documented list decides. Every exit that waits for an answer must carry it. An output need not,
because the kernel may already have finished it: on x86 it has finished each element of a `rep
outs`, and does not flag it (seen on Linux 6.1 with the series' change). So avmm believes an
unflagged output only from a kernel that has set the bit before.

**The drain.** A vCPU is drained, and may park, when nothing is pending:

1. `KVM_RUN` is entered with `immediate_exit` set. It first finishes what is pending. If it returns
   an exit, the exit is served, and `KVM_RUN` is entered again.
2. The vCPU is drained when `KVM_RUN` returns -EINTR, or an exit that needs no completion.
3. A vCPU that a kick has interrupted in the guest is already drained if `kvm_run` says that
   this `KVM_RUN` was interrupted, and says nothing else (`CompletionPolicy.settles`).

`drain` does this in Python. A vCPU that is in the guest when it is asked to park does the same in
C (avmm/kvm/parking.h), and returns to Python only for exits. Neither changes `kvm_run.exit_reason`
before an exit is completed, because on arm64 and RISC-V KVM uses that field to decide whether
there is something to complete.

**What is unknown is completed.** An exit type that avmm does not know is treated as one that needs
completion: completing an exit without need costs 5 µs; not completing one that needs it corrupts a
guest.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

from avmm.errors import VcpuError
from avmm.kvm import KvmError, RunPage, constants, exit_name
from avmm.kvm.exits import MmioExit, PioExit

logger = logging.getLogger(__name__)

NEEDS_COMPLETION: Final = 1 << 15
"""`KVM_RUN_NEEDS_COMPLETION`: the proposed bit of `kvm_run.flags`."""

DOCUMENTED: Final = frozenset(
    {
        constants.KVM_EXIT_IO,
        constants.KVM_EXIT_MMIO,
        constants.KVM_EXIT_OSI,
        constants.KVM_EXIT_PAPR_HCALL,
        constants.KVM_EXIT_XEN,
        constants.KVM_EXIT_EPR,
        constants.KVM_EXIT_X86_RDMSR,
        constants.KVM_EXIT_X86_WRMSR,
        constants.KVM_EXIT_HYPERCALL,
    }
)
"""The exits that api.rst lists ("operations are complete only after user space has re-entered
the kernel with KVM_RUN")."""

COMPLETE: Final = frozenset(
    {
        constants.KVM_EXIT_UNKNOWN,
        constants.KVM_EXIT_EXCEPTION,
        constants.KVM_EXIT_DEBUG,
        constants.KVM_EXIT_HLT,
        constants.KVM_EXIT_IRQ_WINDOW_OPEN,
        constants.KVM_EXIT_SHUTDOWN,
        constants.KVM_EXIT_FAIL_ENTRY,
        constants.KVM_EXIT_INTR,
        constants.KVM_EXIT_NMI,
        constants.KVM_EXIT_INTERNAL_ERROR,
        constants.KVM_EXIT_WATCHDOG,
        constants.KVM_EXIT_SYSTEM_EVENT,
        constants.KVM_EXIT_DIRTY_RING_FULL,
    }
)
"""The exits that leave nothing pending: the registers hold all of the vCPU's state."""


DRAIN_LIMIT: Final = 10_000
"""The most times that one drain may enter `KVM_RUN`. Even the longest instruction, a `rep ins`
that KVM splits into pages, is interrupted between its batches, so real guests need only a few."""


class CompletionMode(Enum):
    """How a machine decides. The values are the names in commands and configs."""

    AUTO = "auto"
    """By the flag if it is announced or proved, else by the documented list."""
    LIST = "list"
    """By the documented list. The flag is ignored."""
    ALWAYS = "always"
    """Every exit is completed."""


class CompletionPolicy:
    """Decides for the exits of one VM; shared by its vCPUs' threads.

    `capability` is the number that the user configured for NEEDS_COMPLETION, and `announced` says
    whether this kernel announces it. It is shared without a lock: the two facts that it learns
    only change from unknown to known, and a thread that sees them late decides by the list.
    """

    def __init__(
        self,
        mode: CompletionMode = CompletionMode.AUTO,
        *,
        capability: int | None = None,
        announced: bool = False,
    ) -> None:
        self.mode = mode
        self._capability = capability
        self._configured = capability is not None and announced
        self._seen_set = False
        self._seen_clear = False
        self.lie = ""
        """How the kernel contradicted the proposal; empty if it has not."""

    @property
    def by_flag(self) -> bool:
        """Does the kernel's flag decide, as of now?"""
        if self.mode is not CompletionMode.AUTO or self.lie:
            return False
        return self._configured or (self._seen_set and self._seen_clear)

    def needs(self, reason: int, flags: int, *, is_output: bool = False) -> bool:
        """Must the exit with this reason and `kvm_run.flags` be completed by `KVM_RUN`?

        `is_output` says that the exit only hands something to user space and waits for nothing.
        The policy also learns from the exit what the flag means on this kernel.
        """
        flagged = bool(flags & NEEDS_COMPLETION)
        self._learn(reason, flagged, is_output)
        if self.mode is CompletionMode.ALWAYS:
            return True
        if self.by_flag and (self._seen_set or not is_output):
            return flagged
        return reason not in COMPLETE

    def settles(self, reason: int, flags: int) -> bool:
        """Does -EINTR from a `KVM_RUN` that was not entered with `immediate_exit` mean that
        nothing is pending, with this reason and these flags in `kvm_run`?

        The reason must be that of this very run, so the caller clears the old one before it
        enters. If the flag is set although it means nothing here, the vCPU is entered once more.
        Nothing is learnt from it, because most of these runs are seen only in C.
        """
        if self.mode is CompletionMode.ALWAYS or flags & NEEDS_COMPLETION:
            return False
        return reason == constants.KVM_EXIT_INTR

    def _learn(self, reason: int, flagged: bool, is_output: bool) -> None:
        if reason in DOCUMENTED:
            self._seen_set |= flagged
            if not flagged and not is_output and (self._configured or self._seen_set):
                self._lied(reason, "clear where it must be set")
        elif reason in COMPLETE:
            self._seen_clear |= not flagged
            if flagged:
                self._lied(reason, "set where it must be clear")

    def _lied(self, reason: int, how: str) -> None:
        if self.lie or self.mode is not CompletionMode.AUTO:
            return
        number = "" if self._capability is None else f" (capability {self._capability})"
        self.lie = f"KVM_RUN_NEEDS_COMPLETION{number} is {how}, at {exit_name(reason)}"
        if self._configured or self._seen_set:
            logger.warning("%s, so avmm goes by its own list of exits", self.lie)

    def describe(self) -> str:
        """The policy in force, for people."""
        if self.mode is not CompletionMode.AUTO:
            return "every exit" if self.mode is CompletionMode.ALWAYS else "the documented list"
        if self.lie:
            return f"the documented list ({self.lie})"
        if self._configured:
            return f"the kernel's flag (capability {self._capability})"
        return "the kernel's flag (proved)" if self.by_flag else "the documented list"


def is_output(page: RunPage) -> bool:
    """Does the exit in this `kvm_run` hand something out, without waiting for an answer?"""
    match page.exit():
        case PioExit(is_output=is_output):
            return is_output
        case MmioExit(is_write=is_write):
            return is_write
    return False


class DrainableVcpu(Protocol):
    """What the drain needs of a vCPU; `avmm.kvm.Vcpu` is one."""

    index: int
    page: RunPage
    run: Callable[[], int]


def drain(vcpu: DrainableVcpu, serve: Callable[[int], None], policy: CompletionPolicy) -> None:
    """Let the kernel finish all that `vcpu` has pending. Call it in the vCPU's own thread.

    `serve` serves an exit by its reason and has written the answer when it returns. One re-entry
    is not enough: finishing one exit may bring the next (the second half of a page-crossing
    access, the store of a read-modify-write, the next element of a string), and that must be
    served and finished, too. Here only two things prove that nothing is pending: -EINTR from a
    `KVM_RUN` that was entered with `immediate_exit` set, or an exit that needs no completion.

    It stays on one thread because KVM ties what is pending to the thread that ran the vCPU.
    CVE-2026-31588 was caused by a second `KVM_RUN` from another thread.

    Raises `VcpuError` for a guest that still exits after `DRAIN_LIMIT` entries, `KvmError` if
    `KVM_RUN` fails, and what `serve` raises.
    """
    last = None
    for _ in range(DRAIN_LIMIT):
        vcpu.page.immediate_exit = 1
        status = vcpu.run()
        if status == -errno.EINTR:
            policy.needs(constants.KVM_EXIT_INTR, vcpu.page.flags)
            return
        if status == -errno.EAGAIN:  # an application processor that waits for its SIPI
            continue
        if status < 0:
            raise KvmError("KVM_RUN", -status)
        flags = vcpu.page.flags
        last = status
        serve(status)
        if not policy.needs(status, flags, is_output=is_output(vcpu.page)):
            return
    text = f"vCPU {vcpu.index} was not drained after {DRAIN_LIMIT} entries; the last exit was "
    text += "none" if last is None else exit_name(last)
    raise VcpuError(text + ("; now it says EAGAIN" if status == -errno.EAGAIN else ""))
