"""kvm.ko and kvm-amd.ko that carry the list's proposal, for the unmodified cloud kernel.

Debian's source of the same version, with needs_completion.patch, built as modules only: with the
configuration and the Module.symvers of the header package, so that they load into the package's
own kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

from lab.cache import LabError, artefact
from lab.debian import NEEDED_FOR_PROPOSAL, demand, download, run, version

PATCH: Final = Path(__file__).with_name("needs_completion.patch")
CAPABILITY: Final = 239
"""What the patched kernel answers 1 for, as the series numbers it."""


def modules(kernel_package: str) -> Path:
    """The folder with the two modules for this package's kernel, built if need be."""
    match = re.fullmatch(r"linux-image-((\d+\.\d+)\..*)", kernel_package)
    if match is None:
        raise LabError(f"lab: {kernel_package} is no kernel package of a known name")
    release, series = match[1], match[2]
    wanted = version(kernel_package)

    def build(folder: Path) -> None:
        demand(NEEDED_FOR_PROPOSAL)
        source = download(f"linux-source-{series}", wanted)
        headers = download(f"linux-headers-{release}", wanted)
        with tempfile.TemporaryDirectory() as scratch:
            _build(folder, Path(scratch), series, release, source, headers)

    return artefact("proposal", (release, wanted, PATCH.read_text()), build)


def _build(
    folder: Path, scratch: Path, series: str, release: str, source: Path, headers: Path
) -> None:
    run(["dpkg-deb", "-x", source, scratch / "source"])
    run(["dpkg-deb", "-x", headers, scratch / "headers"])
    run(["tar", "xf", scratch / f"source/usr/src/linux-source-{series}.tar.xz"], cwd=scratch)
    tree = scratch / f"linux-source-{series}"
    given = scratch / f"headers/usr/src/linux-headers-{release}"
    run(["patch", "-p1", "-i", PATCH], cwd=tree)
    shutil.copy(given / ".config", tree)
    shutil.copy(given / "Module.symvers", tree)
    jobs = f"-j{os.cpu_count() or 1}"
    # Trusted keys and BTF want files of Debian's build that are not in the package.
    for option in ("SYSTEM_TRUSTED_KEYS", "SYSTEM_REVOCATION_KEYS"):
        run(["scripts/config", "--set-str", option, ""], cwd=tree)
    run(["scripts/config", "--disable", "DEBUG_INFO_BTF", "--disable", "MODULE_SIG"], cwd=tree)
    run(["make", "olddefconfig"], cwd=tree)
    run(["make", jobs, "modules_prepare", f"KERNELRELEASE={release}"], cwd=tree)
    run(["make", jobs, "M=arch/x86/kvm", "modules", f"KERNELRELEASE={release}"], cwd=tree)
    for name in ("kvm.ko", "kvm-amd.ko"):
        run(["strip", "--strip-debug", "-o", folder / name, tree / "arch/x86/kvm" / name])
