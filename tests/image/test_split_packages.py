"""Debian's kernels from 6.19 on, which are in several packages, and packages of the wrong kind."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.packages import deb, entries

from avmm.errors import ImageError
from avmm.image import build, kernel
from avmm.image.packages import Package

R = "7.3.4+deb13-cloud-amd64"
AT = f"/usr/lib/modules/{R}"
Split = Callable[..., list[Path]]


@pytest.fixture
def split(tmp_path: Path, module: Callable[..., bytes]) -> Split:
    """The packages with these parts of a kernel's name: `split("image", "binary")`."""
    files = {
        "image": {"/usr/share/doc/linux-image/changelog.gz": b""},
        "binary": {f"{AT}/vmlinuz": b"the kernel", "/usr/share/bug/x": b""},
        "binary-unsigned": {f"{AT}/vmlinuz.unsigned": b"the kernel"},
        "base": {f"{AT}/System.map": b"", f"{AT}/modules.builtin": b"kernel/virtio.ko\n"},
        "modules": {f"{AT}/kernel/drivers/virtio_mmio.ko": module("virtio")},
    }

    def make(*parts: str) -> list[Path]:
        return [deb(tmp_path / f"linux-{part}-{R}.deb", files[part]) for part in parts]

    return make


@pytest.mark.parametrize("binary", ["binary", "binary-unsigned"])
def test_a_guest_is_built_out_of_all_of_them(
    split: Split, busybox: Path, tmp_path: Path, binary: str
) -> None:
    packages = split("image", "base", "modules", binary)
    made = build.build([*packages, busybox], tmp_path / "guest")
    assert (made.release, made.kernel.read_bytes()) == (R, b"the kernel")
    assert made.modules == ["virtio_mmio"]


@pytest.mark.parametrize("binary", ["binary", "binary-unsigned"])
def test_the_kernel_alone_is_extracted(split: Split, tmp_path: Path, binary: str) -> None:
    [package] = split(binary)
    assert kernel.extract(Package(package), tmp_path / "k") == (R, tmp_path / "k")


def test_an_empty_package_is_said_to_be_empty(split: Split, busybox: Path, tmp_path: Path) -> None:
    [package] = split("image")
    with pytest.raises(ImageError, match=rf"got 0 and 1; {re.escape(str(package))} holds nothing"):
        build.build([package, busybox], tmp_path / "guest")
    with pytest.raises(ImageError, match=r"has no kernel: expected a package linux-image-\* or"):
        kernel.extract(Package(package), tmp_path / "k")


def test_a_kernel_without_its_modules(split: Split, busybox: Path, tmp_path: Path) -> None:
    output = tmp_path / "guest"
    for parts in (["binary"], ["binary", "base"]):
        with pytest.raises(ImageError, match=r"no modules .*expected the package linux-modules-7"):
            build.build([*split(*parts), busybox], output)
        assert not list(output.iterdir())


def test_a_kernel_without_the_list_of_what_is_built_in(
    split: Split, busybox: Path, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match=r"no module 'virtio'.*, as in linux-base-7\.3\.4"):
        build.build([*split("binary", "modules"), busybox], tmp_path / "guest")


def test_modules_of_another_kernel_are_none(
    split: Split, busybox: Path, module: Callable[..., bytes], tmp_path: Path
) -> None:
    files = {"/lib/modules/6.1.0/kernel/virtio_mmio.ko": module()}
    other = deb(tmp_path / "linux-modules-6.1.deb", files)
    with pytest.raises(ImageError, match="no modules for the kernel 7"):
        build.build([*split("binary", "base"), other, busybox], tmp_path / "guest")


@pytest.mark.parametrize("which", ["kernel", "busybox"])
def test_a_package_for_another_architecture(
    linux: Path, busybox: Path, tmp_path: Path, which: str
) -> None:
    if which == "kernel":
        files = {f"/boot/vmlinuz-{R}": b"MZ"}
        linux = deb(tmp_path / "linux-arm64.deb", files, architecture="arm64")
    else:
        program = {"/bin/busybox": b"\x7fELF"}
        busybox = deb(tmp_path / "busybox-arm64.deb", program, architecture="arm64")
    with pytest.raises(ImageError, match="is for arm64; expected a package for amd64"):
        build.build([linux, busybox], tmp_path / "guest")
    assert not (tmp_path / "guest").exists()


def test_a_busybox_that_is_a_hard_link(linux: Path, busybox: Path, tmp_path: Path) -> None:
    plain = next(content.read() for _, content in Package(busybox).files())
    for number, target in enumerate(("/aa", "/zz")):
        package = deb(
            tmp_path / f"linked-{number}.deb",
            {target: plain, "/usr/share/doc/x": b""},
            links={"/usr/bin/busybox": target},
        )
        made = build.build([linux, package], tmp_path / str(number))
        found = entries(gzip.decompress(made.initrd.read_bytes()))
        assert found["bin/busybox"][1] == plain
