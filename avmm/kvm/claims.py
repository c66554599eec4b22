"""What the vCPUs' threads know of a machine's devices (claims.h)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from avmm.kvm._kvm import ffi
from avmm.kvm.registers import ServedRegister, Writes

if TYPE_CHECKING:
    from avmm.kvm import _kvm


class Way(NamedTuple):
    """Reads or writes of a piece of a device."""

    tasks: bool = False
    """Is the handler a coroutine function?"""
    register: ServedRegister | None = None
    """The register that serves them, or as many of them as it can."""
    at: int = 0
    """Where in the register the piece begins."""
    how: int = Writes.TO_DEVICE


class DeviceClaim(NamedTuple):
    """Some addresses of a device, and who answers there."""

    first: int
    end: int
    width: int
    """The widest access that the device decodes."""
    reads: Way
    writes: Way


class DeviceClaims:
    """The claims of one machine, by the names of its spaces. Only "pio" and "mmio" have any; each
    sequence is sorted, and its claims do not overlap."""

    def __init__(self, spaces: Mapping[str, Sequence[DeviceClaim]]) -> None:
        self._claims = [spaces.get(name, ()) for name in ("pio", "mmio")]  # own the registers
        self._pio, self._mmio = map(self._array, self._claims)
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
                "width": claim.width,
                "reads": _way(claim.reads),
                "writes": _way(claim.writes),
            }
            for claim in claims
        ]
        return ffi.new("struct avmm_claim[]", places)


def _way(way: Way) -> _kvm.AvmmWayInit:
    init: _kvm.AvmmWayInit = {"tasks": way.tasks, "how": way.how, "at": way.at}
    if way.register is not None:
        init["of"] = way.register.struct
    return init
