"""Where a guest goes to or comes from: unix:PATH, or tcp:HOST:PORT, with TLS where asked for.

With TLS both sides show a certificate, and each takes only one that its `ca` has signed; who calls
also compares the name in it with HOST. Without TLS whoever can write to the line can read and
change the guest: then it belongs on a unix socket, which is its user's alone, or into a network
that is.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import click
import trio

from avmm.devices import sockets
from avmm.errors import ConfigError, MigrationError

logger = logging.getLogger(__name__)

_HANDSHAKE_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 1.0
Line: TypeAlias = trio.abc.Stream


@dataclass(frozen=True)
class Target:
    """A parsed TARGET."""

    kind: str
    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises `ConfigError` for what is none."""
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest:
            return cls(kind, path=rest)
        host, _, port = rest.rpartition(":")
        if host[:1] + host[-1:] == "[]":  # an IPv6 address has colons itself
            host = host[1:-1]
        if kind == "tcp" and _is_host(host) and _is_port(port):
            return cls(kind, host=host, port=int(port))
        raise ConfigError(f"target {text!r}: expected unix:PATH or tcp:HOST:PORT")

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        return (
            f"tcp:[{self.host}]:{self.port}"
            if ":" in self.host
            else (f"tcp:{self.host}:{self.port}")
        )


def _is_host(text: str) -> bool:
    """Can a name like that be looked up? Whether there is such a host, who looks finds out."""
    try:
        return bool(text) and "\0" not in text and bool(text.encode("idna"))
    except UnicodeError:  # a part of it is empty, or too long
        return False


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 0xFFFF


@dataclass(frozen=True)
class Tls:
    """Files in PEM: this side's certificate and key, and who signs the other side's."""

    cert: Path
    key: Path
    ca: Path

    def context(self, *, server: bool) -> ssl.SSLContext:
        """Raises `ConfigError` where the files are none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"TLS: {self.cert} with {self.key}: {_why(error)}") from None
        try:
            context.load_verify_locations(self.ca)
        except OSError as error:
            raise ConfigError(f"TLS: {self.ca}: {_why(error)}") from None
        return context


def tls(target: Target, cert: Path | None, key: Path | None, ca: Path | None) -> Tls | None:
    """What the TLS options say together; raises `ConfigError` where they do not fit."""
    if cert is None and key is None and ca is None:
        return None
    if target.kind != "tcp":
        raise ConfigError(f"target {target}: TLS is for tcp:HOST:PORT")
    if cert is None or key is None or ca is None:
        raise ConfigError("TLS: expected all three of --tls-cert, --tls-key and --tls-ca")
    return Tls(cert, key, ca)


def tls_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `tls` is made of."""
    for name, text in (
        ("ca", "Who has signed the other side's certificate; PEM."),
        ("key", "The key of --tls-cert; PEM."),
        ("cert", "This side's certificate: TLS, by which both sides prove who they are; PEM."),
    ):
        option = click.option(
            f"--tls-{name}", metavar="FILE", type=click.Path(path_type=Path), help=text
        )
        command = option(command)
    return command


async def connect(target: Target, context: ssl.SSLContext | None) -> Line:
    """A line to who waits at `target`. Raises `MigrationError` where nobody does."""
    try:
        if target.kind == "unix":
            return await trio.open_unix_socket(target.path)
        stream = await trio.open_tcp_stream(target.host, target.port)
    except OSError as error:
        raise MigrationError(f"{target}: {_why(error)}") from None
    if context is None:
        return stream
    secure = trio.SSLStream(stream, context, server_hostname=target.host)
    await _shake_hands(secure, target)
    return secure


async def _shake_hands(stream: trio.SSLStream[trio.SocketStream], peer: object) -> None:
    why = f"no handshake within {_HANDSHAKE_SECONDS:g} s"
    done = False
    try:
        with trio.move_on_after(_HANDSHAKE_SECONDS):
            await stream.do_handshake()
            done = True
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        why = _why(cause) if isinstance(cause, OSError) else str(cause or error)
    finally:
        if not done:
            await trio.aclose_forcefully(stream)
    if not done:
        raise MigrationError(f"{peer}: TLS: {why}")


async def close(stream: Line) -> None:
    """Close it, politely if that does not take long."""
    with (
        trio.CancelScope(shield=True),
        trio.move_on_after(_CLOSE_SECONDS),
        suppress(trio.BrokenResourceError),
    ):
        await stream.aclose()


@asynccontextmanager
async def listening(
    target: Target, context: ssl.SSLContext | None
) -> AsyncIterator[tuple[Target, Callable[[], Awaitable[Line]]]]:
    """Wait at `target` inside the block: where that is, and what awaits the one who calls.

    Raises `ConfigError` where it cannot be waited at. Who fails in the handshake is reported,
    and waited on for the next.
    """
    async with AsyncExitStack() as stack:
        if target.kind == "unix":
            listeners = [trio.SocketListener(_unix_listener(target.path))]
            stack.callback(_unlink, target.path)
        else:
            try:
                listeners = await trio.open_tcp_listeners(target.port, host=target.host)
            except OSError as error:
                raise ConfigError(f"{target}: {_why(error)}") from None
            port = listeners[0].socket.getsockname()[1]
            target = Target("tcp", host=target.host, port=port)
        for listener in listeners:
            stack.push_async_callback(listener.aclose)

        async def accept() -> Line:
            while True:
                stream = await _first(listeners)
                if context is None:
                    return stream
                secure = trio.SSLStream(stream, context, server_side=True)
                try:
                    await _shake_hands(secure, "who called")
                except MigrationError as error:
                    logger.warning("%s", error)
                else:
                    return secure

        yield target, accept


def _unix_listener(path: str) -> trio.socket.SocketType:
    return trio.socket.from_stdlib_socket(sockets.listen(path, "migration"))


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        Path(path).unlink()


async def _first(listeners: list[trio.SocketListener]) -> trio.SocketStream:
    """Whoever calls first, at any of them; who calls at the same moment is closed."""
    called: list[trio.SocketStream] = []

    async def accept(listener: trio.SocketListener) -> None:
        called.append(await listener.accept())
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(accept, listener)
    for late in called[1:]:
        await trio.aclose_forcefully(late)
    return called[0]


def _no_password() -> str:
    raise ssl.SSLError(ssl.SSL_ERROR_SSL, "the key is encrypted; expected one that is not")


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the other side's certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error.strerror or error)
    cause = error.__cause__
    if error.strerror is None and isinstance(cause, OSError):
        return _why(cause)
    if isinstance(cause, BaseExceptionGroup) and isinstance(cause.exceptions[0], OSError):
        return _why(cause.exceptions[0])
    return error.strerror or str(error)
