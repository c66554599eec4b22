"""Describes a machine so that one like it can be made: for snapshots, migration and clones.

A description is plain data. It is compared before anything of the guest is touched: the sizes and
devices must be the same, or the guest would suddenly run on a different computer. The sizes of its
disks must be the same too: a wrong size is refused before a migration has sent any memory.

**Whoever loads a machine names everything that lies outside it.** Files, interfaces and sockets
belong to a host, and a description may come from anybody, so no path in it is ever opened. A
description says how many disks and networks the guest has, and what the guest knows of them (size,
serial number, MAC). The settings `disks`, `net` and `vsock` say what they are on this host. An
error names what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, TypeVar

from avmm import engine
from avmm.bus.space import Placement
from avmm.config import SETTINGS, HostSettings, MachineConfig, demand_hosts
from avmm.devices.virtio.block import VirtioBlock
from avmm.devices.virtio.mmio import VirtioMmio
from avmm.devices.virtio.net import Net
from avmm.errors import AvmmError, ConfigError, StateError
from avmm.options import DiskOptions, NetOptions, VsockOptions
from avmm.plain import (
    ANYTHING,
    FLAG,
    U32,
    U64,
    Bytes,
    Fields,
    ListOf,
    MappingOf,
    Nested,
    OneOf,
    OrMissing,
    OrNone,
    Row,
    Text,
)

_Model = TypeVar("_Model", VirtioBlock, Net)

STATE_VERSION: Final = 2
"""The version of a machine's state (`avmm.parts.parts`). The description contains it, and arrives
before RAM and the state. So a state that cannot be read here is refused at once.
"""
_TOLD: Final = tuple(
    name for name, setting in SETTINGS.items() if setting.side.is_told and name != "engine"
)
"""The settings in a description: those that the guest has seen, and those of the host's side,
which apply unless the user chooses others. The engine has a field of its own, because descriptions
of earlier versions do not have it.
"""
_LONGEST_NAME: Final = 64
_MOST_NAMES: Final = 8
"""A message shows at most this many names, each cut to that length."""
Entry: TypeAlias = tuple[str, str, int, int, int | None]
"""[name, space, base, size, interrupt] of a device's region."""


class _Disk(Fields):
    name = Text()
    """The file's name, which is shown to people. It is never opened."""
    size = U64
    read_only = FLAG
    overlay = FLAG
    serial = Text()


class _Net(Fields):
    mac = Text(least=17, most=17)
    mtu = U32


class _Description(Fields, version=2):
    state = U32
    """The version of the state that goes with it."""
    settings = MappingOf(_TOLD, ANYTHING)
    """`MachineConfig` checks the values."""
    disks = ListOf(Nested(_Disk, "a disk"))
    nets = ListOf(Nested(_Net, "a network device"))
    vsock = OrNone(U32)
    hvc = FLAG
    roms = ListOf(Row(U64, Bytes()))
    """[address, contents] of each read-only region."""
    devices = ListOf(Row(Text(), OneOf("pio", "mmio", "msr"), U64, U64, OrNone(U32)))
    levels = OrMissing(ListOf(U32))
    """The interrupts that are level-triggered, in the order of their devices."""
    engine = OrMissing(OneOf(*engine.NAMES))
    """The engine on which the guest runs. Missing: KVM."""


def describe(
    config: MachineConfig, places: Sequence[Placement], roms: Sequence[tuple[int, bytes]]
) -> dict[str, Any]:
    """The description of a machine with this config, these devices and these read-only regions."""
    blocks = _last(VirtioBlock, len(config.disks), places)
    nets = _last(Net, len(config.net), places)
    levels = _levels(places)
    return _Description.plain(
        **({"levels": levels} if levels else {}),
        **({} if config.engine in (engine.KVM, engine.AUTO) else {"engine": config.engine}),
        state=STATE_VERSION,
        settings={name: getattr(config, name) for name in _TOLD},
        disks=[
            _Disk.plain(
                # A path may contain bytes that are not text.
                name=os.fsencode(options.file.name).decode(errors="replace"),
                size=block.disk.size,
                read_only=options.read_only,
                overlay=options.overlay,
                serial=options.serial,
            )
            for options, block in zip(config.disks, blocks, strict=True)
        ],
        nets=[_Net.plain(mac=net.mac.hex(":"), mtu=net.mtu) for net in nets],
        vsock=None if config.vsock is None else config.vsock.cid,
        hvc=config.console.startswith("virtio"),
        roms=[[gpa, data] for gpa, data in roms],
        devices=[list(entry) for entry in _entries(places)],
    )


def _levels(places: Sequence[Placement]) -> list[int]:
    return [place.irq for place in places if place.level and place.irq is not None]


def _entries(places: Sequence[Placement]) -> list[Entry]:
    return [(p.device.name, p.space, p.base, p.size, p.irq) for p in places]


@dataclass(frozen=True)
class Described:
    """A description that was read: the config of a machine like it, and its read-only regions."""

    config: MachineConfig
    roms: tuple[tuple[int, bytes], ...]
    has_hvc: bool
    """Does the `avmm` command give the guest a virtio console?"""
    devices: list[Entry]
    disk_sizes: tuple[int, ...]
    levels: list[int]

    def demand_devices(self, places: Sequence[Placement]) -> None:
        """Raise `StateError` if these are not the guest's devices, and `ConfigError` if a disk
        (they are open by now) has another size than the guest's.
        """
        here = _entries(places)
        for theirs, ours in zip(self.devices, here, strict=False):
            if theirs != ours:
                raise StateError(
                    f"the guest has {_device(theirs)}, but this machine has {_device(ours)}"
                )
        if len(self.devices) != len(here):
            more = self.devices[len(here) :] or here[len(self.devices) :]
            side = (
                "this machine does not have it"
                if len(self.devices) > len(here)
                else "the guest does not have it"
            )
            raise StateError(f"{_device(more[0])}: {side}")
        if self.levels != (levels := _levels(places)):
            raise StateError(
                f"the guest has the level-triggered interrupts {self.levels}, but this machine "
                f"has {levels}"
            )
        blocks = _last(VirtioBlock, len(self.disk_sizes), places)
        for size, block in zip(self.disk_sizes, blocks, strict=True):
            if size != block.disk.size:
                raise ConfigError(
                    f"disk {block.disk.name}: it has {block.disk.size} bytes, but the guest's "
                    f"disk has {size}"
                )


def read(description: object, settings: HostSettings, *, own_addresses: bool = False) -> Described:
    """Read a description, and say what it means on this host. It is hostile input.

    The settings `disks`, `net` and `vsock` say what the guest's devices are on this host, with one
    entry for each. Other `settings` replace those in the description. Raises `StateError` if it is
    not a description, and `ConfigError` if `settings` are invalid or lack something that the guest
    needs. With `own_addresses` that includes MAC addresses, because the described machine goes on
    running.
    """
    demand_hosts(settings)
    told = _Description.read("the machine's description", description)
    if told.state != STATE_VERSION:
        raise told.wrong("state", f"{STATE_VERSION}, the version of states that this avmm reads")
    try:  # without the caller's settings, so that an error here is the description's fault
        MachineConfig.make(**told.settings)
    except (AvmmError, TypeError) as error:
        raise StateError(f"the description has an invalid setting: {error}") from None
    chosen: dict[str, object] = {**told.settings, **settings}
    chosen |= {
        "engine": told.engine or engine.KVM,
        "disks": _disks(told.disks, settings.get("disks") or ()),
        "net": _nets(told.nets, settings.get("net") or (), own_addresses),
        "vsock": _vsock(told.vsock, settings.get("vsock")),
    }
    if told.hvc:
        # Otherwise the description of the machine made here would not mention the console.
        chosen["console"] = "virtio"
    config = MachineConfig.make(**chosen)
    sizes = tuple(disk.size for disk in told.disks)
    levels = told.levels or []
    return Described(config, tuple(told.roms), told.hvc, told.devices, sizes, levels)


def _last(kind: type[_Model], count: int, places: Sequence[Placement]) -> list[_Model]:
    """The last `count` devices of this kind. They are those that the settings ask for, because
    these come after the caller's own.
    """
    devices = [place.device for place in places]
    models = [device.model for device in devices if isinstance(device, VirtioMmio)]
    found = [model for model in models if isinstance(model, kind)]
    return found[len(found) - count :]


def _disks(told: list[_Disk], links: Sequence[object]) -> list[DiskOptions]:
    if len(told) != len(links):
        names = ", ".join(_shown(disk) for disk in told[:_MOST_NAMES]) or "none"
        names += ", ..." if len(told) > _MOST_NAMES else ""
        raise ConfigError(
            f"the guest has {_count(told, 'disk')} ({names}); expected `disks` to have a "
            f"file on this host for each of them, got {len(links)}"
        )
    result = []
    for disk, link in zip(told, links, strict=True):
        options = DiskOptions.parse(link)
        if options.read_only != disk.read_only:
            how = "read-only" if disk.read_only else "writable"
            raise ConfigError(f"disk {options.file}: the guest's {_shown(disk)} is {how}")
        if options.overlay != disk.overlay:
            how = "an overlay" if disk.overlay else "no overlay"
            raise ConfigError(f"disk {options.file}: {_shown(disk)} is {how}")
        result.append(replace(options, serial=options.serial or disk.serial))
    return result


def _nets(told: list[_Net], links: Sequence[object], own_addresses: bool) -> list[NetOptions]:
    if len(told) != len(links):
        raise ConfigError(
            f"the guest has {_count(told, 'network device')}: expected `net` to say what each "
            f"is linked to here, got {len(links)}"
        )
    options = [NetOptions.parse(link) for link in links]
    for option, net in zip(options, told, strict=True):
        if own_addresses and option.mac is None:
            raise ConfigError(
                f"net {str(option)!r}: expected its mac=ADDRESS; the guest's is {net.mac!r}"
            )
        if option.mtu not in (NetOptions.mtu, net.mtu):
            raise ConfigError(f"net mtu {option.mtu}: the guest's MTU is {net.mtu}")
    try:
        return [
            replace(option, mac=option.mac or net.mac, mtu=net.mtu)
            for option, net in zip(options, told, strict=True)
        ]
    except ConfigError as error:
        raise StateError(f"the description has an invalid network device: {error}") from None


def _vsock(cid: int | None, link: object) -> VsockOptions | None:
    if cid is None:
        if link is not None:
            raise ConfigError("vsock: the guest has no socket device")
        return None
    if link is None:
        raise ConfigError(
            f"the guest has a socket device, with CID {cid}: expected vsock to say its CID here"
        )
    return VsockOptions.parse(link, demand_cid=True)


def _shown(disk: _Disk) -> str:
    return repr(disk.name[:_LONGEST_NAME])


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}" + "s" * (len(things) != 1)


def _device(entry: Entry) -> str:
    name, space, base, size, irq = entry
    shown = name[:_LONGEST_NAME] if name.isprintable() else "a device"
    interrupt = "no interrupt" if irq is None else f"interrupt {irq}"
    return f"{shown} at {space} {base:#x} ({size} bytes, {interrupt})"
