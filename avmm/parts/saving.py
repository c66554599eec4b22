"""A machine's state, saved and loaded without keeping trio's thread.

KVM's part of it is dozens of calls into the kernel, and made in a thread: everybody stands still
meanwhile. Devices are asked in trio's thread, one after the other and without anything in between.
Vcpus and devices' requests stand still, but the program's other tasks do not: they read consoles
and write to sockets, and what they do must be in the state whole or not at all.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from avmm.threads import in_thread

if TYPE_CHECKING:
    from avmm.parts import Parts


async def saved(parts: Parts) -> dict[str, Any]:
    """The state, all but RAM, of a machine that stands still. Raises as `Parts.save`."""
    machine = await in_thread(partial(parts.save_machine, with_memory=False))
    return machine | parts.save_devices()


async def load(parts: Parts, state: object) -> None:
    """`Parts.load` of a machine that does not run yet."""
    await in_thread(parts.load_machine, state)
    parts.load_devices(state)
