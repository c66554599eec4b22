"""What the settings `vsock` and `net` say: how the guest is linked to the host.

They are text as the command takes it, "cid=3,unix=PATH", or the same as a table (in TOML) or a
mapping. A path with a comma in it needs the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final

from avmm.devices.virtio.net import parse_mac, parse_mtu
from avmm.devices.virtio.vsock import HOST_CID
from avmm.errors import ConfigError

_MOST_CID: Final = 0xFFFF_FFFE
_BACKENDS: Final = ("tap", "unix", "listen")
_EXPECTED: Final = "expected one of tap=NAME, unix=PATH and listen=PATH, then mac=ADDRESS, mtu=N"


@dataclass(frozen=True)
class VsockOptions:
    """A socket device: the guest's number, and where it is found as unix sockets."""

    cid: int = 3
    unix: Path | None = None

    @classmethod
    def parse(cls, value: object, *, demand_cid: bool = False) -> VsockOptions:
        """Raises `ConfigError`; with `demand_cid` also where no CID is said."""
        if isinstance(value, cls):
            return value
        expected = "expected cid=NUMBER or cid=NUMBER,unix=PATH"
        fields = _fields("vsock", value, ("cid", "unix"), expected)
        if demand_cid and "cid" not in fields:
            raise ConfigError(f"vsock {value!r}: {expected}")
        cid = _number("vsock cid", fields.get("cid", 3))
        if not HOST_CID < cid <= _MOST_CID:
            raise ConfigError(f"vsock cid {cid}: expected a number from 3 to {_MOST_CID}")
        return cls(cid, _path("vsock unix", fields["unix"]) if "unix" in fields else None)

    def beside(self, folder: Path) -> VsockOptions:
        """The same, with its path taken as relative to `folder`."""
        return replace(self, unix=folder / self.unix) if self.unix is not None else self


@dataclass(frozen=True)
class NetOptions:
    """A network device: one of `tap` (an interface's name), `unix` (a socket to connect to) and
    `listen` (a socket to wait at for one peer), and the guest's address and MTU."""

    tap: str | None = None
    unix: Path | None = None
    listen: Path | None = None
    mac: str | None = None
    mtu: int = 1500

    @classmethod
    def parse(cls, value: object) -> NetOptions:
        """Raises `ConfigError`."""
        if isinstance(value, cls):
            return value
        fields = _fields("net", value, (*_BACKENDS, "mac", "mtu"), _EXPECTED)
        return cls(
            fields.get("tap"),
            _path("net unix", fields["unix"]) if "unix" in fields else None,
            _path("net listen", fields["listen"]) if "listen" in fields else None,
            fields.get("mac"),
            _number("net mtu", fields.get("mtu", 1500)),
        )

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in _BACKENDS) != 1:
            raise ConfigError(f"net {self}: {_EXPECTED}")
        if self.tap is not None and (not isinstance(self.tap, str) or not self.tap):
            raise ConfigError(f"net tap {self.tap!r}: expected the name of an interface")
        if self.mac is not None:
            parse_mac(self.mac)
        parse_mtu(self.mtu)

    def beside(self, folder: Path) -> NetOptions:
        """The same, with its paths taken as relative to `folder`."""
        unix = folder / self.unix if self.unix is not None else None
        listen = folder / self.listen if self.listen is not None else None
        return replace(self, unix=unix, listen=listen)


def _fields(what: str, value: object, known: tuple[str, ...], expected: str) -> dict[str, Any]:
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",")]
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


def _number(what: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(value, 0) if isinstance(value, str) else int("")
    except ValueError:
        raise ConfigError(f"{what} {value!r}: expected a number") from None


def _path(what: str, value: object) -> Path:
    if not isinstance(value, str | PathLike) or not str(value):
        raise ConfigError(f"{what} {value!r}: expected a path")
    return Path(value)
