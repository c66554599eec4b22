"""TLS for a guest that moves between two hosts. Each side proves who it is.

Both sides show a certificate, and each accepts only one that its `ca` has signed. The side that
connects also compares the name in the certificate with the HOST that it connects to, or with
`peer`. The side that listens accepts any name, unless `peer` says which one. Both speak TLS 1.3
only.

**Both sides are told why.** OpenSSL prepares an alert for the other side when a handshake fails,
and trio does not send it, so it is sent here. A source that speaks no TLS is told in its own
protocol, and one that speaks TLS to a receiver that does not, by an alert.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, Final

import trio

from avmm.errors import ConfigError, MigrationError

_NAME: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?")
_LAST_SECONDS: Final = 1.0
_CHUNK: Final = 1 << 16
_NOT_SIGNED: Final = (18, 19, 20, 21)
"""OpenSSL's codes (x509_vfy.h) for a certificate of an unknown authority."""
_NOT_ACCEPTED: Final = "the other side does not accept this side's certificate{own}"
_REASONS: Final[Mapping[str, str]] = {
    "WRONG_VERSION_NUMBER": "the other side does not speak TLS; expected one that was given "
    "--tls-cert, --tls-key and --tls-ca",
    "HTTP_REQUEST": "the other side speaks HTTP, and not TLS",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the other side does not speak TLS 1.3; it may not have been "
    "given --tls-cert, --tls-key and --tls-ca",
    "TLSV1_ALERT_UNKNOWN_CA": f"{_NOT_ACCEPTED}: its --tls-ca has not signed it",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": f"{_NOT_ACCEPTED}: it has expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": f"{_NOT_ACCEPTED}: it may be for another name than the other "
    "side's HOST or --tls-peer",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _NOT_ACCEPTED,
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the other side wants a certificate (--tls-cert)",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the other side has shown no certificate (--tls-cert)",
}
"""OpenSSL's reasons that users meet, in their words."""
SPEAKS_NO_TLS: Final = bytes([21, 3, 3, 0, 2, 2, 70])
"""An alert record: fatal, protocol_version (RFC 8446, 6)."""
HANDSHAKE: Final = 22
"""The first byte of a connection with TLS (RFC 8446, 5.1)."""
CALLED_SECONDS: Final = 4.0
CALLING_SECONDS: Final = 10.0
"""How long a handshake may take. The side that connects has more patience: the other side may have
to wait first for a peer that says nothing."""


@dataclass(frozen=True, slots=True)
class Tls:
    """How this side proves who it is, and whom it trusts: the paths of three files in PEM.

    `avmm.connect` and `avmm.listen` take it, and say what they check with it.
    """

    cert: str | PathLike[str]
    """This side's certificate, followed by any intermediate certificates."""
    key: str | PathLike[str]
    """The private key of `cert`; it must not be encrypted."""
    ca: str | PathLike[str]
    """The certificate of the authority that signs the other side's certificate."""
    peer: str | None = None
    """The name (DNS or IP address) that the other side's certificate must be for. None is HOST for
    who connects, and any name for who listens."""

    def __post_init__(self) -> None:
        if (
            self.peer is not None
            and _address(self.peer) is None
            and not _NAME.fullmatch(self.peer)
        ):
            raise ConfigError(f"TLS: peer {self.peer!r}: expected a DNS name or an IP address")

    def context(self, *, server: bool) -> ssl.SSLContext:
        """The same as a context of Python's `ssl` module: for the side that listens if `server`,
        else for the side that connects. Blocks while it reads the files. Raises `ConfigError`,
        which names the file, if one of them cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except OSError as error:  # ssl.SSLError is one
            files = f"{fspath(self.cert)} with {fspath(self.key)}"
            raise ConfigError(f"TLS: {files}: {why(error)}") from None
        try:
            context.load_verify_locations(self.ca)
        except OSError as error:
            raise ConfigError(f"TLS: {fspath(self.ca)}: {why(error)}") from None
        return context


def _no_password() -> str:
    raise ssl.SSLError(ssl.SSL_ERROR_SSL, "the key is encrypted; expected one that is not")


async def shake_hands(
    stream: trio.SSLStream[trio.SocketStream], peer: object, most_seconds: float, tls: Tls
) -> None:
    """Let each side prove who it is. Raises `MigrationError`, which names `peer`, if that fails or
    takes longer than `most_seconds`. If it fails or is cancelled, `stream` is closed, and the
    other side is told why if it fails."""
    reason = f"no handshake within {most_seconds:g} s"
    done = False
    try:
        with trio.move_on_after(most_seconds):
            await stream.do_handshake()
            done = True
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        reason = why(cause, tls) if isinstance(cause, OSError) else str(cause or error)
        await _alert(stream)
    finally:
        if not done:
            await trio.aclose_forcefully(stream)
    if not done:
        raise MigrationError(f"{peer}: TLS: {reason}")


async def _alert(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Send the alert that OpenSSL has prepared for the other side. trio keeps what is to be sent
    in an attribute of its own, and drops it if a handshake fails."""
    pending = getattr(stream, "_outgoing", None)
    if isinstance(pending, ssl.MemoryBIO) and pending.pending:
        await last_words(stream.transport_stream, pending.read())


async def last_words(stream: trio.SocketStream, data: bytes) -> None:
    """Send `data`, and close the stream when the other side has had the time to read it. What the
    other side has sent meanwhile is read, because the kernel would send a reset for it, and that
    would overtake `data`."""
    with (
        trio.move_on_after(_LAST_SECONDS, shield=True),
        suppress(trio.BrokenResourceError, trio.ClosedResourceError),
    ):
        await stream.send_all(data)
        await stream.send_eof()
        while await stream.receive_some(_CHUNK):
            pass
    await trio.aclose_forcefully(stream)


def is_named(certificate: Mapping[str, Any] | None, name: str) -> bool:
    """Is this certificate, as `ssl` tells it, for `name`? Wildcards are not understood."""
    names = (certificate or {}).get("subjectAltName", ())
    address = _address(name)
    if address is not None:
        return any(kind == "IP Address" and _address(found) == address for kind, found in names)
    return any(kind == "DNS" and found.lower() == name.lower() for kind, found in names)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.strip())
    except ValueError:
        return None


def why(error: OSError, tls: Tls | None = None) -> str:
    """The error in words for people. `tls` is this side's, whose files the words name."""
    own = f" ({fspath(tls.cert)})" if tls is not None else ""
    if isinstance(error, ssl.SSLCertVerificationError):
        text = f"the other side's certificate: {error.verify_message}"
        if error.verify_code in _NOT_SIGNED and tls is not None:
            text += f"; it is not signed by {fspath(tls.ca)} (--tls-ca)"
        return text
    if isinstance(error, ssl.SSLEOFError):
        return (
            "the other side closed the connection and gave no reason; it may not accept this "
            f"side's certificate{own}"
        )
    if isinstance(error, ssl.SSLError):
        reason = str(error.reason or error.strerror or error)
        return _REASONS.get(reason, reason).format(own=own)
    return error.strerror or str(error)
