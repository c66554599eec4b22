"""What is behind a virtio disk: `base` says what a disk is, the rest are disks."""

from __future__ import annotations

from avmm.disks.overlay import OverlayDisk
from avmm.disks.raw import RawDisk
from avmm.options import DiskOptions

__all__ = ["DiskOptions", "OverlayDisk", "RawDisk", "open_disk"]


def open_disk(options: DiskOptions, *, held: bool = True) -> RawDisk | OverlayDisk:
    """The disk that these options mean, for the caller to close. Raises `ConfigError`.

    Without `held` another machine may write it until `acquire`.
    """
    if options.overlay:
        return OverlayDisk(options.file)
    return RawDisk(options.file, read_only=options.read_only, held=held)
