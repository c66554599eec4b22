"""Building the kernel."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from lab.cache import artefact
from lab.debian import demand, download, run, version

SOURCE: Final = "linux-source-6.1"
NEEDED: Final = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "make": "make",
    "gcc": "gcc",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
    "patch": "patch",
    "strip": "binutils",
}
HEADERS: Final = {"/usr/include/gelf.h": "libelf-dev", "/usr/include/openssl/ssl.h": "libssl-dev"}
CMDLINE: Final = (
    "console=ttyS0 reboot=t panic=-1 lpj=1000000 noxsave clearcpuid=smap,smep,fsgsbase "
    "rodata=off random.trust_cpu=on"
)
"""What it needs on such a KVM: `lpj` spares it the calibration, the rest what is refused. It ends
by a triple fault."""
_HERE: Final = Path(__file__).parent


def vmlinux(*, smp: bool = False) -> Path:
    """The kernel, built if need be. Raises `LabError`."""
    wanted = version(SOURCE)
    patch = _HERE / "interpreted.patch"
    configs = [_HERE / "kernel.config", *([_HERE / "smp.config"] if smp else [])]
    made_from = (wanted, *(path.read_text() for path in (patch, *configs)))

    def build(folder: Path) -> None:
        demand(NEEDED, HEADERS)
        source = download(SOURCE, wanted)
        with tempfile.TemporaryDirectory() as scratch:
            _build(folder, Path(scratch), source, patch, configs)

    return artefact("linux-smp" if smp else "linux", made_from, build) / "vmlinux"


def _build(folder: Path, scratch: Path, source: Path, patch: Path, configs: list[Path]) -> None:
    run(["dpkg-deb", "-x", source, scratch])
    run(["tar", "xf", scratch / f"usr/src/{SOURCE}.tar.xz"], cwd=scratch)
    tree = scratch / SOURCE
    run(["patch", "-p1", "-i", patch], cwd=tree)
    run(["make", "tinyconfig"], cwd=tree)
    run(["scripts/kconfig/merge_config.sh", "-m", ".config", *configs], cwd=tree)
    run(["make", "olddefconfig"], cwd=tree)
    run(["make", f"-j{os.cpu_count() or 1}", "vmlinux"], cwd=tree)
    run(["strip", "-s", "-o", folder / "vmlinux", tree / "vmlinux"])
