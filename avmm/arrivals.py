"""Arrivals: machines that continue from a snapshot, or come from another process."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from importlib import import_module
from os import PathLike
from typing import Unpack

import trio

from avmm.bus.space import Placement
from avmm.config import HostSettings, demand_hosts
from avmm.ctrl_c import context
from avmm.errors import ConfigError
from avmm.machine import Machine, machine_from, machine_of
from avmm.memory.layout import RamLayout
from avmm.memory.ram import GuestMemory
from avmm.options import parse_size
from avmm.parts import Origin, Parts, build, description
from avmm.parts.description import Described
from avmm.parts.placing import Unplaced
from avmm.runstate import Life
from avmm.threads import in_thread
from avmm.vcpu.calls import CallHandler

logger = logging.getLogger(__name__)

Devices = Sequence[Placement | Unplaced]


def restore(
    path: str | PathLike[str],
    *,
    devices: Devices | Callable[[Described], Devices] = (),
    calls: CallHandler | None = None,
    verify: bool = False,
    **settings: Unpack[HostSettings],
) -> Machine:
    """A machine that continues from the snapshot at `path` when you enter it.

    `devices` and `calls` must be those with which the machine was made. `devices` may also be a
    function that gets the machine's description and returns the devices. `settings` are the
    settings of the host's side: `disks`, `net` and `vsock` must be named again, as many as the
    machine has (`avmm.parts.description` says why), and the disks must hold what they held before.
    `unclaimed`, `completion` and `completion_capability` stay as they were unless you give them.
    RAM is mapped from the file, which must not be changed while the machine exists. With `verify`,
    the whole file is read and its checksums are compared.

    Raises `ConfigError` for impossible settings. Nothing is opened before the machine is entered.
    Entering it reads the file in a thread, and can be cancelled. It raises `SnapshotError` if the
    file is not a snapshot or is damaged, `StateError` if the machine cannot run on this host,
    `ConfigError` for missing settings, and what entering a `Machine` raises.
    """
    demand_hosts(settings)  # not as late as when the file is read
    life = Life()

    async def open_and_build() -> Parts:
        await in_thread(import_module, "avmm.snapshot")  # reads files, too
        from avmm import snapshot  # noqa: PLC0415 - imports xxhash and msgpack, which few need

        check_cancelled = trio.from_thread.check_cancelled
        read = partial(snapshot.read, path, verify=verify, on_chunk=check_cancelled)
        opened = await in_thread(read)
        try:
            described = description.read(opened.description, settings)
            origin = Origin(opened.state, opened.open_memory, described)
            chosen = devices(described) if callable(devices) else devices
            return await build(described.config, chosen, life.end, calls, origin)
        finally:
            opened.close()  # already closed if its RAM was mapped

    return machine_from(life, open_and_build)


@context
async def receive(
    stream: trio.abc.Stream,
    *,
    devices: Devices | Callable[[Described], Devices] = (),
    calls: CallHandler | None = None,
    most_memory: int | str | None = None,
    stall_seconds: float = 60.0,
    on_round: Callable[[int], object] = lambda number: None,
    **settings: Unpack[HostSettings],
) -> AsyncIterator[Machine]:
    """`async with avmm.receive(stream) as vm:` receives a guest over `stream`, which runs inside
    the block.

    The other side is `Machine.migrate`. `devices` and `calls` must be those with which its machine
    was made. `devices` may also be a function that gets the guest's description and returns the
    devices. `settings` are the settings of the host's side, as for `avmm.restore`. A guest with
    more than `most_memory` bytes of RAM is refused. The line counts as dead if nothing comes for
    `stall_seconds`. `on_round` is called with the number of each round of copying that has come.

    Raises `MigrationError` if the guest does not come, and `StateError` or `ConfigError` if it
    cannot run here. In each case the source is told why, and the guest runs on there. Cancelling
    this before the guest has come does the same. The caller must close `stream`.
    """
    await in_thread(import_module, "avmm.transfer.destination")  # reads files
    from avmm.transfer.destination import Receiver  # noqa: PLC0415 - imports xxhash and msgpack

    most = None if most_memory is None else parse_size(most_memory, "most_memory")
    demand_hosts(settings)  # not as late as when the guest has come

    life = Life()

    async def make(told: object, needs: object) -> Parts:
        described = description.read(told, settings)
        size = described.config.memory
        if most is not None and size > most:
            raise ConfigError(
                f"the guest has {size} bytes of RAM; expected at most {most} (most_memory)"
            )
        fresh = partial(_fresh_memory, size)
        origin = Origin(None, fresh, described, needs, standby=True)
        chosen = devices(described) if callable(devices) else devices
        return await build(described.config, chosen, life.end, calls, origin)

    receiver = Receiver(stream, stall_seconds, make, on_round)
    async with machine_of(await receiver.receive(), life) as machine:
        try:
            await receiver.confirm()
        except Exception as error:  # a stream may raise anything, and the guest is here already
            logger.warning("the guest runs here, but its source could not be told: %s", error)
        yield machine


def _fresh_memory(size: int, layout: RamLayout) -> GuestMemory:
    return GuestMemory(size, layout=layout)
