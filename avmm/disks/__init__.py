"""What is behind a virtio disk: `base` says what a disk is, the other modules are disks."""

from __future__ import annotations

from avmm.disks.overlay import OverlayDisk
from avmm.disks.raw import RawDisk
from avmm.options import DiskOptions

__all__ = ["DiskOptions", "OverlayDisk", "RawDisk", "open_disk"]


def open_disk(options: DiskOptions, *, held: bool = True) -> RawDisk | OverlayDisk:
    """Open the disk that these options describe. The caller closes it. Raises `ConfigError`.

    With `held` False another machine may still write to it until `acquire`.
    """
    if options.overlay:
        return OverlayDisk(options.file)
    return RawDisk(options.file, read_only=options.read_only, held=held)
