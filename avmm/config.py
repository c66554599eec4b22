"""The settings of a machine, from Python or from TOML. Each is declared once.

Every value is checked here, before anything is created, so that an error can name what the user
wrote. Mistakes that depend on the host or the image (too many vCPUs for this KVM, an image that
does not fit) are found later. `avmm.settings` explains what a declaration says. docs/settings.md
lists the settings in a table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypedDict

from avmm import engine
from avmm.boot import FlatOptions, Protocol
from avmm.errors import ConfigError
from avmm.options import IO_PORTS, Bounds, DiskOptions, NetOptions, VsockOptions, parse_mac
from avmm.settings import (
    FlagKind,
    FlatKind,
    ListKind,
    NumberKind,
    OptionalKind,
    OptionsKind,
    PathKind,
    RomKind,
    Setting,
    Side,
    SizeKind,
    TextKind,
    declared,
    named,
    one_of,
    setting,
)
from avmm.vcpu.completion import CompletionMode

UNCLAIMED: Final = {
    "ignore": 0,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
"""The log levels, by name, at which accesses that no device claims are reported. 0 reports
none.
"""


class HostSettings(TypedDict, total=False):
    """The settings of the host's side, which `restore`, `receive` and `Machine.clone` take."""

    disks: Sequence[str | DiskOptions | Mapping[str, object]] | None
    net: Sequence[NetOptions | str | Mapping[str, object]] | None
    vsock: VsockOptions | str | Mapping[str, object] | None
    unclaimed: str
    completion: str
    completion_capability: int | str | None
    clock: str


class Settings(HostSettings, total=False):
    """All settings, as keyword arguments of `Machine`."""

    kernel: str | PathLike[str] | None
    initrd: str | PathLike[str] | None
    modules: Sequence[str | PathLike[str]] | None
    cmdline: str
    flat: FlatOptions | str | None
    protocol: Protocol | str
    roms: Sequence[str | tuple[int, str | PathLike[str]]] | None
    memory: int | str
    cpus: int
    engine: str
    deterministic: int | None
    console: str
    rng: bool
    balloon: bool
    debug_exit: int | str | None
    acpi: bool
    xen: bool


class Clock(Enum):
    """How the clocks of a guest go on that was saved, or has moved."""

    GUEST = "guest"
    """As if no time had passed. Its wall clock is behind by as long as it stood still."""
    HOST = "host"
    """They jump ahead by as long as it stood still, by the hosts' wall clocks, and never back.
    Timers that are set to a time (the TSC deadline) and have run out fire at once; those that
    count down (LAPIC, PIT) go on from where they stood."""


@dataclass(frozen=True)
class MachineConfig:
    """A machine's settings. Raises `ConfigError` for a value that makes no sense.

    Each may be given in the forms that `Settings` allows, and is kept in the one form that its
    type here says.
    """

    kernel: Path | None = setting(
        None,
        OptionalKind(PathKind()),
        Side.BOOT,
        "The image to boot: vmlinux, bzImage, ELF, multiboot or a flat binary; may be compressed. "
        "Without it, the bundled shell is booted.",
        argument="IMAGE",
    )
    initrd: Path | None = setting(
        None, OptionalKind(PathKind()), Side.BOOT, "The initial RAM disk, or the first module."
    )
    modules: tuple[Path, ...] = setting(
        (),
        ListKind(PathKind(), "of paths"),
        Side.BOOT,
        "A further module, for images that take several.",
    )
    cmdline: str = setting("", TextKind(), Side.BOOT, "The guest's command line.")
    flat: FlatOptions | None = setting(
        None,
        OptionalKind(FlatKind()),
        Side.BOOT,
        "The image is a flat binary: the CPU mode in which to enter it, and its address, "
        "like real@0x7c00.",
    )
    protocol: Protocol = setting(
        Protocol.AUTO, one_of(Protocol), Side.BOOT, "The boot protocol for a Linux kernel."
    )
    roms: tuple[tuple[int, Path], ...] = setting(
        (),
        ListKind(RomKind(), "like ['0xfff00000=bios.bin']"),
        Side.BOOT,
        "A file that the guest sees as read-only memory at ADDRESS.",
    )
    """A description of the machine contains the files' contents, so the files are not needed
    again.
    """
    memory: int = setting(64 << 20, SizeKind(), Side.GUEST, "RAM, like 64M or 2G.")
    """In bytes."""
    cpus: int = setting(1, NumberKind(Bounds(1)), Side.GUEST, "Number of vCPUs.", metavar="N")
    engine: str = setting(
        engine.AUTO,
        named(engine.AUTO, *engine.NAMES),
        Side.GUEST,
        "What runs the guest: Linux's KVM, or the software engine, which needs no KVM. auto takes "
        "KVM where it works.",
    )
    """See `avmm.engine`. The machine keeps the engine that auto has taken."""
    deterministic: int | None = setting(
        None,
        OptionalKind(NumberKind(Bounds(0, 0xFFFF_FFFF_FFFF_FFFF))),
        Side.BOOT,
        "Run the guest deterministically, on the software engine: the same seed and the same "
        "inputs give the same run, bit for bit.",
        metavar="SEED",
    )
    """See `avmm.deterministic`. A guest that continues from a saved state does so ordinarily."""
    console: str = setting(
        "stdio",
        TextKind(),
        Side.COMMAND,
        "Where the console goes: stdio, pty, unix:PATH or file:PATH. With virtio, or with "
        "virtio: in front of one of these, the guest's console is hvc0.",
        metavar="TARGET",
        help_again="Where the guest's console (the serial port or hvc0) goes: stdio, pty, "
        "unix:PATH or file:PATH.",
    )
    """Python programs use `Machine.console` instead."""
    disks: tuple[DiskOptions, ...] = setting(
        (),
        ListKind(OptionsKind(DiskOptions), "like ['root.img,overlay']"),
        Side.LINK,
        "A virtio disk (vda, vdb, ...). With ro it is read-only; with overlay the guest's "
        "changes are thrown away.",
        metavar="FILE[,ro][,overlay][,serial=NAME]",
        help_again="The file on this host for one of the guest's disks. Give one for each disk, "
        "in the guest's order.",
    )
    net: tuple[NetOptions, ...] = setting(
        (),
        ListKind(OptionsKind(NetOptions), "like ['tap=tap0']"),
        Side.LINK,
        "A virtio network device. LINK is tap=NAME, unix=PATH or listen=PATH.",
        metavar="LINK[,mac=..][,mtu=..]",
        help_again="The link on this host for one of the guest's network devices. Give one for "
        "each device, in the guest's order. LINK is tap=NAME, unix=PATH or listen=PATH.",
    )
    vsock: VsockOptions | None = setting(
        None,
        OptionalKind(OptionsKind(VsockOptions)),
        Side.LINK,
        "A virtio socket device. The guest's CID is N, and the unix socket at PATH leads to "
        "the guest.",
        metavar="cid=N[,unix=PATH]",
        help_again="The guest's CID, and its unix socket, on this host.",
    )
    rng: bool = setting(
        False,
        FlagKind(),
        Side.GUEST,
        "A virtio entropy device, which gets its random bytes from the host's kernel.",
    )
    balloon: bool = setting(
        False,
        FlagKind(),
        Side.GUEST,
        "A virtio memory balloon. Memory that is free in the guest also goes back to the host.",
    )
    """See `Machine.balloon`."""
    debug_exit: int | None = setting(
        0xF4,
        OptionalKind(NumberKind(IO_PORTS), word="none"),
        Side.GUEST,
        "The port through which the guest ends the run with status (value << 1 | 1), or none.",
        metavar="PORT",
    )
    """QEMU's isa-debug-exit."""
    acpi: bool = setting(
        True,
        FlagKind(),
        Side.GUEST,
        "Describe CPUs, devices and the power switch to the guest in ACPI tables as well.",
    )
    xen: bool = setting(
        False,
        FlagKind(),
        Side.GUEST,
        "The guest's hypercalls are Xen's, not KVM's. The `calls` of `Machine` answers all "
        "of them.",
        no_option="only Python code can answer the hypercalls",
    )
    """See `avmm.vcpu.calls`."""
    unclaimed: str = setting(
        "info",
        named(*UNCLAIMED),
        Side.HOST,
        "The log level for accesses that no device claims.",
    )
    completion: str = setting(
        CompletionMode.AUTO.value,
        named(*(mode.value for mode in CompletionMode)),
        Side.HOST,
        "Which exits are completed before the state is saved.",
    )
    completion_capability: int | None = setting(
        None,
        OptionalKind(NumberKind(Bounds(1, 0x7FFF_FFFF)), word="none"),
        Side.HOST,
        "The number of KVM_CAP_NEEDS_COMPLETION in this host's kernel, if it has that capability.",
    )
    """For "auto". `avmm.vcpu.completion` says why avmm does not trust any number by default."""

    clock: str = setting(
        Clock.GUEST.value,
        named(*(clock.value for clock in Clock)),
        Side.ARRIVAL,
        "The guest's clocks go on from where they were (guest), or from where they would be if "
        "it had run all the time (host).",
    )
    """See `Clock`."""

    def __post_init__(self) -> None:
        # The fields also accept what people write. It is converted here, once, so that the rest of
        # the program sees one type for each field.
        for name, one in SETTINGS.items():
            object.__setattr__(self, name, one.kind.check(name, getattr(self, name)))
        if self.flat is not None and self.kernel is None:
            raise ConfigError(
                "flat: expected a kernel, because the bundled shell is not a flat binary"
            )
        if self.deterministic is not None and self.engine == engine.KVM:
            raise ConfigError(
                f"deterministic {self.deterministic}: KVM cannot run a guest deterministically; "
                f"expected engine {engine.SOFT!r} or {engine.AUTO!r}"
            )
        addresses = [parse_mac(net.mac) for net in self.net if net.mac is not None]
        if twice := {mac for mac in addresses if addresses.count(mac) > 1}:
            raise ConfigError(
                f"net: mac {min(twice).hex(':')} is given twice; expected another one for each "
                "network"
            )
        number, auto = self.completion_capability, CompletionMode.AUTO.value
        if number is not None and self.completion != auto:
            raise ConfigError(
                f"completion_capability {number}: it has no effect with completion "
                f"{self.completion!r}; expected {auto!r}"
            )

    @classmethod
    def make(cls, **settings: Any) -> MachineConfig:
        """Make a config from `Settings`, which may come from Python, TOML or a command. Raises
        `ConfigError` if one is unknown or has a value that makes no sense.
        """
        for name in settings:
            if name not in SETTINGS:
                raise ConfigError(
                    f"unknown setting {name!r}; expected one of {', '.join(SETTINGS)}"
                )
        return cls(**settings)


SETTINGS: Final[Mapping[str, Setting[Any]]] = declared(MachineConfig)
"""The declarations by name, in the order in which they are declared."""
_CANNOT_CHANGE: Final = {
    Side.BOOT: "the guest has booted with it; it cannot be changed",
    Side.GUEST: "the guest has seen it; it cannot be changed",
    Side.COMMAND: "only the avmm command looks at it",
}


def demand_hosts(settings: Mapping[str, object]) -> None:
    """Raise `ConfigError` unless these are `HostSettings`, each with a valid value."""
    hosts = [name for name, one in SETTINGS.items() if one.side.is_hosts]
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ConfigError(f"unknown setting {name!r}; expected one of {', '.join(hosts)}")
        if name not in hosts:
            raise ConfigError(f"{name}: {_CANNOT_CHANGE[SETTINGS[name].side]}")
        SETTINGS[name].kind.check(name, value)


def read_toml(path: str | PathLike[str]) -> dict[str, Any]:
    """The settings in a TOML file, for `MachineConfig.make`.

    The keys are the names of the command's options, such as `debug-exit = 0xf4`; keys of lists are
    in the plural. Paths are relative to the file. Raises `ConfigError`, whose text begins with the
    file's name, if the file cannot be read, is not TOML, or has an unknown key or a value that
    makes no sense.
    """
    import tomllib  # noqa: PLC0415 - only needed here, and slow to import

    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: not UTF-8 text ({error.reason})") from None
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"config {path}: not TOML: {error}") from None
    known = {one.key: one for one in SETTINGS.values()}
    settings = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(
                f"config {path}: unknown key {key!r}; expected one of {', '.join(known)}"
            )
        kind = known[key].kind
        try:
            settings[known[key].name] = kind.beside(kind.check(key, value), path.parent)
        except ConfigError as error:
            raise ConfigError(f"config {path}: {error}") from None
    return settings
