"""What the vCPUs' threads know of a machine's devices (claims.h)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from avmm.kvm._kvm import ffi

if TYPE_CHECKING:
    from avmm.kvm import _kvm


class DeviceClaim(NamedTuple):
    """The addresses of a device, and whether its handlers are coroutine functions."""

    first: int
    end: int
    reads: bool
    writes: bool


class DeviceClaims:
    """The claims of one machine, by the names of its spaces. Only "pio" and "mmio" have any; each
    sequence is sorted, and its claims do not overlap."""

    def __init__(self, spaces: Mapping[str, Sequence[DeviceClaim]]) -> None:
        self._pio, self._mmio = (self._array(spaces.get(name, ())) for name in ("pio", "mmio"))
        self.struct = ffi.new(
            "struct avmm_claims *",
            {
                "pio_count": len(self._pio),
                "pio": self._pio,
                "mmio_count": len(self._mmio),
                "mmio": self._mmio,
            },
        )

    def _array(self, claims: Sequence[DeviceClaim]) -> _kvm.AvmmClaimArray:
        places: list[_kvm.AvmmClaimInit] = [
            {
                "first": claim.first,
                "end": claim.end,
                "reads": claim.reads,
                "writes": claim.writes,
            }
            for claim in claims
        ]
        return ffi.new("struct avmm_claim[]", places)
