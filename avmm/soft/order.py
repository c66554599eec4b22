"""A deterministic run, as the host sees it (native/order.c)."""

from __future__ import annotations

from typing import Final

NEVER: Final = (1 << 63) - 1


class Order:
    """The run of the VM with this descriptor, which was made by a seeded system."""

    def __init__(self, vm: int) -> None:
        from avmm.soft._soft import ffi, lib  # noqa: PLC0415 - only where the engine is used

        self._vm, self._lib, self._ffi = vm, lib, ffi
        self._idle = ffi.new("int *")

    @property
    def now(self) -> int:
        """The guest's time, in nanoseconds since it was made."""
        return self._lib.soft_now(self._vm)

    def settled(self, deadline: int) -> bool:
        """The host has nothing to do before the guest's time `deadline`. Returns whether the guest
        waits for the host alone. Call it while the guest stands still."""
        self._lib.soft_settled(self._vm, deadline, self._idle)
        return bool(self._idle[0])

    def unchanged(self, vcpu: int) -> None:
        """The vCPU with this descriptor has left with an exit, and serving that has given the host
        nothing to do. Call it in its thread, before it goes back."""
        self._lib.soft_unchanged(vcpu)

    @property
    def trail(self) -> tuple[int, int]:
        """How many things have happened so far, and a digest of them: exits, doorbells,
        interrupts, and which vCPU ran for how long, each with its time."""
        records = self._ffi.new("uint64_t *")
        digest = self._lib.soft_trail(self._vm, records)
        return records[0], digest

    def log(self, descriptor: int) -> None:
        """Write each of these to a descriptor from now on; -1: no longer."""
        self._lib.soft_log(self._vm, descriptor)


def epoch() -> int:
    """The guest's wall clock when it starts, in nanoseconds since 1970."""
    from avmm.soft._soft import lib  # noqa: PLC0415 - only where the engine is used

    return lib.soft_epoch()


def seed(system: int, value: int) -> None:
    """Let VMs of the system with this descriptor run deterministically."""
    from avmm.soft._soft import lib  # noqa: PLC0415 - only where the engine is used

    if (answer := lib.soft_seed(system, value)) < 0:
        raise OSError(-answer, "the software engine cannot run deterministically")
