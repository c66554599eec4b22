"""Compares what a saved guest's CPUID promises with what this host offers.

KVM accepts any CPUID. A guest that another host told of AVX-512 would fail only when it uses
AVX-512. So the feature words (Intel SDM 2A, CPUID; AMD APM 3, appendix E;
Documentation/virt/kvm/x86/cpuid.rst) are compared, bit by bit: a guest may have fewer features
than the host offers, never more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from avmm.errors import StateError

Leaf = tuple[int, ...]
"""(function, index, flags, eax, ebx, ecx, edx)."""

_REGISTERS: Final = {"eax": 3, "ebx": 4, "ecx": 5, "edx": 6}
_WORDS: Final = (
    (0x1, 0, "ecx"),
    (0x1, 0, "edx"),
    (0x6, 0, "eax"),
    (0x7, 0, "ebx"),
    (0x7, 0, "ecx"),
    (0x7, 0, "edx"),
    (0x7, 1, "eax"),
    (0x7, 1, "ebx"),
    (0x7, 1, "ecx"),
    (0x7, 1, "edx"),
    (0x7, 2, "edx"),
    (0xD, 0, "eax"),
    (0xD, 0, "edx"),
    (0xD, 1, "eax"),
    (0x4000_0001, 0, "eax"),
    (0x8000_0001, 0, "ecx"),
    (0x8000_0001, 0, "edx"),
    (0x8000_0007, 0, "edx"),
    (0x8000_0008, 0, "ebx"),
    (0x8000_0021, 0, "eax"),
)
_OWN: Final[Mapping[tuple[int, int, str], int]] = {
    # OSXSAVE and OSPKE follow CR4, MONITOR may differ between any two hosts, and HTT only says
    # that there are several CPUs.
    (0x1, 0, "ecx"): 1 << 27 | 1 << 3,
    (0x1, 0, "edx"): 1 << 28,
    (0x7, 0, "ecx"): 1 << 4,
}
"""Bits that say nothing about what the host can do."""


def demand(state: Iterable[Leaf], host: Iterable[Leaf]) -> None:
    """Raise `StateError` naming the features of `state` that `host` lacks.

    Both have the form that `Vcpu.cpuid` returns. `host` is what a new vCPU gets on this host.
    """
    theirs, ours = _by_number(state), _by_number(host)
    if (0, 0) not in theirs or (1, 0) not in theirs:
        raise StateError(
            "the state's cpuid does not describe a processor: leaves 0 and 1 are missing"
        )
    lacking = []
    for word in _WORDS:
        function, index, register = word
        column = _REGISTERS[register]
        has = theirs.get((function, index), (0,) * 7)[column]
        offered = ours.get((function, index), (0,) * 7)[column] | _OWN.get(word, 0)
        bits = [bit for bit in range(32) if (has & ~offered) >> bit & 1]
        if bits:
            numbers = ", ".join(map(str, bits))
            lacking.append(f"{function:#x}.{index} {register} bits {numbers}")
    if lacking:
        raise StateError(
            "this host's CPU or KVM lacks features that the guest was promised (CPUID leaf "
            f"and bits): {'; '.join(lacking)}"
        )


def _by_number(leaves: Iterable[Leaf]) -> dict[tuple[int, int], Leaf]:
    return {(leaf[0], leaf[1]): leaf for leaf in leaves}
