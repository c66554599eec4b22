"""The QEMU that L1 runs in: that of Debian's backports.

Debian's own, 7.2, translates a page of code before it watches it for writes (QEMU has that mended
since 8.1, "accel/tcg: Always lock pages before translation"), and Linux writes its own code: each
static key that it flips is a breakpoint for a moment, which another CPU may keep for ever. The
libraries are those of Debian's own package.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from lab.cache import LabError, artefact
from lab.debian import SUITE, run

_PACKAGES: Final = ("qemu-system-x86", "qemu-system-data", "seabios")
_FIRMWARE: Final = ("usr/share/seabios", "usr/share/qemu")
_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"


def command() -> tuple[str, ...]:
    """How it begins. Fetched if need be; raises `LabError`."""
    folder = artefact("qemu", (SUITE, _PACKAGES), _build)
    program = folder / "usr/bin/qemu-system-x86_64"
    return (str(program), *(word for name in _FIRMWARE for word in ("-L", str(folder / name))))


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        debs = Path(scratch)
        sources = debs / "sources.list"
        sources.write_text(f"deb [signed-by={_KEYRING}] {_site()} {SUITE}-backports main\n")
        (debs / "lists/partial").mkdir(parents=True)
        settings = {
            "Dir::Etc::SourceList": sources,
            "Dir::Etc::SourceParts": "-",
            "Dir::State::Lists": debs / "lists",
            "Dir::Cache": debs / "cache",
            "APT::Sandbox::User": "root",
        }
        apt = ["apt-get"]
        for name, value in settings.items():
            apt += ["-o", f"{name}={value}"]
        run([*apt, "update"], cwd=debs)
        run([*apt, "download", *_PACKAGES], cwd=debs)
        for deb in debs.glob("*.deb"):
            run(["dpkg-deb", "-x", deb, folder])
    run([folder / "usr/bin/qemu-system-x86_64", "--version"])  # are its libraries here?


def _site() -> str:
    """Where this system's apt gets Debian from."""
    lines = run(["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)"]).splitlines()
    for line in lines:
        release, _, site = line.partition(" ")
        if release == SUITE and site:
            return site
    raise LabError(f"lab: apt has no source of {SUITE}, and so none of its backports")
