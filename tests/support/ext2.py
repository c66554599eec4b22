"""Images with an ext2 file system, made and read by the host's own tools."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

IMAGE = 4 << 20
"""Bytes of an image."""


def ext2(path: Path, folder: Path) -> None:
    if shutil.which("mke2fs") is None:
        pytest.skip("mke2fs is not installed (Debian: e2fsprogs)")
    with path.open("wb") as file:
        file.truncate(IMAGE)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext2", "-d", folder, path], check=True)


def from_ext2(path: Path, name: str) -> bytes:
    """The file `name` in an image, as the host's tools read it."""
    return subprocess.run(
        ["debugfs", "-R", f"cat {name}", path], capture_output=True, check=True
    ).stdout
