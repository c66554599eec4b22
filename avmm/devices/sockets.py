"""Unix sockets of the host that the guest's devices are reached by."""

from __future__ import annotations

import socket
import stat
from contextlib import suppress
from pathlib import Path

from avmm.errors import ConfigError


def listen(path: str | Path, what: str, backlog: int = 1) -> socket.socket:
    """A socket at `path`, for `what`, that only its user may connect to.

    Takes the place of one that nobody serves. Raises `ConfigError` where it cannot be. Who is
    done with it closes it and unlinks `path`.
    """
    with suppress(OSError):  # what is in the way shows when it is bound
        if stat.S_ISSOCK(Path(path).stat().st_mode) and not _served(path):
            Path(path).unlink()
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.setblocking(False)
        listener.bind(str(path))
        Path(path).chmod(0o600)  # before anybody can connect
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{what} socket {path}: {error.strerror or error}") from None
    return listener


def _served(path: str | Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
