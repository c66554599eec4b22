"""`avmm.restore`: a machine out of a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

from avmm import description
from avmm.bus import Placement
from avmm.calls import CallHandler
from avmm.description import Described, Links
from avmm.disks import DiskOptions
from avmm.links import NetOptions, VsockOptions
from avmm.machine import Machine, Origin
from avmm.placing import Unplaced

Devices = Sequence[Placement | Unplaced]


def restore(
    path: str | PathLike[str],
    *,
    devices: Devices | Callable[[Described], Devices] = (),
    calls: CallHandler | None = None,
    disks: Sequence[str | DiskOptions] | None = None,
    net: Sequence[NetOptions | str | Mapping[str, Any]] | None = None,
    vsock: VsockOptions | str | Mapping[str, Any] | None = None,
    verify: bool = False,
    **settings: Any,
) -> Machine:
    """The machine of the snapshot at `path`: enter it, and it goes on from there.

    `devices` and `calls` are those that the machine was made with; `devices` may be a function of
    what the machine turns out to be. Its disks, networks and sockets are named anew, as many as it
    has (`avmm.description` says why); disks must hold what they did. Its RAM is mapped from the
    file, which must not be changed while the machine lives. `settings` may be `unclaimed`,
    `completion` and `completion_capability`. `verify` reads all of the file and compares
    checksums.

    Raises `SnapshotError` where the file is no snapshot or damaged, `StateError` where it is not
    of a machine that can be here, `ConfigError` for what is missing. Blocks: a few milliseconds,
    with `verify` as long as reading takes.
    """
    from avmm import snapshot  # noqa: PLC0415 - xxhash and msgpack, for who needs them

    opened = snapshot.read(path, verify=verify)
    try:
        described = description.read(opened.description, Links(disks, net, vsock), **settings)
        origin = Origin(opened.state, opened.open_memory, described)
        chosen = devices(described) if callable(devices) else devices
        return Machine.from_origin(origin, described.config, chosen, calls)
    except BaseException:
        opened.close()
        raise
