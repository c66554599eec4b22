"""Steer a running machine from outside its process, through a socket, as `avmm ctl` does.

`serve` gives your machine such a socket, and `connect` steers a machine in another process.
`import avmm` alone does not load this package: use `import avmm.control`.
"""

from avmm.control.client import Client, connect
from avmm.control.holds import PauseRefused
from avmm.control.protocol import GivenUp, NoControlSocket
from avmm.control.server import serve
from avmm.control.verbs import (
    Moved,
    Pauses,
    Progress,
    RequestError,
    Settled,
    SnapshotTaken,
    Status,
    Stopped,
)

__all__ = [
    "Client",
    "GivenUp",
    "Moved",
    "NoControlSocket",
    "PauseRefused",
    "Pauses",
    "Progress",
    "RequestError",
    "Settled",
    "SnapshotTaken",
    "Status",
    "Stopped",
    "connect",
    "serve",
]
