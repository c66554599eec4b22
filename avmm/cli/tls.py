"""The command's options for TLS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from avmm.errors import ConfigError
from avmm.transfer.targets import Target
from avmm.transfer.tls import Tls


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --tls-cert, --tls-key, --tls-ca and --tls-peer to a command. `chosen` takes their
    values."""
    peer = click.option(
        "--tls-peer",
        metavar="NAME",
        help="The name, DNS or IP address, that the other side's certificate must be for. Without "
        "it, who connects compares the name with HOST, and who listens accepts any.",
    )
    command = peer(command)
    for name, text in (
        ("ca", "The certificate authority that signed the other side's certificate, in PEM."),
        ("key", "The private key of --tls-cert, in PEM."),
        (
            "cert",
            "This side's certificate, in PEM. It turns on TLS, with which both sides prove "
            "who they are.",
        ),
    ):
        option = click.option(
            f"--tls-{name}", metavar="FILE", type=click.Path(path_type=Path), help=text
        )
        command = option(command)
    return command


def chosen(
    target: Target, cert: Path | None, key: Path | None, ca: Path | None, peer: str | None
) -> Tls | None:
    """The `Tls` that the options describe; None if none is given. Raises `ConfigError` if they are
    incomplete, or if the target is not TCP.
    """
    if cert is None and key is None and ca is None:
        if peer is not None:
            raise ConfigError("TLS: --tls-peer expects --tls-cert, --tls-key and --tls-ca as well")
        return None
    if target.kind != "tcp":
        raise ConfigError(f"target {target}: TLS is for tcp:HOST:PORT")
    if cert is None or key is None or ca is None:
        raise ConfigError("TLS: expected all three of --tls-cert, --tls-key and --tls-ca")
    return Tls(cert, key, ca, peer)
