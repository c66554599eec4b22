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
    """--tls-cert, --tls-key and --tls-ca, which `chosen` takes."""
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


def chosen(target: Target, cert: Path | None, key: Path | None, ca: Path | None) -> Tls | None:
    """What the options say together. Raises `ConfigError` if they do not fit."""
    if cert is None and key is None and ca is None:
        return None
    if target.kind != "tcp":
        raise ConfigError(f"target {target}: TLS is for tcp:HOST:PORT")
    if cert is None or key is None or ca is None:
        raise ConfigError("TLS: expected all three of --tls-cert, --tls-key and --tls-ca")
    return Tls(cert, key, ca)
