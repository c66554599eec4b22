"""The time stamp counters of a guest's vCPUs, which are loaded together.

Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_CTRL. A guest's TSC is the host's TSC plus an
offset. The counters keep running while they are read and written, so values alone would leave each
vCPU's counter a little apart from the others'. Also, if a value is within a second of what KVM
expects, KVM takes it for an attempt to synchronise, and keeps its own value. That would turn back
the counter of a guest that was saved in its first second. So the first vCPU's offset is chosen to
give its counter the saved value, and the other offsets keep their distance to it.

If KVM does not know offsets (before Linux 5.16), the values are written, and KVM synchronises the
other vCPUs with the first one. Some KVMs (kvm_pvm) accept both and still show the guest the host's
TSC. avmm accepts that only if the host's TSC is ahead of the guest's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from avmm.arch.x86_64.kvm import X86Vcpu
from avmm.errors import StateError

logger = logging.getLogger(__name__)

MSR: Final = 0x10
_NOTICED_SECONDS: Final = 1
"""The largest difference that KVM's own synchronising may leave."""


@dataclass(frozen=True)
class Saved:
    """A saved counter. `offset` is None if KVM did not report it."""

    value: int
    offset: int | None
    ahead: int = 0
    """By how many ticks it is to be later than it was saved."""


def load(vcpus: Sequence[X86Vcpu], saved: Sequence[Saved]) -> None:
    """Let the counters of all vCPUs continue from where they were, or from ahead of that.

    Raises `StateError` if the counters would go back on this host's KVM, and `KvmError` if KVM
    refuses.
    """
    for vcpu, counter in zip(vcpus, saved, strict=True):
        vcpu.set_msrs({MSR: (counter.value + counter.ahead) % (1 << 64)})
    first, begin = vcpus[0], saved[0]
    here = first.tsc_offset()
    exact = here is not None and begin.offset is not None
    if here is not None and begin.offset is not None:
        moved = here + begin.value + begin.ahead - _now(first) - begin.offset
        for vcpu, counter in zip(vcpus, saved, strict=True):
            if counter.offset is None:
                raise StateError("the state has TSC offsets for only some of its vCPUs")
            vcpu.set_tsc_offset((counter.offset + moved) % (1 << 64))
    _check(first, begin, 0 if exact else _NOTICED_SECONDS)


def _now(vcpu: X86Vcpu) -> int:
    return vcpu.msrs([MSR])[MSR]


def _check(vcpu: X86Vcpu, saved: Saved, tolerated: float) -> None:
    hertz = vcpu.tsc_khz() * 1000
    ahead = (_now(vcpu) - saved.value) / hertz
    if ahead < -tolerated:
        raise StateError(
            f"this host's KVM does not set a guest's TSC: it would go back by {-ahead:.3f} s"
        )
    if ahead - saved.ahead / hertz > _NOTICED_SECONDS:
        logger.warning(
            "this host's KVM does not set a guest's TSC: it has jumped ahead by %.1f s", ahead
        )
