"""The architectures: everything that differs between guests of different kinds of processor.

`contract` says what an architecture must provide. Each architecture is a folder beside it. To add
one, write the folder and add its line to `_KNOWN`.
"""

from __future__ import annotations

import platform
from importlib import import_module
from typing import Final

from avmm.arch.contract import AnyArchitecture
from avmm.errors import AvmmError

_KNOWN: Final = {
    "x86_64": "avmm.arch.x86_64.architecture",
}
"""For each name that `uname -m` may print, the module that holds the `ARCHITECTURE`."""


def host() -> AnyArchitecture:
    """The architecture of this host. KVM runs guests of the same architecture.

    Raises `AvmmError` if avmm does not support it.
    """
    name = platform.machine()
    if name not in _KNOWN:
        raise AvmmError(
            f"this host is a machine of type {name!r}; avmm runs guests only on "
            f"{', '.join(_KNOWN)}"
        )
    found: AnyArchitecture = import_module(_KNOWN[name]).ARCHITECTURE
    return found
