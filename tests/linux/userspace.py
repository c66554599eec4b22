"""Its user space: klibc's shell and tools in an initramfs."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lab.debian import download

from avmm.image.cpio import Archive

_PACKAGES: Final = ("klibc-utils", "libklibc")
_MOUNTS: Final = b"""#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
"""


def initrd(to: Path, init: str, files: Mapping[str, bytes] | None = None) -> Path:
    """Write an initramfs in which the shell script `init` is the first process, after its mounts.

    Raises `LabError` where the packages cannot be had.
    """
    with to.open("wb") as out, tempfile.TemporaryDirectory() as scratch:
        archive = Archive(out)
        for package in _PACKAGES:
            subprocess.run(["dpkg-deb", "-x", download(package), scratch], check=True)
        root = Path(scratch)
        tools = root / "usr/lib/klibc/bin"
        for tool in sorted(tools.iterdir()):
            archive.file(f"bin/{tool.name}", tool.resolve().read_bytes(), mode=0o755)
        (library,) = root.glob("**/klibc-*.so")
        archive.file(f"lib/{library.name}", library.read_bytes(), mode=0o755)
        for folder in ("proc", "sys", "dev", "tmp", "mnt"):
            archive.folder(folder)
        archive.character_device("dev/console", 5, 1)
        archive.file("init", _MOUNTS + init.encode() + b"\n", mode=0o755)
        for name, content in (files or {}).items():
            archive.file(name, content, mode=0o755)
        archive.close()
    return to
