"""A machine's state, saved and loaded without keeping trio's thread.

**KVM's part** is dozens of calls into the kernel. They are made in a thread, while the vCPUs stand
still.

**Devices** are asked in trio's thread, all in one go. vCPUs and the guest's requests stand still
meanwhile, but the program's other tasks do not: they read consoles and write to sockets, and
whatever they do has to be in a state whole or not at all. Only a device that says that it reads or
writes files for it (`Device.saves_in_thread`) is asked in a thread, and before the others.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from avmm.threads import in_thread

if TYPE_CHECKING:
    from avmm.parts.parts import Parts


async def saved(parts: Parts) -> dict[str, Any]:
    """The state, all but RAM, of a machine that stands still. Raises as `Parts.save`."""
    machine = await in_thread(partial(parts.save_machine, with_memory=False))
    slow = {
        number: await in_thread(device.save)
        for number, device in enumerate(parts.devices)
        if device.saves_in_thread
    }
    return machine | parts.save_devices(slow)


async def load(parts: Parts, state: object) -> None:
    """Take over a state, in a machine that does not run yet. Raises as `Parts.load`.
    Cancelled, it has taken over part of it."""
    await in_thread(parts.load_machine, state)
    for device, device_state in parts.device_states(state):
        if device.saves_in_thread:
            await in_thread(device.load, device_state)
        else:
            device.load(device_state)
