"""A disk that is a file or block device, byte for byte.

Requests that the host's page cache can serve at once are served in trio's thread (RWF_NOWAIT). The
others go to a few threads, which move the bytes directly between the file and guest memory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final, Self

from avmm import chance
from avmm.disks import files
from avmm.disks.base import Disk, Done
from avmm.disks.pool import Pool
from avmm.forks import close_descriptor, closed_in_child
from avmm.threads import in_thread, in_thread_shielded

THREADS: Final = 4
"""How many requests of one disk may wait for the host's storage at the same time."""
WRITERS: Final = 2
"""How many more may write. Usually the host just takes written data into its cache, so more
threads would only get in each other's way. If writes have to wait, reads need not wait behind
them."""


class RawDisk(Disk):
    """The file or block device at `path`. It is opened and locked immediately, for one writer or
    for any number of readers. Raises `ConfigError` if that is not possible. With `held` False it
    is not locked before `acquire`, so another machine may write to it until it hands over to this
    one.

    Close it, or leave its `with` block, when the machine has ended; a `Machine` closes the disks
    of its config itself.
    """

    can_discard = True
    contents_stay = True

    def __init__(
        self, path: str | os.PathLike[str], *, read_only: bool = False, held: bool = True
    ) -> None:
        self._fd, self.size = files.open_disk(Path(path), read_only=read_only, lock=held)
        self.name = os.fspath(path)
        self.read_only = read_only
        self.can_discard = not read_only
        self._pool = Pool(f"avmm disk {Path(path).name}", THREADS)
        self._writers = Pool(f"avmm disk {Path(path).name} writes", WRITERS)
        self._at_once = {"read": True, "write": True}
        self._flush_error: OSError | None = None
        closed_in_child(self, lambda disk: close_descriptor(disk._fd))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End its threads, then unlock and close it; idempotent. Do not call it while a machine
        uses the disk."""
        self._pool.close()
        self._writers.close()
        if self._fd >= 0:
            files.close_disk(self._fd)
            self._fd = -1

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self._pool.run(files.read_fully, self._fd, offset, buffers)

    async def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self._writers.run(files.write_fully, self._fd, offset, buffers)

    def read_now(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        return self._try("read", offset, buffers)

    def write_now(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        return self._try("write", offset, buffers)

    def begin_write(self, offset: int, buffers: Sequence[memoryview], done: Done) -> bool:
        self._writers.begin(done, files.write_fully, self._fd, offset, buffers)
        return True

    def _try(self, what: str, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Transfer the bytes if that needs no waiting; otherwise return False. File systems differ
        in what they can do without waiting: ext4 cannot write in this way."""
        if not self._at_once[what] or chance.is_fixed():
            return False  # whether the host's cache has it would change the order of requests
        transfer = files.read_at_once if what == "read" else files.write_at_once
        try:
            return transfer(self._fd, offset, buffers)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            self._at_once[what] = False
            return False

    async def release(self) -> None:
        await self.flush()
        await in_thread_shielded(files.unlock_file, self._fd)

    async def acquire(self) -> None:
        lock = partial(files.lock_file, self._fd, Path(self.name), read_only=self.read_only)
        await in_thread(lock)

    async def flush(self) -> None:
        """fdatasync(2). Once it has failed, it always fails, because the kernel reports lost data
        only once and then forgets it."""
        if not self.read_only:
            await self._pool.run(self._flush)

    def _flush(self) -> None:
        if self._flush_error is not None:
            raise OSError(*self._flush_error.args)
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._flush_error = OSError(*error.args)
            raise

    async def discard(self, offset: int, length: int) -> None:
        await self._pool.run(files.punch, self._fd, offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self._pool.run(self._zero, offset, length, unmap)

    def _zero(self, offset: int, length: int, unmap: bool) -> None:
        if unmap and files.punch(self._fd, offset, length):
            return
        if not files.zero(self._fd, offset, length):
            files.write_zeroes(self._fd, offset, length)
