"""TLS for a guest that moves between two hosts. Each side proves who it is.

Both sides show a certificate, and each accepts only one that its `ca` has signed. The side that
connects also compares the name in the certificate with the HOST that it connects to. Both speak
TLS 1.3 only.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Final

import trio

from avmm.errors import ConfigError, MigrationError

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
    stream: trio.SSLStream[trio.SocketStream], peer: object, most_seconds: float
) -> None:
    """Let each side prove who it is. Raises `MigrationError`, which names `peer`, if that fails or
    takes longer than `most_seconds`. If it fails or is cancelled, `stream` is closed."""
    reason = f"no handshake within {most_seconds:g} s"
    done = False
    try:
        with trio.move_on_after(most_seconds):
            await stream.do_handshake()
            done = True
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        reason = why(cause) if isinstance(cause, OSError) else str(cause or error)
    finally:
        if not done:
            await trio.aclose_forcefully(stream)
    if not done:
        raise MigrationError(f"{peer}: TLS: {reason}")


def why(error: OSError) -> str:
    """The error in words for people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the other side's certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error.strerror or error)
    return error.strerror or str(error)
