"""What a machine is to be: its settings, each declared once, from Python or from TOML.

Every value is checked here, before anything is created, so that a mistake is told in terms of
what the user wrote. What only the host or the image can tell (too many vCPUs for this KVM, an
image that does not fit) is checked where it shows. What a declaration says is in `avmm.settings`;
docs/settings.md has them as a table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypedDict

from avmm.boot import FlatOptions, Protocol
from avmm.errors import ConfigError
from avmm.options import IO_PORTS, Bounds, DiskOptions, NetOptions, VsockOptions
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
"""How loudly accesses that no device claims are reported, by name."""


class HostSettings(TypedDict, total=False):
    """The settings of the host's side, which `restore`, `receive` and `Machine.clone` take."""

    disks: Sequence[str | DiskOptions | Mapping[str, object]] | None
    net: Sequence[NetOptions | str | Mapping[str, object]] | None
    vsock: VsockOptions | str | Mapping[str, object] | None
    unclaimed: str
    completion: str
    completion_capability: int | str | None


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
    console: str
    rng: bool
    balloon: bool
    debug_exit: int | str | None
    acpi: bool
    xen: bool


@dataclass(frozen=True)
class MachineConfig:
    """A machine's settings; raises `ConfigError` for a value that cannot be meant.

    Each may be given as people write it (`Settings`), and is kept in the one form that the types
    here say.
    """

    kernel: Path | None = setting(
        None,
        OptionalKind(PathKind()),
        Side.BOOT,
        "The image to boot: vmlinux, bzImage, ELF, multiboot or a flat binary; may be compressed. "
        "Without one it is the bundled shell.",
        argument="IMAGE",
    )
    initrd: Path | None = setting(
        None, OptionalKind(PathKind()), Side.BOOT, "Initial RAM disk, or the first module."
    )
    modules: tuple[Path, ...] = setting(
        (),
        ListKind(PathKind(), "of paths"),
        Side.BOOT,
        "Another module, where the image takes any.",
    )
    cmdline: str = setting("", TextKind(), Side.BOOT, "The guest's command line.")
    flat: FlatOptions | None = setting(
        None, OptionalKind(FlatKind()), Side.BOOT, "Run the image as it is, like real@0x7c00."
    )
    protocol: Protocol = setting(
        Protocol.AUTO, one_of(Protocol), Side.BOOT, "How a Linux kernel is entered."
    )
    roms: tuple[tuple[int, Path], ...] = setting(
        (),
        ListKind(RomKind(), "like ['0xfff00000=bios.bin']"),
        Side.BOOT,
        "A file that the guest finds as read-only memory at ADDRESS.",
    )
    """What was read is in a description of the machine; the files are not needed again."""
    memory: int = setting(64 << 20, SizeKind(), Side.GUEST, "RAM, like 64M or 2G.")
    """In bytes."""
    cpus: int = setting(1, NumberKind(Bounds(1)), Side.GUEST, "Number of vCPUs.", metavar="N")
    console: str = setting(
        "stdio",
        TextKind(),
        Side.COMMAND,
        "Where the console goes: stdio, pty, unix:PATH or file:PATH. With virtio, or virtio: "
        "before one of these, it is hvc0.",
        metavar="TARGET",
        help_anew="Where the guest's console goes, be it the serial port or hvc0: stdio, pty, "
        "unix:PATH or file:PATH.",
    )
    """Embedders use `Machine.console`."""
    disks: tuple[DiskOptions, ...] = setting(
        (),
        ListKind(OptionsKind(DiskOptions), "like ['root.img,overlay']"),
        Side.LINK,
        "A virtio disk (vda, vdb, ...); ro: read-only, overlay: changes are thrown away.",
        metavar="FILE[,ro][,overlay][,serial=NAME]",
        help_anew="What a disk of the guest's is here, one for each that it has, in its order.",
    )
    net: tuple[NetOptions, ...] = setting(
        (),
        ListKind(OptionsKind(NetOptions), "like ['tap=tap0']"),
        Side.LINK,
        "A virtio network device; LINK is tap=NAME, unix=PATH or listen=PATH.",
        metavar="LINK[,mac=..][,mtu=..]",
        help_anew="What a network device of the guest's is linked to here, one for each that it "
        "has, in its order; LINK is tap=NAME, unix=PATH or listen=PATH.",
    )
    vsock: VsockOptions | None = setting(
        None,
        OptionalKind(OptionsKind(VsockOptions)),
        Side.LINK,
        "A virtio socket device; the guest's CID is N, and PATH is where unix sockets lead to it.",
        metavar="cid=N[,unix=PATH]",
        help_anew="What the guest's socket device is here.",
    )
    rng: bool = setting(
        False, FlagKind(), Side.GUEST, "A virtio source of entropy, fed by the host's kernel."
    )
    balloon: bool = setting(
        False,
        FlagKind(),
        Side.GUEST,
        "A virtio memory balloon; the guest's free memory goes back to the host, too.",
    )
    """See `Machine.balloon`."""
    debug_exit: int | None = setting(
        0xF4,
        OptionalKind(NumberKind(IO_PORTS), word="none"),
        Side.GUEST,
        "Port that ends the run with status (value << 1 | 1), or none.",
        metavar="PORT",
    )
    """QEMU's isa-debug-exit."""
    acpi: bool = setting(
        True,
        FlagKind(),
        Side.GUEST,
        "Tell the guest of CPUs, devices and the power switch by ACPI tables, too.",
    )
    xen: bool = setting(
        False,
        FlagKind(),
        Side.GUEST,
        "The guest's hypercalls are Xen's, not KVM's, and all answered by `Machine`'s `calls`.",
        no_option="only Python code can answer the hypercalls",
    )
    """See `avmm.vcpu.calls`."""
    unclaimed: str = setting(
        "info",
        named(*UNCLAIMED),
        Side.HOST,
        "Level at which accesses that no device claims are reported.",
    )
    completion: str = setting(
        CompletionMode.AUTO.value,
        named(*(mode.value for mode in CompletionMode)),
        Side.HOST,
        "Which exits are completed before a state is saved.",
    )
    completion_capability: int | None = setting(
        None,
        OptionalKind(NumberKind(Bounds(1, 0x7FFF_FFFF)), word="none"),
        Side.HOST,
        "KVM_CAP_NEEDS_COMPLETION's number in this host's kernel, if it has one.",
    )
    """For "auto". `avmm.vcpu.completion` says why avmm believes no number by itself."""

    def __post_init__(self) -> None:
        # A frozen dataclass whose fields also accept what people write: they are normalised
        # here, once, so that the rest of the program sees one type each.
        for name, one in SETTINGS.items():
            object.__setattr__(self, name, one.kind.check(name, getattr(self, name)))
        if self.flat is not None and self.kernel is None:
            raise ConfigError(
                "flat: expected a kernel to run so; the bundled shell is no flat one"
            )
        number, auto = self.completion_capability, CompletionMode.AUTO.value
        if number is not None and self.completion != auto:
            raise ConfigError(
                f"completion_capability {number}: with completion {self.completion!r} nobody "
                f"looks at it; expected {auto!r}"
            )

    @classmethod
    def make(cls, **settings: Any) -> MachineConfig:
        """A config from `Settings`, TOML's or the command's. Raises `ConfigError` where one is
        unknown."""
        for name in settings:
            if name not in SETTINGS:
                raise ConfigError(f"unknown setting {name!r}; known are {', '.join(SETTINGS)}")
        return cls(**settings)


SETTINGS: Final[Mapping[str, Setting[Any]]] = declared(MachineConfig)
"""The declarations, by name, in their order."""
_CANNOT_CHANGE: Final = {
    Side.BOOT: "the guest has booted with it; it cannot be changed",
    Side.GUEST: "the guest has seen it; it cannot be changed",
    Side.COMMAND: "only the avmm command looks at it",
}


def demand_hosts(settings: Mapping[str, object]) -> None:
    """Raise `ConfigError` unless these are `HostSettings`, each with a value that can be."""
    hosts = [name for name, one in SETTINGS.items() if one.side.is_hosts]
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ConfigError(f"unknown setting {name!r}; known here are {', '.join(hosts)}")
        if name not in hosts:
            raise ConfigError(f"{name}: {_CANNOT_CHANGE[SETTINGS[name].side]}")
        SETTINGS[name].kind.check(name, value)


def read_toml(path: str | PathLike[str]) -> dict[str, Any]:
    """The settings in a TOML file, for `MachineConfig.make`.

    Keys are those of the command's options, lists in the plural (`debug-exit = 0xf4`); paths are
    relative to the file. Raises `ConfigError`, which begins with the file, where it cannot be
    read, is no TOML, or has an unknown key or a value that cannot be.
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
            raise ConfigError(f"config {path}: unknown key {key!r}; known are {', '.join(known)}")
        kind = known[key].kind
        try:
            settings[known[key].name] = kind.beside(kind.check(key, value), path.parent)
        except ConfigError as error:
            raise ConfigError(f"config {path}: {error}") from None
    return settings
