"""Debian's packages, and the commands of Debian's that the lab is built with."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from lab.cache import LabError, artefact

SUITE: Final = "bookworm"
NEWER: Final = "6.12"
"""The series of the kernels that it carries beside its own."""
NEEDED: Final = {
    "apt-get": "apt",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "qemu-system-x86_64": "qemu-system-x86",
    "dpkg-deb": "dpkg",
}
NEEDED_FOR_PROPOSAL: Final = {
    "make": "make",
    "gcc": "gcc",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
    "patch": "patch",
    "strip": "binutils",
}


def demand(commands: Mapping[str, str], files: Mapping[str, str] | None = None) -> None:
    """Raise `LabError` naming the packages of those commands and files that are not there."""
    lacking = {package for name, package in commands.items() if not shutil.which(name)}
    lacking |= {package for path, package in (files or {}).items() if not Path(path).exists()}
    missing = sorted(lacking)
    if missing:
        raise LabError(f"lab: on Debian, apt-get install {' '.join(missing)}")


def run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """What a command prints; raises `LabError` with the end of what it says where it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-1500:]
        raise LabError(f"lab: {command[0]} failed ({done.returncode}):\n{said}")
    return done.stdout


def kernel_package() -> str:
    """The name of the cloud kernel's real package, as of now."""
    text = run(["apt-cache", "depends", "--important", "linux-image-cloud-amd64"])
    names = [line.split()[1] for line in text.splitlines() if line.strip().startswith("Depends:")]
    if not names:
        raise LabError("lab: apt knows no linux-image-cloud-amd64: apt-get update?")
    return names[0]


def newer_kernel_package(series: str) -> str:
    """The name of the newest cloud kernel of a series that Debian carries beside its own."""
    names = run(["apt-cache", "pkgnames", f"linux-image-{series}."]).split()
    pattern = re.compile(rf"linux-image-{re.escape(series)}\.(\d+)\+deb\d+-cloud-amd64-unsigned")
    found = [(int(match[1]), name) for name in names if (match := pattern.fullmatch(name))]
    if not found:
        raise LabError(f"lab: apt knows no cloud kernel {series}: apt-get update?")
    return max(found)[1]


def version(package: str) -> str:
    """The version that apt would take."""
    text = run(["apt-cache", "policy", package])
    for line in text.splitlines():
        if line.strip().startswith("Candidate:"):
            return line.split()[1]
    raise LabError(f"lab: apt knows no {package}: apt-get update?")


def download(package: str, wanted: str | None = None) -> Path:
    """The .deb of a package in this version, from the cache or from Debian."""
    wanted = wanted or version(package)

    def build(folder: Path) -> None:
        # As root, apt would rather fetch as its own user, who may not write here.
        sandbox = ["-o", "APT::Sandbox::User=root"]
        run(["apt-get", *sandbox, "download", f"{package}={wanted}"], cwd=folder)

    folder = artefact(f"package-{package}", wanted, build)
    return next(folder.glob("*.deb"))
