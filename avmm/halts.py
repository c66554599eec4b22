"""Notices a guest that can never run again: all of its CPUs are halted, with interrupts off.

That is how a Linux without ACPI powers off, and how many small kernels end. KVM does not tell
anybody: HLT stays in the kernel, and each vCPU's thread waits there for ever.

Looking costs a short pause of the vCPUs, so it is not done while the guest does anything. A vCPU
that is halted takes no CPU time. Only when no vCPU has taken any for a while are their states
read, once; then not again before one has run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from avmm.ctrl_c import protected

if TYPE_CHECKING:
    from avmm.loop import VcpuGroup
    from avmm.migration import Coordinator

_LOOK_SECONDS: Final = 1.0
"""How often the clocks of the vCPUs' threads are read."""
_SETTLE_SECONDS: Final = 0.05
"""After a look, the vCPUs' threads need a moment until they wait in the kernel again."""


@protected
async def halted(
    vcpus: VcpuGroup, coordinator: Coordinator, are_halted: Callable[[], bool]
) -> None:
    """Wait until the guest can never run again. `are_halted` is called while all vCPUs are parked,
    and says whether none of them can be woken."""
    before: list[float] | None = None
    seen: list[float] | None = None
    while True:
        await trio.sleep(_LOOK_SECONDS)
        now = vcpus.cpu_seconds()
        if now is not None and now == before and now != seen:
            if await coordinator.glance(are_halted):
                return
            await trio.sleep(_SETTLE_SECONDS)
            seen = now = vcpus.cpu_seconds()
        before = now
