"""What a vCPU exits with: the parts of `struct kvm_run`'s union, as values.

`RunPage.exit` returns them. They are copies: the answer to an exit goes through `RunPage`.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from avmm.kvm._kvm import lib

_NO_REASONS: Final = {"KVM_EXIT_IO_IN", "KVM_EXIT_IO_OUT", "KVM_EXIT_XEN_HCALL"}
_NAMES: Final[dict[int, str]] = {
    getattr(lib, name): name
    for name in dir(lib)
    if name.startswith("KVM_EXIT_") and name not in _NO_REASONS
}


def exit_name(reason: int) -> str:
    """`"KVM_EXIT_MMIO"` for its number; `"exit reason 99"` if the number is unknown."""
    return _NAMES.get(reason, f"exit reason {reason}")


class PioExit(NamedTuple):
    """KVM_EXIT_IO: `times` accesses of `size` bytes each, all to the same port."""

    is_output: bool
    size: int
    port: int
    times: int


class MmioExit(NamedTuple):
    """KVM_EXIT_MMIO: an access of `length` bytes, 1 to 8, to an address that is not memory."""

    address: int
    length: int
    is_write: bool


class MsrExit(NamedTuple):
    """KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR: `data` is what the guest writes."""

    number: int
    data: int


class HypercallExit(NamedTuple):
    """KVM_EXIT_HYPERCALL."""

    number: int
    args: tuple[int, ...]
    longmode: bool


class XenExit(NamedTuple):
    """KVM_EXIT_XEN. All fields but `kind` are for a hypercall (KVM_EXIT_XEN_HCALL). `cpl` is the
    ring in which the guest makes it."""

    kind: int
    number: int
    args: tuple[int, ...]
    longmode: bool
    cpl: int


class PaprExit(NamedTuple):
    """KVM_EXIT_PAPR_HCALL: `args` are R4 to R12."""

    number: int
    args: tuple[int, ...]


class OsiExit(NamedTuple):
    """KVM_EXIT_OSI: all 32 general-purpose registers."""

    gprs: tuple[int, ...]


class SystemEventExit(NamedTuple):
    """KVM_EXIT_SYSTEM_EVENT: `kind` is one of KVM_SYSTEM_EVENT_*."""

    kind: int


class InternalErrorExit(NamedTuple):
    """KVM_EXIT_INTERNAL_ERROR: `data` are the words that KVM gives with it.

    `instruction` is the instruction that KVM could not emulate. It is empty if that was not the
    problem, or if KVM does not report it.
    """

    suberror: int
    data: tuple[int, ...]
    instruction: bytes


class FailEntryExit(NamedTuple):
    """KVM_EXIT_FAIL_ENTRY: why the CPU refused to enter the guest, in the CPU's numbers."""

    hardware_reason: int


class UnknownExit(NamedTuple):
    """KVM_EXIT_UNKNOWN: why the CPU left the guest, in the CPU's numbers."""

    hardware_reason: int


class PlainExit(NamedTuple):
    """Any other exit. It has nothing but its reason."""

    reason: int


Exit: TypeAlias = (
    PioExit
    | MmioExit
    | MsrExit
    | HypercallExit
    | XenExit
    | PaprExit
    | OsiExit
    | SystemEventExit
    | InternalErrorExit
    | FailEntryExit
    | UnknownExit
    | PlainExit
)
