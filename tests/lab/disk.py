"""The root file system of L1: Debian's Python, and the packages that this environment has."""

from __future__ import annotations

import compileall
import importlib.metadata
import py_compile
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Final

from lab.cache import LabError, artefact
from lab.debian import SUITE, demand, run

PACKAGES: Final = (
    "python3-minimal",
    "libpython3-stdlib",
    "busybox-static",
    "binutils",
    "e2fsprogs",
)
PYTHON: Final = (3, 11)
"""That of the suite: compiled extensions and .pyc files come from here."""
_NOT_NEEDED: Final = ("mypy", "ruff", "pip", "setuptools", "mypyc", "librt")


def image() -> Path:
    """The ext4 image, built if need be."""
    if sys.version_info[:2] != PYTHON:
        raise LabError(f"lab: needs Python {'.'.join(map(str, PYTHON))}, as {SUITE} has it")
    distributions = sorted(
        f"{d.metadata['Name']} {d.version}" for d in importlib.metadata.distributions()
    )
    made_from = (SUITE, PACKAGES, [d for d in distributions if not d.startswith("avmm ")], 2)
    return artefact("root", made_from, _build) / "root.ext4"


def _build(folder: Path) -> None:
    demand({"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs"})
    root = folder / "root"
    include = ",".join(PACKAGES)
    options = ["--variant=apt", f"--include={include}", "--quiet", "--format=directory"]
    skip = [
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
    ]
    run(["mmdebstrap", *options, *skip, SUITE, root])
    for useless in ("var/lib/apt", "var/cache", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(root / useless, ignore_errors=True)
    _add_site_packages(root / "site")
    for name in ("lab", "proc", "sys", "dev", "tmp"):
        (root / name).mkdir(exist_ok=True)
    run(["mke2fs", "-q", "-t", "ext4", "-d", root, folder / "root.ext4", "1500M"])
    shutil.rmtree(root)


def _add_site_packages(site: Path) -> None:
    source = Path(sysconfig.get_path("purelib"))
    ignore = shutil.ignore_patterns(
        *_NOT_NEEDED,
        *(f"{name}-*" for name in _NOT_NEEDED),
        "__pycache__",
        "*.pth",
        "__editable__*",
        "libunicorn.a",  # 40 MB beside the library that is used
    )
    shutil.copytree(source, site, ignore=ignore)
    compileall.compile_dir(
        site, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
