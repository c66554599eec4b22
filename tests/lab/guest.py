"""A guest for L1's own guests: Debian's cloud kernel and an initramfs, by `avmm image`'s parts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

import avmm.image.build
import avmm.image.initramfs
from avmm.boot import bzimage
from avmm.boot.image import open_image
from lab.cache import artefact
from lab.debian import download, kernel_package

SENT_AS: Final = "sent/debian"
_MOST: Final = 1 << 30


def folder() -> Path:
    """The folder with vmlinuz, vmlinux and initrd.cpio.gz, built if need be."""
    packages = [download(kernel_package()), download("busybox-static")]
    own = [Path(avmm.image.build.__file__), Path(avmm.image.initramfs.__file__)]
    own += [own[0].with_name("init.sh"), own[0].with_name("finish.c")]
    made_from = ([package.name for package in packages], [file.read_text() for file in own])

    def build(place: Path) -> None:
        made = avmm.image.build.build(packages, place)
        with (
            open_image(made.kernel) as image,
            bzimage.unpack(image, _MOST) as (vmlinux, _),
            (place / "vmlinux").open("wb") as out,
        ):
            source = os.fdopen(os.dup(vmlinux.fileno()), "rb")
            with source:
                source.seek(0)
                shutil.copyfileobj(source, out)

    return artefact("guest", made_from, build)
