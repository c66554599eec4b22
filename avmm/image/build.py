"""Makes a folder from packages, with a kernel, an initramfs and settings, which `avmm run` can
start.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from avmm.errors import ImageError
from avmm.image import initramfs, kernel
from avmm.image.modules import Modules
from avmm.image.output import written
from avmm.image.packages import Package

DEFAULT_MODULES: Final = ("virtio_mmio", "virtio_console", "virtio_blk", "virtio_net")
"""The modules that a guest's devices need, if the package has them."""
CMDLINE: Final = "console=ttyS0 panic=-1"
"""panic=-1: a guest that panics ends the run instead of hanging."""


@dataclass(frozen=True)
class Built:
    """What `build` has made."""

    kernel: Path
    initrd: Path
    config: Path
    release: str
    modules: Sequence[str]
    size: int
    """The size of the initramfs in bytes."""


def build(
    packages: Sequence[Path],
    output: Path,
    *,
    modules: Sequence[str] = (),
    script: Path | None = None,
    added: Mapping[PurePosixPath, Path] | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Built:
    """Make the folder `output` from a package with a kernel and one with a static busybox.

    `modules` are loaded in addition to the default ones, each with all modules that it needs.
    Raises `ImageError` if something is missing or cannot be written. Blocks for seconds, and calls
    `progress` with the name of each step.
    """
    progress("looking at the packages")
    found = _sort([Package(path) for path in packages])
    try:
        output.mkdir(parents=True, exist_ok=True)
        text = script.read_bytes() if script is not None else None
    except OSError as error:
        raise ImageError(f"{error.filename}: {error.strerror}") from None
    progress(f"kernel {found.release}")
    image = output / "vmlinuz"
    kernel.extract(found.kernel, image)
    progress("modules")
    with _scratch() as folder:
        available = Modules(found.kernel, folder)
        names = set(available.names)
        wanted = [name for name in DEFAULT_MODULES if name in names]
        loaded = available.closure([*wanted, *modules])
    progress("initramfs")
    initrd = output / "initrd.cpio.gz"
    contents = initramfs.Contents(found.busybox, loaded, text, added or {})
    size = initramfs.write(contents, initrd)
    config = output / "guest.toml"
    settings = (
        f'kernel = "{image.name}"\ninitrd = "{initrd.name}"\ncmdline = "{CMDLINE}"\n'
        'memory = "256M"\n'
    )
    with written(config) as file:
        file.write(settings.encode())
    return Built(image, initrd, config, found.release, list(loaded), size)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder, in `$TMPDIR`."""
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise ImageError(f"{error.filename or 'a folder'}: {error.strerror}") from None
    with folder as path:
        yield Path(path)


@dataclass(frozen=True)
class _Found:
    kernel: Package
    release: str
    busybox: bytes


def _sort(packages: Sequence[Package]) -> _Found:
    """Find the package with the kernel and the one with the busybox."""
    kernels, boxes = [], []
    for package in packages:
        if release := kernel.release(package):
            kernels.append((package, release))
        elif (box := initramfs.find_busybox(package)) is not None:
            boxes.append(box)
        else:
            raise ImageError(f"{package.path}: it has neither a kernel nor a busybox")
    if len(kernels) != 1 or len(boxes) != 1:
        raise ImageError(
            f"expected one package with a kernel and one with a static busybox, "
            f"got {len(kernels)} and {len(boxes)}"
        )
    return _Found(*kernels[0], boxes[0])
