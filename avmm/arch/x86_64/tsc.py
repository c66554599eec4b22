"""The time stamp counters of a guest's vCPUs, which are loaded together.

Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_CTRL. A TSC is the host's plus an offset. The
counters run on while they are read or written, so values alone would set each vCPU's a little
apart from the others'; and KVM takes a value within a second of what it expects for an attempt
to synchronise, and keeps its own, which sets back a guest that was saved in its first second. So
the first vCPU's counter is set to its value by its offset, and the others' offsets keep the
distance to it that they had.

Where KVM does not know offsets (before Linux 5.16), the values are written, and KVM synchronises
the later vCPUs with the first. Some KVMs (kvm_pvm) take either and keep the host's TSC as the
guest's: that is bearable only where it is ahead of the guest's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from avmm.errors import StateError
from avmm.kvm import Vcpu

logger = logging.getLogger(__name__)

MSR: Final = 0x10
_NOTICED_SECONDS: Final = 1
"""What KVM's own synchronising may come to."""


@dataclass(frozen=True)
class Saved:
    """A saved counter; `offset` is None where KVM did not tell."""

    value: int
    offset: int | None


def load(vcpus: Sequence[Vcpu], saved: Sequence[Saved]) -> None:
    """Let the counters of all vCPUs go on from where they were.

    Raises `StateError` where this host's KVM would let them go back, `KvmError` where it refuses.
    """
    for vcpu, counter in zip(vcpus, saved, strict=True):
        vcpu.set_msrs({MSR: counter.value})
    first, begin = vcpus[0], saved[0]
    here = first.tsc_offset()
    exact = here is not None and begin.offset is not None
    if here is not None and begin.offset is not None:
        moved = here + begin.value - _now(first) - begin.offset
        for vcpu, counter in zip(vcpus, saved, strict=True):
            if counter.offset is None:
                raise StateError("the state has TSC offsets of some vCPUs only")
            vcpu.set_tsc_offset((counter.offset + moved) % (1 << 64))
    _check(first, begin.value, 0 if exact else _NOTICED_SECONDS)


def _now(vcpu: Vcpu) -> int:
    return vcpu.msrs([MSR])[MSR]


def _check(vcpu: Vcpu, saved: int, tolerated: float) -> None:
    ahead = (_now(vcpu) - saved) / vcpu.tsc_khz() / 1000
    if ahead < -tolerated:
        raise StateError(
            f"this host's KVM does not set a guest's TSC: it would go back by {-ahead:.3f} s"
        )
    if ahead > _NOTICED_SECONDS:
        logger.warning(
            "this host's KVM does not set a guest's TSC: it has jumped ahead by %.1f s", ahead
        )
