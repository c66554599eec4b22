"""Saves and loads a machine's state without blocking trio's thread.

**KVM's part** takes dozens of calls into the kernel. They are made in a thread, while the vCPUs
stand still.

**Devices** are asked in trio's thread, all in one go. vCPUs and the guest's requests stand still
meanwhile, but the program's other tasks do not: they read consoles and write to sockets, and a
state must contain such a change completely or not at all. Only devices that read or write files to
save or load (`Device.saves_in_thread`) are called in a thread, before the others.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from avmm.threads import in_thread

if TYPE_CHECKING:
    from avmm.parts.parts import Parts


async def saved(parts: Parts) -> dict[str, Any]:
    """The state of a machine that stands still, except its RAM. Raises what `Parts.save`
    raises.
    """
    machine = await in_thread(partial(parts.save_machine, with_memory=False))
    slow = {
        number: await in_thread(device.save)
        for number, device in enumerate(parts.devices)
        if device.saves_in_thread
    }
    return machine | parts.save_devices(slow)


async def load(parts: Parts, state: object) -> None:
    """Load a state into a machine that does not run yet. Raises what `Parts.load` raises. If it is
    cancelled, only a part of the state may be loaded."""
    await in_thread(parts.load_machine, state)
    for device, device_state in parts.device_states(state):
        if device.saves_in_thread:
            await in_thread(device.load, device_state)
        else:
            device.load(device_state)
