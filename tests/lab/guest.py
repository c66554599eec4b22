"""Guests for L1: Debian's cloud kernels with an initramfs, by `avmm image`'s parts, and more."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import avmm.image.build
from avmm.arch.x86_64.boot import bzimage
from avmm.boot.image import open_image
from avmm.image.added import Added
from lab import kernels, krunfw
from lab.cache import LabError, artefact
from lab.debian import NEWER, download, kernel_package, newer_kernel_package, run

_MOST: Final = 1 << 30
_MODULES: Final = ("virtio_balloon", "virtio_rng", "vmw_vsock_virtio_transport")
_SCRIPT: Final = "#!/bin/sh\necho SCRIPT RAN\nexit 9\n"
_TOOL: Final = Path(__file__).parents[1] / "support" / "vsock_tool.c"


def folders() -> dict[str, Path]:
    """What is sent, by its name there: for each of Debian's kernels a folder with vmlinuz,
    vmlinux, initrd.cpio.gz and an empty file system, ext4.img, and in script/ a guest that runs a
    script. Where they can be fetched, also one with a libkrunfw.so, one with the newest kernel,
    and one with kernels of other kinds. Raises `LabError`."""
    newer = newer_kernel_package(NEWER)
    found = {
        "sent/debian": _folder("guest", [download(kernel_package())]),
        f"sent/debian-{NEWER}": _folder(f"guest-{NEWER}", [download(newer)]),
    }
    more: dict[str, Callable[[], Path]] = {
        "sent/krunfw": krunfw.folder,
        "sent/krunfw-other": krunfw.other,
        "sent/debian-newest": lambda: _folder("guest-newest", kernels.newest()),
        "sent/kernels": kernels.others,
    }
    for name, fetch in more.items():
        try:
            found[name] = fetch()
        except LabError as error:  # a few tests need it, and say that it is not there
            print(error, file=sys.stderr)
    return found


def _folder(name: str, kernel: Sequence[Path]) -> Path:
    packages = [*kernel, download("busybox-static")]
    code = Path(avmm.__file__).parent
    own = [*code.glob("image/*.[pcs]*"), *code.glob("boot/*.py"), _TOOL]
    own.sort()
    names, texts = (
        [package.name for package in packages],
        [file.read_text() for file in own if file.is_file()],
    )
    made_from = (names, _MODULES, texts, _SCRIPT, "ext4")

    def build(place: Path) -> None:
        tool = place / "vsock"
        run(["cc", "-static", "-O2", "-o", tool, _TOOL])
        made = avmm.image.build.build(
            packages, place, modules=_MODULES, added=[Added.parse(f"{tool}:/bin/vsock")]
        )
        with tempfile.NamedTemporaryFile("w") as script:
            script.write(_SCRIPT)
            script.flush()
            avmm.image.build.build(packages, place / "script", script=Path(script.name))
        run(["mke2fs", "-q", "-t", "ext4", place / "ext4.img", "16M"])
        with (
            open_image(made.kernel) as image,
            bzimage.unpack(image, bzimage.parse(image), _MOST) as vmlinux,
            (place / "vmlinux").open("wb") as out,
        ):
            source = os.fdopen(os.dup(vmlinux.fileno()), "rb")
            with source:
                source.seek(0)
                shutil.copyfileobj(source, out)

    return artefact(name, made_from, build)
