"""The software engine: KVM's interface without KVM, on the emulator of the PyPI package `unicorn`.

It is for machines without a usable /dev/kvm. It is slower than KVM, and it is no security boundary
as KVM is. `unicorn` is licensed under GPL-2; avmm does not contain it, and imports nothing of it
unless this engine is used (`pip install 'avmm[soft]'`).

The engine answers KVM's own requests (`native/soft.h`), so all of avmm runs on it unchanged.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from avmm.errors import EngineUnavailable
from avmm.kvm import use_engine

ARCHITECTURES: Final = ("x86_64",)
"""The architectures whose guests it can run."""
_LIBRARY: Final = Path("lib", "libunicorn.so.2")
_WHY_BYTES: Final = 500


def opened() -> int:
    """A descriptor of the engine, as /dev/kvm's is KVM's. Loads the library on first use, which
    blocks. Raises `EngineUnavailable`."""
    from avmm.soft._soft import ffi, lib  # noqa: PLC0415 - only where the engine is used

    why = ffi.new("char[]", _WHY_BYTES)
    path = ffi.from_buffer(bytes(_library()) + b"\0")
    if lib.soft_load(path, why, len(why)):
        text = bytes(ffi.buffer(why)).partition(b"\0")[0].decode(errors="replace")
        raise EngineUnavailable(f"the software engine: {text}")
    use_engine(*map(_address, ("soft_is", "soft_ioctl", "soft_close", "soft_kicked")))
    fd: int = lib.soft_open()
    if fd < 0:
        raise OSError(-fd, "the software engine cannot be opened")
    return fd


def watcher() -> int:
    """The address of the function that wants to know what the host writes to guest memory."""
    return _address("soft_wrote")


def _address(function: str) -> int:
    from avmm.soft._soft import ffi, lib  # noqa: PLC0415 - only where the engine is used

    return int(ffi.cast("uintptr_t", ffi.addressof(lib, function)))


def _library() -> Path:
    """Where `unicorn` has its library. It is found without importing the package."""
    found = importlib.util.find_spec("unicorn")
    for folder in found.submodule_search_locations or () if found is not None else ():
        if (path := Path(folder) / _LIBRARY).exists():
            return path
    raise EngineUnavailable(
        "the software engine needs the package unicorn: pip install 'avmm[soft]'"
    )
