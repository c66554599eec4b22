"""Makes a folder from packages, with a kernel, an initramfs and settings, which `avmm run` can
start.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avmm.errors import ImageError
from avmm.image import initramfs, kernel
from avmm.image import modules as modules_
from avmm.image.added import Added
from avmm.image.modules import Modules
from avmm.image.output import alone_in, written
from avmm.image.packages import Package

DEFAULT_MODULES: Final = (
    *("virtio_mmio", "virtio_console", "virtio_blk", "virtio_net"),
    *("button", "evdev"),  # the power button, and how init hears of it
)
"""The modules that a guest's devices need, if the package has them."""
CMDLINE: Final = "console=ttyS0 panic=-1"
"""panic=-1: a guest that panics ends the run instead of hanging."""
_LEAST_MIB: Final = 256
_OWN_MIB: Final = 128
"""What Linux and its processes need, beside the files."""
_STEP_MIB: Final = 64
_HERE: Final = "amd64"
"""The architecture of avmm's own part of the guest, in Debian's words."""
_RUNS_HERE: Final = frozenset({_HERE, "i386", "all"})


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
    memory: str
    """The guest's memory in the settings."""


def build(
    packages: Sequence[Path],
    output: Path,
    *,
    modules: Sequence[str] = (),
    script: Path | None = None,
    added: Sequence[Added] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> Built:
    """Make the folder `output` from the packages of a kernel and one with a static busybox.

    `modules` are loaded in addition to the default ones, each with all modules that it needs.
    Raises `ImageError` if something is missing or cannot be written, or if another process makes
    a guest in that folder. Blocks for seconds, and calls `progress` with the name of each step.
    """
    progress("looking at the packages")
    found = _sort([Package(path) for path in packages])
    text = _script(script) if script is not None else None
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{error.filename}: {error.strerror}") from None
    with alone_in(output):
        progress(f"the modules of Linux {found.release}")
        with _scratch() as folder:
            available = Modules(found.linux, found.release, folder)
            loaded = available.closure([*available.demand(DEFAULT_MODULES), *modules])
        progress("the kernel")
        image = output / "vmlinuz"
        kernel.extract(found.kernel, image)
        progress("the initramfs")
        initrd = output / "initrd.cpio.gz"
        contents = initramfs.Contents(found.busybox, loaded, text, added)
        made = initramfs.write(contents, initrd)
        config = output / "guest.toml"
        memory = f"{_mib(made)}M"
        settings = (
            f'kernel = "{image.name}"\ninitrd = "{initrd.name}"\ncmdline = "{CMDLINE}"\n'
            f'memory = "{memory}"\n'
        )
        with written(config) as file:
            file.write(settings.encode())
    return Built(image, initrd, config, found.release, list(loaded), made.size, memory)


def _mib(made: initramfs.Written) -> int:
    """How much memory the guest needs: Linux lets the files take half of it, and has the archive
    in memory while it unpacks it."""
    needed = _OWN_MIB + (2 * made.unpacked + made.size >> 20)
    return max(_LEAST_MIB, -(-needed // _STEP_MIB) * _STEP_MIB)


def _script(path: Path) -> bytes:
    try:
        if not path.is_file():
            path.stat()  # says so if there is nothing
            raise ImageError(f"{path}: expected a file with a script")
        text = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from None
    if text.partition(b"\n")[0].endswith(b"\r"):
        raise ImageError(
            f"{path}: its lines end with CR LF, with which Linux runs no script; expected LF"
        )
    return text


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
    linux: Sequence[Package]
    """All packages with something of a kernel, of whatever release."""
    busybox: bytes


def _sort(packages: Sequence[Package]) -> _Found:
    """Find out which package has what."""
    _demand_architecture(packages)
    kernels: list[tuple[Package, str]] = []
    linux: list[Package] = []
    boxes = []
    empty = []
    """They only depend on others, and hold nothing but their documentation."""
    for package in packages:
        releases, is_linux, is_empty = set(), False, True
        for path, _ in package.files():
            is_empty = is_empty and path.is_relative_to("/usr/share")
            is_linux = is_linux or bool(modules_.release_of(path))
            if release := kernel.release_of(path):
                releases.add(release)
        kernels += [(package, release) for release in sorted(releases)]
        if is_linux or releases:
            linux.append(package)
        elif (box := initramfs.find_busybox(package)) is not None:
            boxes.append(box)
        elif is_empty:
            empty.append(package)
        else:
            raise ImageError(f"{package.path}: it has neither a kernel nor a busybox")
    if len(kernels) != 1 or len(boxes) != 1:
        hint = ""
        if not kernels and empty:
            hint = (
                f"; {empty[0].path} holds nothing and only depends on others, like linux-binary-*"
            )
        raise ImageError(
            f"expected one package with a kernel and one with a static busybox, "
            f"got {len(kernels)} and {len(boxes)}{hint}"
        )
    return _Found(*kernels[0], linux, boxes[0])


def _demand_architecture(packages: Sequence[Package]) -> None:
    for package in packages:
        if package.architecture not in _RUNS_HERE:
            raise ImageError(
                f"{package.path}: is for {package.architecture}; expected a package for {_HERE}"
            )
