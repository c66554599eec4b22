"""A disk whose changes are thrown away: they go to a temporary file, and the base is only read.

The file is sparse, has no name, and holds each changed sector at its own offset. A map with one
byte for each sector says which sectors were changed; this map takes memory only where something
was changed. Every request consists of whole sectors, so nothing is ever copied up, and a sector
belongs to one file or to the other. So writers need no lock between them.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from avmm import chance
from avmm.disks import files
from avmm.disks.base import SECTOR, Disk, Done
from avmm.disks.pool import Pool
from avmm.disks.raw import THREADS, WRITERS
from avmm.errors import ConfigError, DeviceError
from avmm.forks import closed_in_child
from avmm.plain import Bytes, Fields, ListOf, Row

_BASE, _OWN = b"\0", b"\1"
_CHUNK = 1 << 20
"""Bytes of changes in a piece of the saved state."""
_RUN = struct.Struct("<QQ")
"""Where a run of changed sectors begins, and how long it is, in bytes."""


class _State(Fields, version=1, error=DeviceError):
    changes = ListOf(
        Row(Bytes(most=_CHUNK // SECTOR * _RUN.size), Bytes(least=SECTOR, most=_CHUNK))
    )
    """[runs, data] of each piece, the data one run after the other."""


class OverlayDisk(Disk):
    """The contents of `path` (a file or block device, opened read-only, so that many may share
    it), overlaid with what the guest has changed until `close`.

    Changes are stored in `folder`. The default is $TMPDIR, or else /var/tmp, which is rarely in
    memory. Raises `ConfigError` if the base cannot be opened, or if the file for the changes
    cannot be made. When a machine is saved, the changes are part of its state.
    """

    can_discard = True
    saves_in_thread = True  # a guest may have changed much

    def __init__(
        self, path: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None
    ) -> None:
        self._base, self.size = files.open_disk(Path(path), read_only=True)
        self.name = f"overlay of {os.fspath(path)}"
        self._pool = Pool(f"avmm {self.name}", THREADS)
        self._writers = Pool(f"avmm {self.name} writes", WRITERS)
        place = os.fspath(folder or os.environ.get("TMPDIR") or "/var/tmp")
        try:
            self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 - close() does
            self._fd = self._file.fileno()
            os.ftruncate(self._fd, self.size)
            self._map = mmap.mmap(-1, self.size // SECTOR)
        except OSError as error:
            files.close_disk(self._base)
            raise ConfigError(
                f"disk {self.name}: expected room for a file of {self.size} bytes in {place}: "
                f"{error.strerror}"
            ) from None
        self._closed = False
        self._can_try = True
        closed_in_child(self, OverlayDisk._let_go)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Throw the changes away; idempotent. Do not call it while a machine uses the disk."""
        if not self._closed:
            self._closed = True
            self._pool.close()
            self._writers.close()
            self._file.close()
            self._map.close()
            files.close_disk(self._base)

    def _let_go(self) -> None:
        if not self._closed:
            self._file.close()
            os.close(self._base)

    def _runs(self, offset: int, length: int) -> Iterator[tuple[bool, int, int]]:
        """(is it changed, offset, length) of each run of sectors in the range."""
        at, end = offset // SECTOR, (offset + length) // SECTOR
        while at < end:
            own = self._map[at] == _OWN[0]
            stop = self._map.find(_BASE if own else _OWN, at, end)
            stop = end if stop < 0 else stop
            yield own, at * SECTOR, (stop - at) * SECTOR
            at = stop

    def _mark(self, offset: int, length: int) -> None:
        self._map[offset // SECTOR : (offset + length) // SECTOR] = _OWN * (length // SECTOR)

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self._pool.run(self._read, offset, buffers)

    def _read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        left = list(buffers)
        for own, start, length in self._runs(offset, sum(map(len, buffers))):
            files.read_fully(self._fd if own else self._base, start, files.cut(left, length))

    def read_now(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        if not self._can_try or chance.is_fixed():
            return False  # whether the host's cache has it would change the order of requests
        left = list(buffers)
        try:
            return all(
                files.read_at_once(self._fd if own else self._base, at, files.cut(left, length))
                for own, at, length in self._runs(offset, sum(map(len, buffers)))
            )
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            self._can_try = False
            return False

    async def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self._writers.run(self._write, offset, buffers)

    def begin_write(self, offset: int, buffers: Sequence[memoryview], done: Done) -> bool:
        self._writers.begin(done, self._write, offset, buffers)
        return True

    def _write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        files.write_fully(self._fd, offset, buffers)
        self._mark(offset, sum(map(len, buffers)))

    async def flush(self) -> None:
        """Does nothing, because the changes are thrown away with the process anyway."""

    async def discard(self, offset: int, length: int) -> None:
        await self._pool.run(self._zero, offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self._pool.run(self._zero, offset, length)

    def _zero(self, offset: int, length: int) -> None:
        if not files.punch(self._fd, offset, length):
            files.write_zeroes(self._fd, offset, length)
        self._mark(offset, length)

    def save(self) -> Mapping[str, Any]:
        """The changes in pieces, each with a list of its runs. One piece per run could be more
        pieces than a state may have, because a guest may write in many places."""
        changes: list[list[bytes]] = []
        runs, data = bytearray(), bytearray()
        for own, start, length in self._runs(0, self.size):
            at, end = start, start + length if own else start
            while at < end:
                part = bytearray(min(_CHUNK - len(data), end - at))
                files.read_fully(self._fd, at, [memoryview(part)])
                runs += _RUN.pack(at, len(part))
                data += part
                at += len(part)
                if len(data) == _CHUNK:
                    changes.append([bytes(runs), bytes(data)])
                    runs, data = bytearray(), bytearray()
        if data:
            changes.append([bytes(runs), bytes(data)])
        return _State.plain(changes=changes)

    def load(self, state: Mapping[str, Any]) -> None:
        saved = _State.read(f"{self.name}'s state", state)
        for number, (runs, data) in enumerate(saved.changes):
            if not self._fits(runs, data):
                raise saved.refusal(
                    f"changes[{number}] is not of whole sectors within {self.size} bytes"
                )
        self._map[:] = bytes(len(self._map))
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, self.size)
        for runs, data in saved.changes:
            left = [memoryview(data)]
            for offset, length in _RUN.iter_unpack(runs):
                self._write(offset, files.cut(left, length))

    def _fits(self, runs: bytes, data: bytes) -> bool:
        if len(runs) % _RUN.size:
            return False
        pairs = list(_RUN.iter_unpack(runs))
        return sum(length for _, length in pairs) == len(data) and all(
            0 < length <= self.size - offset and not offset % SECTOR and not length % SECTOR
            for offset, length in pairs
        )
