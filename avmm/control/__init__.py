"""Control of a running machine from outside its process: by a socket, as `avmm ctl` does.

`serve` lets a machine of yours be steered, and `connect` steers one that runs elsewhere. Import it
by `import avmm.control`; `import avmm` leaves it out.
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
