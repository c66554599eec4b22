"""Where a guest goes to or comes from, as text: unix:PATH, tcp:HOST:PORT or fd:N."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from avmm.errors import ConfigError

_MOST_FD: Final = 0x7FFF_FFFF


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed TARGET."""

    kind: str
    """unix, tcp or fd."""
    path: str = ""
    host: str = ""
    port: int = 0
    fd: int = -1

    @classmethod
    def parse(cls, text: str, *, fd: bool = True) -> Target:
        """Parse a target. Raises `ConfigError` if the text is not one. Without `fd`, fd:N is
        refused too, because a descriptor means nothing to another process."""
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest and "\0" not in rest:
            return cls(kind, path=rest)
        if kind == "fd" and fd and _is_number(rest, _MOST_FD):
            return cls(kind, fd=int(rest))
        host, _, port = rest.rpartition(":")
        if host[:1] + host[-1:] == "[]":  # an IPv6 address has colons itself
            host = host[1:-1]
        if kind == "tcp" and _is_host(host) and _is_number(port, 0xFFFF):
            return cls(kind, host=host, port=int(port))
        expected = "unix:PATH, tcp:HOST:PORT or fd:N" if fd else "unix:PATH or tcp:HOST:PORT"
        raise ConfigError(f"target {text!r}: expected {expected}")

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "fd":
            return f"fd:{self.fd}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


def _is_host(text: str) -> bool:
    """Can this name be looked up? Whether the host exists is not checked here."""
    try:
        return bool(text) and "\0" not in text and bool(text.encode("idna"))
    except UnicodeError:  # a part of it is empty, or too long
        return False


def _is_number(text: str, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(most)) and int(text) <= most
