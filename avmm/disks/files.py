"""What disks that are files need from the host: opening, locking, complete transfers, holes."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from avmm.disks.base import SECTOR
from avmm.errors import ConfigError
from avmm.native._native import ffi, lib

_CANNOT: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM)
"""The errors of a file system or block device that cannot make holes, or not at such offsets."""
_ZEROES: Final = memoryview(bytes(256 * 1024))
_PARTS: Final = 1024
"""The kernel's limit on buffers in one call (IOV_MAX)."""


def open_disk(path: Path, *, read_only: bool, lock: bool = True) -> tuple[int, int]:
    """The file or block device as (descriptor, size in bytes), locked (`lock`) until it is closed.

    Either one writer has it alone, or any number of readers have it. The lock (of the open file
    description, fcntl(2)) excludes other processes and other disks of this process. It does not
    stop programs that do not look for locks. Raises `ConfigError`.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR)
    try:
        if stat.S_ISBLK(path.stat().st_mode) and not read_only and lock:
            flags |= os.O_EXCL  # refused while it is mounted
        fd = os.open(path, flags)
    except OSError as error:
        wanted = "one to read" if read_only else "one to read and write"
        raise ConfigError(f"disk {path}: expected {wanted}: {error.strerror}") from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ConfigError(f"disk {path}: expected a file or a block device")
        if lock:
            lock_file(fd, path, read_only=read_only)
        size = os.lseek(fd, 0, os.SEEK_END)
        if not size or size % SECTOR:
            raise ConfigError(
                f"disk {path}: its size is {size} bytes, expected a multiple of {SECTOR}"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd, size


def lock_file(fd: int, path: Path, *, read_only: bool) -> None:
    """Lock it as `open_disk` does, unless it is locked. Raises `ConfigError` if it is in use."""
    try:
        _set_lock(fd, fcntl.F_RDLCK if read_only else fcntl.F_WRLCK)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(f"disk {path}: it cannot be locked: {error.strerror}") from None
        wanted = "nobody writes" if read_only else "nobody else uses"
        raise ConfigError(f"disk {path}: it is in use; expected one that {wanted}") from None


def unlock_file(fd: int) -> None:
    """Unlock it. Does nothing if it is not locked."""
    _set_lock(fd, fcntl.F_UNLCK)


def close_disk(fd: int) -> None:
    """Close what `open_disk` has returned. It is unlocked first: a process that was forked by
    other code than Python's may still have the descriptor, and would keep the lock."""
    with suppress(OSError):  # closing it unlocks it as well, if nobody else has it
        unlock_file(fd)
    os.close(fd)


def _set_lock(fd: int, kind: int) -> None:
    whole_file = struct.pack("@hhqqi0q", kind, os.SEEK_SET, 0, 0, 0)  # struct flock
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole_file)


def read_fully(fd: int, offset: int, buffers: Sequence[memoryview]) -> None:
    """Fill `buffers` from `offset` on. Raises `OSError`, also if the file ends too early."""
    left = buffers
    while left:
        done = os.preadv(fd, left[:_PARTS], offset)
        if not done:
            raise OSError(errno.EIO, "the file is shorter than it was")
        offset += done
        left = _after(left, done)


def write_fully(fd: int, offset: int, buffers: Sequence[memoryview]) -> None:
    """Write all of `buffers` at `offset`. Raises `OSError`."""
    left = buffers
    while left:
        done = os.pwritev(fd, left[:_PARTS], offset)
        offset += done
        left = _after(left, done)


def read_at_once(fd: int, offset: int, buffers: Sequence[memoryview]) -> bool:
    """Do what `read_fully` does if the kernel's cache has all of the data; otherwise return False.
    Raises `OSError`."""
    try:
        return os.preadv(fd, buffers, offset, os.RWF_NOWAIT) == sum(map(len, buffers))
    except BlockingIOError:
        return False


def write_at_once(fd: int, offset: int, buffers: Sequence[memoryview]) -> bool:
    """Do what `write_fully` does if the kernel's cache can take all of the data at once; otherwise
    return False. Raises `OSError`."""
    try:
        return os.pwritev(fd, buffers, offset, os.RWF_NOWAIT) == sum(map(len, buffers))
    except BlockingIOError:
        return False


def cut(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Remove the first `count` bytes from `buffers`, and return them."""
    taken = []
    while count:
        if count < len(buffers[0]):
            taken.append(buffers[0][:count])
            buffers[0] = buffers[0][count:]
            break
        count -= len(buffers[0])
        taken.append(buffers.pop(0))
    return taken


def _after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """The rest of `buffers` after their first `count` bytes."""
    for at, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[at + 1 :]]
        count -= len(buffer)
    return []


def punch(fd: int, offset: int, length: int) -> bool:
    """Make the bytes zero and free their space. Returns False if that is not possible. Raises
    `OSError`."""
    return _allocate(fd, lib.FALLOC_FL_PUNCH_HOLE, offset, length)


def zero(fd: int, offset: int, length: int) -> bool:
    """Make the bytes zero and keep their space. Returns False if that is not possible. Raises
    `OSError`."""
    return _allocate(fd, lib.FALLOC_FL_ZERO_RANGE, offset, length)


def write_zeroes(fd: int, offset: int, length: int) -> None:
    """Write zeros, for when nothing faster is possible. Raises `OSError`."""
    while length:
        count = min(length, len(_ZEROES))
        write_fully(fd, offset, [_ZEROES[:count]])
        offset += count
        length -= count


def _allocate(fd: int, mode: int, offset: int, length: int) -> bool:
    while lib.fallocate(fd, mode | lib.FALLOC_FL_KEEP_SIZE, offset, length):
        if ffi.errno == errno.EINTR:
            continue
        if ffi.errno in _CANNOT:
            return False
        raise OSError(ffi.errno, os.strerror(ffi.errno))
    return True
