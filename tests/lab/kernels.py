"""Kernels that nobody here has built: Debian's newest, Xen, memtest86+."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

from avmm.image.packages import Package
from lab.cache import LabError, artefact
from lab.debian import SUITE, download, run

BACKPORTS: Final = "trixie-backports"
"""The suite with Debian's newest kernels. It has them in several packages."""
_BINARY: Final = re.compile(r"linux-binary-(\d+)\.(\d+)\.(\d+)\+deb\d+-cloud-amd64")
_OTHERS: Final = {
    "xen.gz": ("xen-hypervisor-4.17-amd64", "xen-4.17-amd64.gz"),
    "memtest86+": ("memtest86+", "memtest86+x64.bin"),
}
"""What it is called here, its package, and its name there."""


def newest() -> list[Path]:
    """The packages of Debian's newest cloud kernel, looked for once a week. Raises `LabError`."""
    week = time.strftime("%G-%V")
    return sorted(artefact("newest-kernel", (BACKPORTS, week), _fetch).glob("*.deb"))


def _fetch(folder: Path) -> None:
    format_ = ["--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"]
    sources = [line.split() for line in run(["apt-get", "indextargets", *format_]).splitlines()]
    uris = [uri for uri, release in sources if release == SUITE]
    if not uris:
        raise LabError(f"lab: apt has no source for {SUITE}")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for name in ("state/lists/partial", "cache/archives/partial"):
            (place / name).mkdir(parents=True)
        (place / "sources.list").write_text(f"deb [trusted=yes] {uris[0]} {BACKPORTS} main\n")
        options = {
            "Dir::State": place / "state",
            "Dir::Cache": place / "cache",
            "Dir::Etc::sourcelist": place / "sources.list",
            "Dir::Etc::sourceparts": "/nonexistent",
            "Dir::State::status": "/dev/null",
            "APT::Sandbox::User": "root",
        }
        given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        run(["apt-get", *given, "update", "-qq"])
        names = run(["apt-cache", *given, "pkgnames", "linux-binary-"]).split()
        found = [(tuple(map(int, m.groups())), m[0]) for m in map(_BINARY.fullmatch, names) if m]
        if not found:
            raise LabError(f"lab: {BACKPORTS} has no kernel in several packages")
        binary = max(found)[1]
        packages = [binary.replace("binary", part) for part in ("binary", "modules", "base")]
        run(["apt-get", *given, "download", *packages], cwd=folder)


def others() -> Path:
    """A folder with kernels of other kinds, by the names of `_OTHERS`. Raises `LabError`."""
    packages = {name: download(package) for name, (package, _) in _OTHERS.items()}

    def build(folder: Path) -> None:
        for name, (_, file) in _OTHERS.items():
            for path, content in Package(packages[name]).files():
                if path.name == file:
                    with (folder / name).open("wb") as out:
                        shutil.copyfileobj(content, out)
            if not (folder / name).exists():
                raise LabError(f"lab: {packages[name].name} has no {file}")

    return artefact("kernels", [path.name for path in packages.values()], build)
