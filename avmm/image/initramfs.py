"""The initramfs: busybox, modules, avmm's own init (init.sh), and what the user adds.

The guest starts a shell on the console that the kernel was told to use, or runs a script. The exit
status of either becomes the status of the run.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Final

from avmm.errors import ImageError
from avmm.image.added import Added
from avmm.image.cpio import Archive
from avmm.image.output import written
from avmm.image.packages import Package

_BUSYBOX: Final = frozenset(map(PurePosixPath, ("/bin/busybox", "/usr/bin/busybox")))
_UDHCPC: Final = b"""#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr replace "$ip/${mask:-24}" dev "$interface"
for gateway in $router; do ip route replace default via "$gateway"; done
: >/etc/resolv.conf
for server in $dns; do echo "nameserver $server" >>/etc/resolv.conf; done
"""
_FILES: Final[Mapping[str, bytes]] = {
    "etc/passwd": b"root::0:0:root:/root:/bin/sh\n",
    "etc/group": b"root:x:0:\n",
    "etc/hosts": b"127.0.0.1 localhost avmm\n",
    "etc/profile": b"export PS1='avmm:\\w# '\n",
}


@dataclass
class Contents:
    """The variable contents of an initramfs, in addition to what is always there."""

    busybox: bytes
    modules: Mapping[str, bytes] = field(default_factory=dict)
    """The modules' contents by name, in the order of loading."""
    script: bytes | None = None
    added: Sequence[Added] = ()
    """The user's own files."""


def find_busybox(package: Package) -> bytes | None:
    """The busybox in a package, or None if there is none. Raises `ImageError` if it is linked
    dynamically, because its libraries would be missing.
    """
    links = package.hard_links()
    wanted = _BUSYBOX | {links[path] for path in _BUSYBOX & links.keys()}
    for path, content in package.files():
        if path in wanted:
            data = content.read()
            if _is_dynamic(data):
                raise ImageError(
                    f"{package.path}: its busybox is linked dynamically: expected the package "
                    "busybox-static"
                )
            return data
    return None


@dataclass(frozen=True)
class Written:
    """The archive's size in bytes, and how much its files have in all."""

    size: int
    unpacked: int


def write(contents: Contents, output: Path) -> Written:
    """Write the archive, compressed with gzip. Raises `ImageError`."""
    with written(output) as raw:
        with gzip.GzipFile("", "wb", 6, raw, mtime=0) as out:
            archive = Archive(out)  # type: ignore[arg-type]
            _fill(archive, contents)
            archive.close()
        return Written(raw.tell(), archive.bytes)


def _fill(archive: Archive, contents: Contents) -> None:
    own = resources.files("avmm.image")
    for folder in ("dev", "etc", "proc", "root", "sys", "tmp"):
        archive.folder(folder)
    # The kernel opens /dev/console for init before anything is mounted.
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", contents.busybox, mode=0o755)
    archive.file("bin/finish", own.joinpath("finish.elf").read_bytes(), mode=0o755)
    archive.file("bin/hold", own.joinpath("hold.sh").read_bytes(), mode=0o755)
    archive.file("init", own.joinpath("init.sh").read_bytes(), mode=0o755)
    for path, content in _FILES.items():
        archive.file(path, content)
    archive.file("etc/udhcpc", _UDHCPC, mode=0o755)
    order = "".join(f"{name}\n" for name in contents.modules)
    archive.file("lib/modules/order", order.encode())
    for name, content in contents.modules.items():
        archive.file(f"lib/modules/{name}.ko", content)
    if contents.script is not None:
        archive.file("etc/script", contents.script, mode=0o755)
    for added in contents.added:
        added.write(archive)


def _is_dynamic(data: bytes) -> bool:
    from elftools.common.exceptions import ELFError  # noqa: PLC0415
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415

    try:
        segments: Iterable[object] = ELFFile(io.BytesIO(data)).iter_segments("PT_INTERP")
        return next(iter(segments), None) is not None
    except (ELFError, OverflowError):
        return True
