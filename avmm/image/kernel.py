"""Finds the kernel in a package and extracts it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Final

from avmm.errors import ImageError
from avmm.image.output import written
from avmm.image.packages import Package

_KERNELS: Final = (
    re.compile(r"/boot/vmlinu[xz]-(?P<release>[^/]+)"),
    # Debian from Linux 6.19 on, in a package of its own (linux-binary-*).
    re.compile(r"(/usr)?/lib/modules/(?P<release>[^/]+)/vmlinu[xz](\.unsigned)?"),
)


def release_of(path: PurePosixPath) -> str:
    """The release of the kernel that is a package's file `path`; "" if that is no kernel."""
    for pattern in _KERNELS:
        if match := pattern.fullmatch(str(path)):
            return match["release"]
    return ""


def extract(package: Package, output: Path | None = None) -> tuple[str, Path]:
    """Write the package's kernel to `output`, or to a file in the working directory that is named
    after the release. Returns the release and the file. Raises `ImageError`."""
    for path, content in package.files():
        if release := release_of(path):
            target = output or Path(f"vmlinuz-{release}")
            with written(target) as file:
                shutil.copyfileobj(content, file)
            return release, target
    raise ImageError(
        f"{package.path}: has no kernel: expected a package linux-image-* or, from Linux 6.19 on, "
        "linux-binary-*, but not one that only depends on another, because that is empty"
    )
