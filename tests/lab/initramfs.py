"""L1's initramfs: the modules it needs, and an init that hands over to what is to be run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avmm.image import initramfs, kernel
from avmm.image.cpio import Archive
from avmm.image.modules import Modules
from avmm.image.packages import Package
from lab import kernels, proposal
from lab.cache import artefact
from lab.debian import NEWER, download, kernel_package, newer_kernel_package

_MODULES: Final = ("virtio_pci", "virtio_blk", "ext4", "kvm", "kvm_amd", "tun", "vsock")
_INIT: Final = b"""#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
while read -r module; do $bb insmod /modules/$module.ko; done </modules/order
$bb mount -t ext4 /dev/vda /root || $bb poweroff -f
for name in proc sys dev; do $bb mount -o bind /$name /root/$name; done
$bb mkdir -p /root/dev/pts /root/dev/shm
$bb mount -t devpts devpts /root/dev/pts
$bb mount -t tmpfs tmpfs /root/dev/shm
$bb mount -t tmpfs tmpfs /root/tmp
$bb mount -t tmpfs tmpfs /root/lab
$bb tar x -f /dev/vdb -C /root/lab
$bb ip link set lo up
$bb chroot /root /bin/sh /lab/run.sh
$bb echo "lab: run.sh ended with $?"
$bb poweroff -f
"""


@dataclass(frozen=True)
class Boot:
    """What QEMU starts."""

    kernel: Path
    initramfs: Path


def boot(kind: str) -> Boot:
    """The kernel and the initramfs of a lab, built if need be."""
    replaced = proposal.modules(kernel_package()) if kind == "proposing" else None
    debs = _packages(kind)
    box = download("busybox-static")
    made_from = ([deb.name for deb in debs], box.name, _MODULES, _INIT, str(replaced))

    def build(folder: Path) -> None:
        _build(folder, [Package(deb) for deb in debs], Package(box), replaced)

    folder = artefact(f"boot-{kind}", made_from, build)
    return Boot(folder / "vmlinuz", folder / "initramfs")


def _packages(kind: str) -> Sequence[Path]:
    """The packages with the kernel and its modules."""
    if kind == "newest":
        return kernels.newest()
    return [download(newer_kernel_package(NEWER) if kind == "newer" else kernel_package())]


def _build(
    folder: Path, linux: Sequence[Package], busybox: Package, replaced: Path | None
) -> None:
    (with_kernel,) = [
        package for package in linux if any(kernel.release_of(path) for path, _ in package.files())
    ]
    release, _ = kernel.extract(with_kernel, folder / "vmlinuz")
    with tempfile.TemporaryDirectory() as scratch:
        modules = dict(Modules(linux, release, Path(scratch)).closure(_MODULES))
    if replaced is not None:
        _replace(modules, replaced)
    box = initramfs.find_busybox(busybox)
    assert box is not None
    with (folder / "initramfs").open("wb") as out:
        archive = Archive(out)
        for name in ("dev", "proc", "sys", "root", "modules"):
            archive.folder(name)
        archive.character_device("dev/console", 5, 1)
        archive.file("init", _INIT, mode=0o755)
        archive.file("bin/busybox", box, mode=0o755)
        archive.file("modules/order", "".join(f"{name}\n" for name in modules).encode())
        for name, content in modules.items():
            archive.file(f"modules/{name}.ko", content)
        archive.close()


def _replace(modules: dict[str, bytes], folder: Path) -> None:
    replacements: Mapping[str, str] = {"kvm": "kvm.ko", "kvm_amd": "kvm-amd.ko"}
    for name, file in replacements.items():
        assert name in modules, name
        modules[name] = (folder / file).read_bytes()
