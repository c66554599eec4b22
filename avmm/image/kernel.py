"""Finds the kernel in a package and extracts it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

from avmm.errors import ImageError
from avmm.image.output import written
from avmm.image.packages import Package

_KERNEL: Final = re.compile(r"/boot/vmlinu[xz]-(?P<release>[^/]+)")


def release(package: Package) -> str:
    """The release of the kernel in a package; "" if it has none."""
    for path, _ in package.files():
        if match := _KERNEL.fullmatch(str(path)):
            return match["release"]
    return ""


def extract(package: Package, output: Path) -> str:
    """Write the package's kernel to `output`. Returns its release. Raises `ImageError`."""
    for path, content in package.files():
        if match := _KERNEL.fullmatch(str(path)):
            with written(output) as file:
                shutil.copyfileobj(content, file)
            return match["release"]
    raise ImageError(
        f"{package.path}: has no kernel (/boot/vmlinuz-*): expected a linux-image package, "
        "but not one that only depends on another, because that is empty"
    )
