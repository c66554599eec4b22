"""What a machine is to be: plain typed data, from Python or from TOML.

Every value is checked here, before anything is created, so that a mistake is told in terms of
what the user wrote. What only the host or the image can tell (too many vCPUs for this KVM, an
image that does not fit) is checked where it shows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypedDict

from avmm.boot import FlatOptions, Mode, Protocol
from avmm.disks.options import DiskOptions
from avmm.errors import ConfigError
from avmm.memory.ram import parse_size
from avmm.options import NetOptions, VsockOptions
from avmm.vcpu.completion import CompletionMode

UNCLAIMED: Final = {
    "ignore": 0,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
"""How loudly accesses that no device claims are reported, by name."""
_MAX_PORT: Final = 0xFFFF
_MAX_CAPABILITY: Final = 0x7FFF_FFFF


class Settings(TypedDict, total=False):
    """The settings of a `MachineConfig`, as keyword arguments of `Machine`."""

    kernel: str | PathLike[str] | None
    initrd: str | PathLike[str] | None
    modules: Sequence[str | PathLike[str]]
    roms: Sequence[str | tuple[int, str | PathLike[str]]]
    cmdline: str
    memory: int | str
    cpus: int
    flat: FlatOptions | str | None
    protocol: Protocol | str
    acpi: bool
    rng: bool
    disks: Sequence[str | DiskOptions]
    balloon: bool
    vsock: VsockOptions | str | Mapping[str, Any] | None
    net: Sequence[NetOptions | str | Mapping[str, Any]]
    debug_exit: int | None
    xen: bool
    unclaimed: str
    completion: str
    completion_capability: int | None
    console: str


@dataclass(frozen=True)
class MachineConfig:
    """A machine's settings; raises `ConfigError` for a value that cannot be meant."""

    kernel: Path | None = None
    """The image to boot (ELF, multiboot, bzImage, flat; may be compressed); None: the bundled
    shell."""
    initrd: Path | None = None
    """Initial RAM disk; the first module of a multiboot image."""
    modules: tuple[Path, ...] = ()
    """More modules, where the image's format knows them."""
    roms: tuple[tuple[int, Path], ...] = ()
    """Files that the guest finds as read-only memory: (address, path), or "ADDRESS=PATH"."""
    cmdline: str = ""
    memory: int = 64 << 20
    """RAM in bytes; may be given as text like "64M"."""
    cpus: int = 1
    flat: FlatOptions | None = None
    """How to enter a raw binary; text "MODE@ADDRESS", like "real@0x7c00"."""
    protocol: Protocol = Protocol.AUTO
    """How a Linux kernel is entered: "auto", "pvh" or "linux64"."""
    acpi: bool = True
    """Tell the guest of CPUs, devices and the power switch by ACPI tables, too."""
    rng: bool = False
    """Give the guest a virtio source of entropy, fed by the host's kernel."""
    disks: tuple[DiskOptions, ...] = ()
    """Files that the guest gets as virtio disks, the first as Linux's vda; text like
    "FILE,ro", "FILE,overlay,serial=root"."""
    balloon: bool = False
    """Give the guest a memory balloon; see `Machine.balloon`. What is free in the guest goes back
    to the host with it, without being asked for."""
    vsock: VsockOptions | None = None
    """Give the guest a socket device; text "cid=3" or "cid=3,unix=PATH"."""
    net: tuple[NetOptions, ...] = ()
    """Network devices; each text like "tap=NAME", "unix=PATH" or "listen=PATH", with
    ",mac=52:54:00:12:34:56" and ",mtu=1500" where that is wanted."""
    debug_exit: int | None = 0xF4
    """Port of QEMU's isa-debug-exit, or None for no such device."""
    xen: bool = False
    """The guest's hypercalls are Xen's, not KVM's, and all answered by `Machine`'s `calls`; see
    `avmm.vcpu.calls`."""
    unclaimed: str = "info"
    """How accesses that no device claims are reported: one of `UNCLAIMED`."""
    completion: str = "auto"
    """Which exits are completed before a state is read: a value of
    `avmm.vcpu.completion.CompletionMode`."""
    completion_capability: int | None = None
    """The number of KVM_CAP_NEEDS_COMPLETION in this host's kernel, where you know that it has
    one; for "auto". `avmm.vcpu.completion` says why avmm believes no number by itself."""
    console: str = "stdio"
    """Where the `avmm` command connects the console; embedders use `Machine.console`."""

    def __post_init__(self) -> None:
        # A frozen dataclass whose fields also accept what people write: they are normalised
        # here, once, so that the rest of the program sees one type each.
        put = object.__setattr__
        for name in ("kernel", "initrd"):
            if (path := getattr(self, name)) is not None:
                put(self, name, _path(name, path))
        for name, (parse, expected) in _LISTS.items():
            if not isinstance(values := getattr(self, name), list | tuple):
                raise ConfigError(f"{name} {values!r}: expected a list {expected}")
            put(self, name, tuple(parse(value) for value in values))
        put(self, "memory", parse_size(self.memory))
        if self.memory <= 0:
            raise ConfigError(
                f"memory of {self.memory} bytes: expected a positive multiple of 4096"
            )
        if isinstance(self.flat, str):
            put(self, "flat", _parse_flat(self.flat))
        if self.flat is not None and not isinstance(self.flat, FlatOptions):
            raise ConfigError(f"flat {self.flat!r}: expected text like 'real@0x7c00'")
        if self.flat is not None and self.kernel is None:
            raise ConfigError(
                "flat: expected a kernel to run so; the bundled shell is no flat one"
            )
        if self.vsock is not None:
            put(self, "vsock", VsockOptions.parse(self.vsock))
        for name in ("acpi", "rng", "balloon", "xen"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} {value!r}: expected true or false")
        try:
            put(self, "protocol", Protocol(self.protocol))
        except ValueError:
            names = ", ".join(protocol.value for protocol in Protocol)
            raise ConfigError(f"protocol {self.protocol!r}: expected one of {names}") from None
        if not isinstance(self.cmdline, str):
            raise ConfigError(f"cmdline {self.cmdline!r}: expected text")
        if not _is_int(self.cpus) or self.cpus < 1:
            raise ConfigError(f"cpus {self.cpus!r}: expected 1 or more")
        if str(self.debug_exit) == "none":  # as the command and TOML, which has no null, say it
            put(self, "debug_exit", None)
        if self.debug_exit is not None and not (
            _is_int(self.debug_exit) and 0 <= self.debug_exit <= _MAX_PORT
        ):
            raise ConfigError(
                f"debug_exit {self.debug_exit!r}: expected a port, 0 to 0xffff, or 'none'"
            )
        if not isinstance(self.unclaimed, str) or self.unclaimed not in UNCLAIMED:
            raise ConfigError(
                f"unclaimed {self.unclaimed!r}: expected one of {', '.join(UNCLAIMED)}"
            )
        if self.completion not in (modes := [mode.value for mode in CompletionMode]):
            raise ConfigError(
                f"completion {self.completion!r}: expected one of {', '.join(modes)}"
            )
        number = self.completion_capability
        if number is not None and not (_is_int(number) and 0 < number <= _MAX_CAPABILITY):
            raise ConfigError(f"completion_capability {number!r}: expected a number above 0")
        if number is not None and self.completion != CompletionMode.AUTO.value:
            raise ConfigError(
                f"completion_capability {number}: with completion {self.completion!r} nobody "
                "looks at it; expected 'auto'"
            )
        if not isinstance(self.console, str):
            raise ConfigError(f"console {self.console!r}: expected text")

    @classmethod
    def make(cls, **settings: Any) -> MachineConfig:
        """A config from `Settings`, TOML's or the command's; names an unknown one."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; known are {', '.join(known)}")
        return cls(**settings)


def read_toml(path: str | PathLike[str]) -> dict[str, Any]:
    """The settings in a TOML file, for `MachineConfig.make`.

    Keys are those of the command's options (`debug-exit = 0xf4`); paths are relative to the
    file. Raises `ConfigError` where the file cannot be read, is no TOML, or has unknown keys.
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
    known = {field.name.replace("_", "-"): field.name for field in fields(MachineConfig)}
    settings = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"config {path}: unknown key {key!r}; known are {', '.join(known)}")
        settings[known[key]] = value
    for name in ("kernel", "initrd"):
        if name in settings:
            settings[name] = path.parent / _path(name, settings[name])
    if isinstance(settings.get("roms"), list):
        roms = [_rom(rom) for rom in settings["roms"]]
        settings["roms"] = [(address, path.parent / rom) for address, rom in roms]
    if isinstance(settings.get("disks"), list):
        disks = [_disk(disk) for disk in settings["disks"]]
        settings["disks"] = [replace(disk, file=path.parent / disk.file) for disk in disks]
    if settings.get("vsock") is not None:
        settings["vsock"] = VsockOptions.parse(settings["vsock"]).beside(path.parent)
    if isinstance(settings.get("net"), list):
        settings["net"] = [NetOptions.parse(net).beside(path.parent) for net in settings["net"]]
    if "modules" in settings:
        if not isinstance(settings["modules"], list):
            raise ConfigError(f"config {path}: modules: expected a list of paths")
        settings["modules"] = [path.parent / _path("modules", p) for p in settings["modules"]]
    return settings


def _rom(rom: object) -> tuple[int, Path]:
    if isinstance(rom, list | tuple) and len(rom) == 2 and _is_int(rom[0]):
        return rom[0], _path("roms", rom[1])
    if isinstance(rom, str):
        text, _, file = rom.partition("=")
        with suppress(ValueError):
            return int(text, 0), _path("roms", file)
    raise ConfigError(f"rom {rom!r}: expected ADDRESS=PATH, like '0xfff00000=bios.bin'")


def _disk(disk: object) -> DiskOptions:
    if isinstance(disk, str):
        return DiskOptions.parse(disk)
    if not isinstance(disk, DiskOptions):
        raise ConfigError(f"disk {disk!r}: expected text like 'root.img,overlay'")
    return disk


_LISTS: Final[dict[str, tuple[Callable[[Any], object], str]]] = {
    "modules": (lambda path: _path("modules", path), "of paths"),
    "roms": (_rom, "like ['0xfff00000=bios.bin']"),
    "disks": (_disk, "like ['root.img,overlay']"),
    "net": (NetOptions.parse, "like ['tap=tap0']"),
}


def _parse_flat(text: str) -> FlatOptions:
    mode, _, address = text.partition("@")
    try:
        return FlatOptions(Mode(mode), int(address, 0))
    except ValueError:
        modes = ", ".join(mode.value for mode in Mode)
        raise ConfigError(
            f"flat {text!r}: expected MODE@ADDRESS with a mode of {modes}, like 'real@0x7c00'"
        ) from None


def _path(name: str, value: object) -> Path:
    if not isinstance(value, str | PathLike) or not str(value):
        raise ConfigError(f"{name} {value!r}: expected a path")
    return Path(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
