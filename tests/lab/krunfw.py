"""The libkrunfw of two of its users, whose kernels the tests boot: out of their wheels."""

from __future__ import annotations

import struct
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from avmm.image.initramfs import find_busybox
from avmm.image.packages import Package
from lab.cache import LabError, artefact
from lab.debian import download, run

WHEEL: Final = "microsandbox==0.7.11"
_PATTERN: Final = "libkrunfw.so"
OTHER_WHEEL: Final = "boxlite==0.10.8"
"""It has one within its own module, and writes it out when it is used. That kernel takes no
initrd."""
_SYMBOL: Final = b"krunfw_get_kernel"
_ELF: Final = b"\x7fELF\x02\x01\x01"
_HEADER: Final = struct.Struct("<16xH22xQ10xHH")
"""e_type, e_shoff, e_shentsize, e_shnum."""
_SHARED: Final = 3
_INIT: Final = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox echo "ROOT OF $(/bin/busybox uname -r)"
/bin/busybox reboot -f
"""


def folder() -> Path:
    """The folder with `libkrunfw.so`, fetched if need be. Raises `LabError`."""

    def build(place: Path) -> None:
        fetch = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", WHEEL]
        run([sys.executable, "-m", "pip", *fetch], cwd=place)
        wheel = next(place.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if Path(name).name.startswith(_PATTERN)]
            if not names:
                raise LabError(f"lab: {wheel.name} holds no {_PATTERN}")
            (place / _PATTERN).write_bytes(archive.read(names[0]))
        wheel.unlink()

    return artefact("krunfw", WHEEL, build)


def other() -> Path:
    """The folder with another `libkrunfw.so`, and `root.img`, a root file system whose init says
    hello. Raises `LabError`."""
    busybox = download("busybox-static")

    def build(place: Path) -> None:
        fetch = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", OTHER_WHEEL]
        run([sys.executable, "-m", "pip", *fetch], cwd=place)
        wheel = next(place.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            libraries = (archive.read(name) for name in archive.namelist() if ".so" in name)
            found = next(filter(None, map(_embedded, libraries)), None)
        if found is None:
            raise LabError(f"lab: {wheel.name} holds no libkrunfw")
        wheel.unlink()
        (place / _PATTERN).write_bytes(found)
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            for name in ("bin", "proc", "dev", "sys"):
                (root / name).mkdir()
            content = find_busybox(Package(busybox))
            assert content is not None
            for path, data in ((root / "bin/busybox", content), (root / "init", _INIT.encode())):
                path.write_bytes(data)
                path.chmod(0o755)
            run(["mke2fs", "-q", "-t", "ext4", "-d", root, place / "root.img", "16M"])

    return artefact("krunfw-other", (OTHER_WHEEL, busybox.name, _INIT), build)


def _embedded(library: bytes) -> bytes | None:
    """The libkrunfw that a library contains as data."""
    at = library.find(_ELF, 1)
    while at >= 0:
        kind, sections, size, count = _HEADER.unpack_from(library, at)
        found = library[at : at + sections + size * count]
        if kind == _SHARED and _SYMBOL in found and len(found) < len(library) - at:
            return found
        at = library.find(_ELF, at + 1)
    return None
