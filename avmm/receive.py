"""`avmm.receive`: a machine that comes from another process."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from avmm import description
from avmm.bus import Placement
from avmm.calls import CallHandler
from avmm.description import Described, Links
from avmm.disks import DiskOptions
from avmm.errors import ConfigError
from avmm.links import NetOptions, VsockOptions
from avmm.machine import Machine, Origin
from avmm.memory import GuestMemory, parse_size
from avmm.placing import Unplaced

logger = logging.getLogger(__name__)

Devices = Sequence[Placement | Unplaced]


@asynccontextmanager
async def receive(
    stream: trio.abc.Stream,
    *,
    devices: Devices | Callable[[Described], Devices] = (),
    calls: CallHandler | None = None,
    disks: Sequence[str | DiskOptions] | None = None,
    net: Sequence[NetOptions | str | Mapping[str, Any]] | None = None,
    vsock: VsockOptions | str | Mapping[str, Any] | None = None,
    most_memory: int | str | None = None,
    stall_seconds: float = 60.0,
    on_round: Callable[[int], object] = lambda number: None,
    **settings: Any,
) -> AsyncIterator[Machine]:
    """`async with avmm.receive(stream) as vm:` the guest that comes over `stream` runs inside.

    The other side is `Machine.migrate`. `devices` and `calls` are those that its machine was made
    with; `devices` may be a function of what the guest turns out to be. Its disks, networks and
    sockets are named here, as many as it has; `settings` are as for `avmm.restore`. A guest with
    more than `most_memory` bytes is refused. `on_round` gets the number of each round of copying
    that has come.

    Raises `MigrationError` where the guest does not come, `StateError` or `ConfigError` where it
    cannot be here; the source is told why, and the guest runs on there. Cancelling it before the
    guest has come does the same. `stream` is the caller's to close.
    """
    from avmm.transfer.destination import Receiver  # noqa: PLC0415 - xxhash and msgpack

    most = None if most_memory is None else parse_size(most_memory)
    links = Links(disks, net, vsock)

    def make(told: Any, needs: Any) -> Machine:
        described = description.read(told, links, **settings)
        size = described.config.memory
        if most is not None and size > most:
            raise ConfigError(f"the guest has {size} bytes of RAM, {most} are allowed")
        origin = Origin(None, partial(GuestMemory, size), described, needs, standby=True)
        chosen = devices(described) if callable(devices) else devices
        return Machine.from_origin(origin, described.config, chosen, calls)

    receiver = Receiver(stream, stall_seconds, make, on_round)
    async with await receiver.receive() as machine:
        try:
            await receiver.confirm()
        except Exception as error:  # whatever a stream raises: the guest is here
            logger.warning("the guest runs here, but its source could not be told: %s", error)
        yield machine
