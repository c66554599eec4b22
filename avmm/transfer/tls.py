"""TLS between two hosts that a guest moves between: each side proves who it is.

Both sides show a certificate, and each takes only one that its `ca` has signed; who calls also
compares the name in it with the HOST that was called. Only TLS 1.3 is spoken.
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
"""How long a handshake may take. Who calls has more patience: before its turn comes the other side
may have to wait for somebody who says nothing."""


@dataclass(frozen=True, slots=True)
class Tls:
    """How this side proves who it is, and whom it trusts: paths of files in PEM.

    For `avmm.connect` and `avmm.listen`, which say what is checked with it.
    """

    cert: str | PathLike[str]
    """This side's certificate, and after it those between it and its authority's."""
    key: str | PathLike[str]
    """The private key of `cert`, not encrypted."""
    ca: str | PathLike[str]
    """The certificate of the authority that has signed the other side's."""

    def context(self, *, server: bool) -> ssl.SSLContext:
        """What Python's `ssl` makes of it, for the side that is called or, without `server`, for
        the one that calls. Reads the files, and blocks for that long. Raises `ConfigError`, which
        names the file, where they are none."""
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
    """Prove to each other who the sides are. Where that fails, or is cancelled, `stream` is
    closed; a failure raises `MigrationError`, which names `peer`."""
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
    """What people read of it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the other side's certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error.strerror or error)
    return error.strerror or str(error)
