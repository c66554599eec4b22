"""Packages for the tests here."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from support.packages import PACK, RELEASE, deb, elf


@pytest.fixture
def module(tmp_path: Path) -> Callable[..., bytes]:
    def make(depends: str = "", softdep: str = "") -> bytes:
        entries = f"depends={depends}\\0" + (f"softdep={softdep}\\0" if softdep else "")
        section = '__attribute__((section(".modinfo"), used))'
        source = f'static const char info[] {section} = "{entries}";'
        return elf(tmp_path, "-c", source=source)

    return make


@pytest.fixture
def linux(tmp_path: Path, module: Callable[..., bytes]) -> Path:
    at = f"/lib/modules/{RELEASE}"
    files = {
        f"/boot/vmlinuz-{RELEASE}": b"the kernel",
        f"/boot/config-{RELEASE}": b"",
        f"{at}/modules.builtin": b"kernel/fs/ext4.ko\n",
        f"{at}/kernel/a/virtio_mmio.ko": module("virtio,virtio_ring"),
        f"{at}/kernel/a/virtio.ko.xz": lzma.compress(module()),
        f"{at}/kernel/a/virtio-ring.ko.gz": gzip.compress(module("ext4")),
        f"{at}/kernel/b/fancy.ko.zst": PACK[".zst"](module("", "pre: virtio gone post: b")),
        f"{at}/kernel/b/broken.ko": module("gone"),
        f"{at}/kernel/b/ping.ko": module("pong"),
        f"{at}/kernel/b/pong.ko": module("ping"),
    }
    return deb(tmp_path / "linux-image.deb", files)


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    program = elf(tmp_path, "-static", "-nostdlib", source="void _start(void) {}")
    return deb(tmp_path / "busybox-static.deb", {"/bin/busybox": program})
