"""Guests of one instruction for `avmm doctor --completion`: one for each kind of access that
causes an exit on x86.
"""

from __future__ import annotations

from typing import Final

from avmm.arch.contract import Probe
from avmm.arch.x86_64.kvm import X86System
from avmm.kvm import constants

END: Final = bytes.fromhex("66baf800 ef f4")
"""`mov dx, 0xf8; out dx, eax; hlt`: the guest reports the value that it got, and ends the run."""
_INTEL: Final = int.from_bytes(b"Genu", "little")
_HYPERCALL, _XEN_HYPERCALL = "hypercall", "Xen hypercall"
_XEN_NUMBER: Final = 17
"""Any number will do, because every call is answered."""
_BUFFER: Final = 0x20_0000
_PAGE: Final = 0x1000


def probes(system: X86System, origin: int, port: int, window: int, register: int) -> list[Probe]:
    """See `avmm.arch.contract.Architecture.probes`."""
    return [*_accesses(origin, port, window, register), *_hypercalls(system)]


def _accesses(origin: int, port: int, window: int, register: int) -> list[Probe]:
    border = window + _PAGE

    def probe(name: str, code: str, **registers: int) -> Probe:
        return Probe(name, bytes.fromhex(code), registers)

    return [
        probe("in al, imm8", f"e4 {port:02x}"),
        probe("out imm8, al", f"e6 {port:02x}", rax=0x51),
        probe("rep insb, 4 times", "f3 6c", rdi=_BUFFER, rcx=4, rdx=port),
        probe("rep outsb, 4 times", "f3 6e", rsi=origin, rcx=4, rdx=port),
        probe("rep outsb from MMIO", "f3 6e", rsi=window, rcx=3, rdx=port),
        probe("MMIO read", "8b 03", rbx=window),
        probe("MMIO write", "89 03", rbx=window, rax=0x51525354),
        probe("MMIO read across a page", "48 8b 03", rbx=border - 3),
        probe("MMIO write across a page", "48 89 03", rbx=border - 3, rax=0x5152535455565758),
        probe("inc dword [mmio]", "ff 03", rbx=window),
        probe("rdmsr", "0f 32", rcx=register),
        probe("wrmsr", "0f 30", rcx=register, rax=0x51, rdx=0),
    ]


def _hypercalls(system: X86System) -> list[Probe]:
    """KVM_HC_MAP_GPA_RANGE and one of Xen's hypercalls, made with this host CPU's own
    instruction.
    """
    leaves = system.supported_cpuid()
    by_intel = any(
        leaf.function == 0 and leaf.ebx == _INTEL for leaf in leaves.entries[0 : leaves.nent]
    )
    code = bytes.fromhex("0f01c1" if by_intel else "0f01d9")  # vmcall, vmmcall
    page = {"rax": constants.KVM_HC_MAP_GPA_RANGE, "rbx": _BUFFER, "rcx": 1, "rdx": 0}
    xen = {"rax": _XEN_NUMBER, "rdi": 1, "rsi": 2}
    return [
        Probe(_HYPERCALL, code, page, "KVM_CAP_EXIT_HYPERCALL"),
        Probe(_XEN_HYPERCALL, code, xen, "KVM_CAP_XEN_HVM", xen=True),
    ]


NAMES: Final = (*(probe.name for probe in _accesses(0, 0, 0, 0)), _HYPERCALL, _XEN_HYPERCALL)
"""The names of all probes."""
