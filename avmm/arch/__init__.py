"""The architectures: what differs between guests of one kind of processor and of another.

`contract` says what an architecture must tell; each is a folder beside it. To add one, write the
folder and add its line to `_KNOWN`.
"""

from __future__ import annotations

import platform
from importlib import import_module
from typing import Final

from avmm.arch.contract import Architecture
from avmm.errors import AvmmError

_KNOWN: Final = {
    "x86_64": "avmm.arch.x86_64.architecture",
}
"""By the name that `uname -m` gives the host: the module that holds its `ARCHITECTURE`."""


def host() -> Architecture:
    """The architecture of this host, which KVM runs guests of.

    Raises `AvmmError` where avmm knows none for it.
    """
    name = platform.machine()
    if name not in _KNOWN:
        raise AvmmError(
            f"this host is a machine of type {name!r}: avmm runs guests on {', '.join(_KNOWN)}"
        )
    found: Architecture = import_module(_KNOWN[name]).ARCHITECTURE
    return found
