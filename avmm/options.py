"""Sizes, disks, networks and sockets as people write them: pure data, checked here once.

Disks, networks and sockets are text, as on the command line ("cid=3,unix=PATH"), or the same as a
table (in TOML) or a mapping. A path that contains a comma needs a table or a mapping.
`avmm.parts.configured` makes devices from these data, and the devices use the bounds that are
declared here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final

from avmm.errors import ConfigError

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# Compiled when they are first used: many programs that import avmm never do.
_SIZE: Final = r"(?ai)\s*(\d{1,20})\s*([KMGT]?)(?:I?B)?\s*"
_MAC: Final = r"(?ai)(?:[0-9a-f]{2}:){5}[0-9a-f]{2}"
_BACKENDS: Final = ("tap", "unix", "listen")
_TOO_LITTLE: Final = 64 << 10
"""Bytes of memory. A user who asks for less has forgotten the unit."""


# -- numbers -------------------------------------------------------------------------------

NO_END: Final = (1 << 63) - 1
"""The `most` of a number without an upper bound."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The whole numbers that are allowed: from `least` to `most`, both included."""

    least: int
    most: int = NO_END
    noun: str = "whole number"
    in_hex: bool = False
    """Is it shown in hexadecimal?"""

    def __contains__(self, number: int) -> bool:
        return self.least <= number <= self.most

    def __str__(self) -> str:
        if self.most == NO_END:
            return f"a {self.noun}, {self.shown(self.least)} or more"
        return f"a {self.noun} from {self.shown(self.least)} to {self.shown(self.most)}"

    def shown(self, number: int) -> str:
        return f"{number:#x}" if self.in_hex and number else str(number)

    def check(self, what: str, value: object) -> int:
        """Return `value` if it is a number within the bounds. Otherwise raises `ConfigError`,
        whose text begins with `what`.
        """
        if isinstance(value, int) and not isinstance(value, bool) and value in self:
            return value
        raise ConfigError(f"{what} {value!r}: expected {self}")


CIDS: Final = Bounds(3, 0xFFFF_FFFE)
"""The CIDs of guests. Lower ones belong to the hypervisor, to loopback and to the host (VIRTIO
1.2, 5.10.4), and all ones means any CID.
"""
MTUS: Final = Bounds(68, 65535)
"""In bytes, from the least that IPv4 demands to the most that the device's configuration can
hold.
"""
DEFAULT_MTU: Final = 1500
IO_PORTS: Final = Bounds(0, 0xFFFF, "port", in_hex=True)


def number_of(text: str) -> int | None:
    """The number in a text like `12` or `0xf4`, as Python and C write it; None if it is not a
    number.
    """
    try:
        return int(text, 0)
    except ValueError:
        return None


def _number(what: str, value: object, bounds: Bounds) -> int:
    number = number_of(value) if isinstance(value, str) else value
    return bounds.check(what, value if number is None else number)


# -- sizes ---------------------------------------------------------------------------------


def parse_size(size: int | str, what: str = "") -> int:
    """The number of bytes in a size as people write it: `67108864`, `"64M"`, `"64MiB"`, `"1g"`.

    Units are powers of 1024; text without a unit means bytes. Raises `ConfigError` if the text is
    not a size. The error names the text, and begins with `what`.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    match = re.fullmatch(_SIZE, size) if isinstance(size, str) else None
    if match is None:
        raise ConfigError(
            f"{what} {size!r} is not a size: expected a number with K, M, G or T, "
            f"like '64M'".lstrip()
        )
    return int(match[1]) * _UNITS[match[2].upper()]


def format_size(size: int) -> str:
    """The shortest text that `parse_size` turns into `size` again, like "64M"."""
    unit = max((u for u in _UNITS if size % _UNITS[u] == 0), key=_UNITS.__getitem__)
    return f"{size // _UNITS[unit]}{unit}" if size else "0"


def meant_by(size: int, multiple: int = 1) -> str:
    """A guess at what the user meant by `size` bytes of memory, as the end of a message: if they
    are too few to be meant, or are not a multiple of `multiple`. Empty if there is no guess.
    """
    if 0 < size < _TOO_LITTLE:
        return f"; did you mean '{size}M'?"  # the unit was forgotten
    if size > 0 and size % multiple:
        return f"; did you mean '{format_size(-(-size // multiple) * multiple)}'?"
    return ""


# -- paths, addresses and tables -----------------------------------------------------------


def check_path(what: str, value: object) -> Path:
    """`value` as a path. Raises `ConfigError`, whose text begins with `what`, if it is not one."""
    if not isinstance(value, str | PathLike) or not str(value):
        raise ConfigError(f"{what} {value!r}: expected a path")
    return Path(value)


def parse_mac(text: object) -> bytes:
    """The 6 bytes of a unicast address like "52:54:00:12:34:56". Raises `ConfigError`."""
    if not isinstance(text, str) or not re.fullmatch(_MAC, text):
        raise ConfigError(f"mac {text!r}: expected six bytes like 52:54:00:12:34:56")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1 or not any(mac):
        raise ConfigError(f"mac {text!r}: expected a unicast address")
    return mac


def _parts(text: str) -> list[str]:
    """The parts of `text` between its commas. Two commas are a comma in a part, as with QEMU."""
    parts = [""]
    at = 0
    while at < len(text):
        if text.startswith(",,", at):
            parts[-1] += ","
            at += 2
            continue
        if text[at] == ",":
            parts.append("")
        else:
            parts[-1] += text[at]
        at += 1
    return parts


def _fields(what: str, value: object, known: tuple[str, ...], expected: str) -> dict[str, Any]:
    """The fields of a table, or of text like "cid=3,unix=PATH". Raises `ConfigError`."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in _parts(value)]
        fields = {name.strip().lower(): text for name, equals, text in pairs if equals and text}
        if len(fields) != len(pairs):
            raise ConfigError(f"{what} {value!r}: {expected}")
    elif isinstance(value, Mapping):
        fields = dict(value)
    else:
        raise ConfigError(f"{what} {value!r}: {expected}")
    for name in fields:
        if name not in known:
            raise ConfigError(f"{what} {value!r}: {name!r} is unknown; {expected}")
    return fields


# -- disks ---------------------------------------------------------------------------------

_DISK_WORDS: Final = "ro, overlay or serial=NAME"
_DISK: Final = f"expected FILE, followed by {_DISK_WORDS} after commas, like 'root.img,overlay'"


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """A file or block device that the guest gets as a disk."""

    file: Path
    read_only: bool = False
    overlay: bool = False
    """The guest's changes are thrown away, and the file is only read."""
    serial: str = ""
    """The serial number that the guest sees. If it is empty, the disk's position makes it "disk0",
    "disk1" and so on.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", check_path("disk file", self.file))
        for name, flag in (("ro", self.read_only), ("overlay", self.overlay)):
            if not isinstance(flag, bool):
                raise ConfigError(f"disk {self.file}: {name} {flag!r}: expected true or false")
        if not isinstance(self.serial, str):
            raise ConfigError(f"disk {self.file}: serial {self.serial!r}: expected text")
        if self.read_only and self.overlay:
            raise ConfigError(f"disk {self.file}: expected ro or overlay, not both")

    @classmethod
    def parse(cls, value: object) -> DiskOptions:
        """Make it from text like "FILE[,ro][,overlay][,serial=NAME]", or from a table with the
        keys `file`, `ro`, `overlay` and `serial`. A comma in FILE is written twice. Raises
        `ConfigError`.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            fields = _fields("disk", value, ("file", "ro", "overlay", "serial"), _DISK)
            if "file" not in fields:
                raise ConfigError(f"disk {value!r}: {_DISK}")
            names = {"ro": "read_only"}
            return cls(**{names.get(name, name): field for name, field in fields.items()})
        file, *words = _parts(value) if isinstance(value, str) else ("",)
        if not file:
            raise ConfigError(f"disk {value!r}: {_DISK}")
        serial = ""
        for word in words:
            if word.startswith("serial=") and word != "serial=":
                serial = word.removeprefix("serial=")
            elif word not in ("ro", "overlay"):
                raise ConfigError(f"disk {file}: unknown option {word!r}; expected {_DISK_WORDS}")
        return cls(Path(file), "ro" in words, "overlay" in words, serial)

    def beside(self, folder: Path) -> DiskOptions:
        """The same, but with its path taken as relative to `folder`."""
        return replace(self, file=folder / self.file)


# -- sockets -------------------------------------------------------------------------------

_VSOCK: Final = "expected cid=NUMBER or cid=NUMBER,unix=PATH"


@dataclass(frozen=True)
class VsockOptions:
    """A socket device: the guest's CID, and the path at which its sockets appear as unix
    sockets.
    """

    cid: int = CIDS.least
    unix: Path | None = None

    def __post_init__(self) -> None:
        CIDS.check("vsock cid", self.cid)
        if self.unix is not None:
            object.__setattr__(self, "unix", check_path("vsock unix", self.unix))

    @classmethod
    def parse(cls, value: object, *, demand_cid: bool = False) -> VsockOptions:
        """Make it from text or a table. Raises `ConfigError` if they are not valid, or, with
        `demand_cid`, if they contain no CID.
        """
        if isinstance(value, cls):
            return value
        fields = _fields("vsock", value, ("cid", "unix"), _VSOCK)
        if demand_cid and "cid" not in fields:
            raise ConfigError(f"vsock {value!r}: {_VSOCK}")
        cid = _number("vsock cid", fields.get("cid", cls.cid), CIDS)
        return cls(cid, fields.get("unix"))

    def beside(self, folder: Path) -> VsockOptions:
        """The same, but with its path taken as relative to `folder`."""
        return replace(self, unix=folder / self.unix) if self.unix is not None else self


# -- networks ------------------------------------------------------------------------------

_NET: Final = (
    "expected one of tap=NAME, unix=PATH and listen=PATH, and perhaps mac=ADDRESS and mtu=N"
)


@dataclass(frozen=True)
class NetOptions:
    """A network device: one of `tap` (an interface's name), `unix` (a socket to connect to) and
    `listen` (a socket to wait at for one peer), and the guest's address and MTU in bytes."""

    tap: str | None = None
    unix: Path | None = None
    listen: Path | None = None
    mac: str | None = None
    mtu: int = DEFAULT_MTU

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in _BACKENDS) != 1:
            raise ConfigError(f"net {str(self)!r}: {_NET}")
        if self.tap is not None and (not isinstance(self.tap, str) or not self.tap):
            raise ConfigError(f"net tap {self.tap!r}: expected the name of an interface")
        for name in ("unix", "listen"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_path(f"net {name}", path))
        if self.mac is not None:
            parse_mac(self.mac)
        MTUS.check("net mtu", self.mtu)

    def __str__(self) -> str:
        """As it is written on the command line."""
        fields = [(name, getattr(self, name)) for name in (*_BACKENDS, "mac")]
        fields += [("mtu", self.mtu)] if self.mtu != DEFAULT_MTU else []
        told = [f"{name}={value}" for name, value in fields if value is not None]
        return ",".join(text.replace(",", ",,") for text in told)

    @classmethod
    def parse(cls, value: object) -> NetOptions:
        """Make it from text or a table. Raises `ConfigError`."""
        if isinstance(value, cls):
            return value
        fields = _fields("net", value, (*_BACKENDS, "mac", "mtu"), _NET)
        if "mtu" in fields:
            fields["mtu"] = _number("net mtu", fields["mtu"], MTUS)
        return cls(**fields)

    def beside(self, folder: Path) -> NetOptions:
        """The same, but with its paths taken as relative to `folder`."""
        unix = folder / self.unix if self.unix is not None else None
        listen = folder / self.listen if self.listen is not None else None
        return replace(self, unix=unix, listen=listen)
