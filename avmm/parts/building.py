"""Where parts of machines are put together and given back: by whoever, they come through here.

Both are awaited by machines that are entered and left, by clones and by guests that arrive, in
trio, whichever thread does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from avmm.bus.space import Placement
from avmm.config import MachineConfig
from avmm.memory.ram import GuestMemory
from avmm.outcome import Outcome
from avmm.parts.description import Described
from avmm.parts.machine_parts import Parts
from avmm.parts.placing import Unplaced
from avmm.vcpu.calls import CallHandler


@dataclass(frozen=True)
class Origin:
    """What a machine goes on from where it does not boot: the parameters of `Parts`."""

    state: Mapping[str, Any] | None = None
    open_memory: Callable[[], GuestMemory] | None = None
    described: Described | None = None
    needs: Any = None
    """What its vCPUs demand of this host (`Parts.needs`), to be compared before anything
    else."""
    standby: bool = False


BOOT: Final = Origin()
"""A machine that boots goes on from nowhere."""


async def build(
    config: MachineConfig,
    devices: Sequence[Placement | Unplaced] = (),
    end: Callable[[Outcome], None] = lambda outcome: None,
    calls: CallHandler | None = None,
    origin: Origin = BOOT,
) -> Parts:
    """The parts of a machine that could run; `dismantle` gives them back. `end` is called, in any
    thread, when the guest ends the run.

    Raises as `Parts`, and `StateError` where this host lacks what the origin's vCPUs need. Where
    it raises or is cancelled nothing is left, nor of the memory that the origin has opened.
    """
    memory = None if origin.open_memory is None else origin.open_memory()
    parts = Parts(
        config,
        devices,
        end,
        calls,
        origin.state,
        memory=memory,
        described=origin.described,
        standby=origin.standby,
    )
    if origin.needs is not None:
        try:
            parts.demand(origin.needs)
        except BaseException:
            await dismantle(parts)
            raise
    return parts


async def dismantle(parts: Parts) -> None:
    """Give everything back to the host, after all that ran has ended; idempotent. Not to be
    cancelled: call it shielded."""
    parts.close()
