"""A libkrunfw, whose kernel the tests boot: out of a wheel of one of its users."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Final

from lab.cache import LabError, artefact
from lab.debian import run

WHEEL: Final = "microsandbox==0.7.11"
_PATTERN: Final = "libkrunfw.so"


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
