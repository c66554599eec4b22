"""Writes a whole machine to a file, and reads it back. docs/snapshot-format.md specifies the
format.

    await vm.snapshot("guest.snap")

    async with avmm.restore("guest.snap") as twin:      # now, or in another process
        ...

**Writing.** While the guest runs, RAM is copied into the file in rounds, and the dirty log records
what the guest writes meanwhile, until little is left. The rest and the state are saved while the
guest stands still. The guest runs on while the file is finished. The file appears under its name
only when it is complete and safe on disk, so a crash at any byte leaves the file that was there
before, or none.

**Reading.** RAM is mapped from the file copy-on-write, and the guest runs at once; pages are read
when they are touched. The file must not change meanwhile. It is locked. Replacing it with a newer
snapshot does not change it. On opening, everything except RAM is checked against its checksum. RAM
is checked only if `verify` asks for it, because that means reading all of it.

A snapshot is hostile input: its lengths are compared with the file's size before anything is
allocated for them, and no path in it is opened (`avmm.parts.description`).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import secrets
import stat
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar, TypeVarTuple

import trio
import xxhash

from avmm.ctrl_c import context
from avmm.disks import files
from avmm.errors import SnapshotError, StateError, host_errors
from avmm.memory.layout import RamLayout
from avmm.memory.pages import PAGE, Bitmap, Packer
from avmm.memory.ram import GuestMemory
from avmm.parts.saving import saved
from avmm.plain import ANYTHING, MAPPING, Fields, decode, encode
from avmm.progress import SnapshotProgress
from avmm.threads import in_thread, in_thread_shielded

if TYPE_CHECKING:
    from avmm.migration import Coordinator
    from avmm.parts import Parts

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_Args = TypeVarTuple("_Args")

MAGIC: Final = b"AVMMSNAP"
VERSION: Final = 1
HEADER_BYTES: Final = 4096
CHUNK: Final = 2 << 20
"""Bytes of RAM that have a checksum of their own."""
ROUNDS: Final = 4
"""The most rounds of copying. The last round is made while the guest stands still. Each round is
shorter than the one before, unless the guest writes as fast as the file.
"""
_FEW_PAGES: Final = 2048
"""When no more pages than this are left, they are copied while the guest stands still."""
_HEADER: Final = struct.Struct("<8sII 9Q Q")
_MOST_BODY: Final = 4 << 30


class _Body(Fields, error=SnapshotError):
    """Everything that is not RAM. `avmm.parts` reads it."""

    description = ANYTHING
    state = MAPPING


@dataclass(frozen=True)
class Header:
    """The beginning of the file: the offsets and lengths of its parts, in bytes, and their
    checksums (XXH3, 64 bits).
    """

    memory_offset: int
    memory_bytes: int
    sums_offset: int
    sums_bytes: int
    body_offset: int
    body_bytes: int
    file_bytes: int
    sums_sum: int
    body_sum: int

    def pack(self) -> bytes:
        """The header as bytes, as they are in the file."""
        data = _HEADER.pack(MAGIC, VERSION, HEADER_BYTES, *astuple(self), 0)[:-8]
        data += xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")
        return data.ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes, file_bytes: int, name: str) -> Header:
        """Parse a header. Raises `SnapshotError` if it is not the header of a file with
        `file_bytes` bytes.
        """
        if data[: len(MAGIC)] != MAGIC:
            raise SnapshotError(
                f"snapshot {name}: this is not a snapshot: it does not begin with {MAGIC!r}"
            )
        if len(data) < HEADER_BYTES:
            raise SnapshotError(f"snapshot {name}: it is cut off within its header")
        _, version, length, *fields, total = _HEADER.unpack_from(data)
        if version != VERSION:
            raise SnapshotError(
                f"snapshot {name}: it has format version {version}; this avmm reads {VERSION}"
            )
        if total != xxhash.xxh3_64_intdigest(data[: _HEADER.size - 8]) or length != HEADER_BYTES:
            raise SnapshotError(f"snapshot {name}: its header is damaged")
        header = cls(*fields)
        if header.file_bytes != file_bytes:
            raise SnapshotError(
                f"snapshot {name}: it is {file_bytes} bytes long, expected {header.file_bytes}: "
                "it was cut off, or not written completely"
            )
        chunks = -(-header.memory_bytes // CHUNK)
        parts = (
            (header.memory_offset, header.memory_bytes),
            (header.sums_offset, header.sums_bytes),
            (header.body_offset, header.body_bytes),
        )
        if (
            header.memory_offset % PAGE
            or header.memory_bytes % PAGE
            or header.sums_bytes != 8 * chunks
            or not 0 < header.body_bytes <= _MOST_BODY
            or any(start < HEADER_BYTES or start + size > file_bytes for start, size in parts)
        ):
            raise SnapshotError(
                f"snapshot {name}: its header describes parts that cannot be in this file"
            )
        return header


# -- writing -----------------------------------------------------------------------------------


async def write(
    parts: Parts,
    coordinator: Coordinator,
    path: str | os.PathLike[str],
    *,
    deadline: float | None,
    demand: Callable[[], None],
    on_progress: Callable[[SnapshotProgress], object],
) -> float:
    """Write a snapshot of a running machine. See `avmm.Machine.snapshot`.

    `demand` is called at the standstill, when all has been copied, just before the state is read,
    and raises where the guest has ended. Then no file is written.
    """
    target = Path(path)
    async with _replacement(target, HEADER_BYTES + parts.memory.size) as fd:
        writer = _Writer(fd, parts.memory, target)
        async with parts.dirty_log() as log:
            with host_errors(f"snapshot {target}"):
                left = await in_thread(parts.memory.populated)

            def tell(number: int) -> None:
                on_progress(SnapshotProgress(number, len(left)))

            for number in range(1, ROUNDS):
                await writer.copy(left, partial(tell, number), skip_zeros=number == 1)
                await in_thread(log.collect, left)
                if len(left) <= _FEW_PAGES:
                    break
            stopped = trio.current_time()
            async with coordinator.paused(deadline):
                await in_thread(log.collect, left)
                await writer.copy(left, partial(tell, number + 1))
                demand()
                state = await saved(parts)
                description = await in_thread(parts.describe)
            downtime = trio.current_time() - stopped
        await writer.finish(_Body.plain(description=description, state=state))
    return downtime


class _Writer:
    """Fills the file. Each call runs in a thread, one after the other. Raises `SnapshotError`."""

    def __init__(self, fd: int, memory: GuestMemory, target: Path) -> None:
        self._fd = fd
        self._ram = memory.whole
        self._packer = Packer(memory.whole, copies=False)
        self._target = target

    async def copy(
        self, left: Bitmap, tell: Callable[[], object], *, skip_zeros: bool = False
    ) -> None:
        """Write the pages in `left`, which is empty afterwards. Calls `tell` before each piece. A
        cancellation waits until the current piece is written.
        """
        self._packer.rewind()
        tell()
        while await self._in_thread(self._copy_some, left, skip_zeros):
            tell()

    async def finish(self, content: object) -> None:
        """Add everything except RAM, and make the file safe from a loss of power."""
        await self._in_thread(self._finish, await in_thread(encode, content))

    async def _in_thread(self, function: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
        with _errors_named(self._target):
            return await in_thread(function, *args)

    def _copy_some(self, left: Bitmap, skip_zeros: bool) -> bool:
        packed = self._packer.next(left, skip_zeros=skip_zeros)
        if packed is None:
            return False
        for page, count, is_data in packed.each():
            at, length = page * PAGE, count * PAGE
            if is_data:
                _write_fully(self._fd, self._ram[at : at + length], HEADER_BYTES + at)
            elif not files.punch(self._fd, HEADER_BYTES + at, length):
                files.write_zeroes(self._fd, HEADER_BYTES + at, length)
        return True

    def _finish(self, body: bytes) -> None:
        size = len(self._ram)
        sums = b"".join(
            value.to_bytes(8, "little") for value in _sums(self._fd, HEADER_BYTES, size)
        )
        sums_offset = HEADER_BYTES + size
        body_offset = sums_offset + len(sums)
        _write_fully(self._fd, memoryview(sums), sums_offset)
        _write_fully(self._fd, memoryview(body), body_offset)
        header = Header(
            HEADER_BYTES,
            size,
            sums_offset,
            len(sums),
            body_offset,
            len(body),
            body_offset + len(body),
            xxhash.xxh3_64_intdigest(sums),
            xxhash.xxh3_64_intdigest(body),
        )
        os.fsync(self._fd)  # sync everything else before the header, which makes the file valid
        _write_fully(self._fd, memoryview(header.pack()), 0)
        os.fsync(self._fd)


def _write_fully(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _sums(fd: int, offset: int, size: int) -> Iterator[int]:
    """The checksum of each chunk of RAM in the file; 0 for one that is zeros.

    That holds for holes and for written zeros alike, because programs that copy files turn one
    into the other. The file is read, not mapped: on a tmpfs, touching a mapped hole takes memory,
    and is a SIGBUS if the tmpfs is full.
    """
    buffer = memoryview(bytearray(min(CHUNK, size)))
    zeros = {length: xxhash.xxh3_64_intdigest(bytes(length)) for length in (CHUNK, size % CHUNK)}
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        if _is_hole(fd, offset + start, length):
            yield 0
            continue
        files.read_fully(fd, offset + start, [buffer[:length]])
        value = xxhash.xxh3_64_intdigest(buffer[:length])
        yield 0 if value == zeros[length] else value


def _is_hole(fd: int, offset: int, length: int) -> bool:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + length
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return True


@contextmanager
def _errors_named(target: Path) -> Iterator[None]:
    """Use it only around code that touches the file, because a `PauseTimeout` is also an
    `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise SnapshotError(f"snapshot {target}: {error.strerror or error}") from error


@context
async def _replacement(target: Path, size: int) -> AsyncIterator[int]:
    """A new file of `size` bytes, to be written inside the block. When the block ends, it takes
    the place of `target`.

    If this is cancelled, the file that was there before stays, unless the replacement has begun:
    then the new one takes its place.
    """
    if not target.name:
        raise SnapshotError(f"snapshot {target}: expected the name of a file")
    with _errors_named(target):
        target = await in_thread(_followed, target)
        # The target's own name may already be as long as a name may be.
        partial_path = target.with_name(f".avmm-{secrets.token_hex(8)}.partial")
        fd = await in_thread(_create, target, partial_path, size)
    try:
        yield fd
        with _errors_named(target):
            await in_thread(_put, partial_path, target)
    finally:
        await in_thread_shielded(_forget, fd, partial_path)


def _followed(target: Path) -> Path:
    """The file that a symbolic link leads to: it is that file which is replaced, not the link."""
    return target.resolve() if target.is_symlink() else target


def _create(target: Path, partial_path: Path, size: int) -> int:
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
        # A folder is not refused here: renaming a file over it fails by itself.
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise SnapshotError(
                f"snapshot {target}: expected a regular file or nothing there, not a device, "
                "pipe or socket"
            )
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(partial_path, flags, 0o600)  # it contains the guest's secrets
    try:
        os.ftruncate(fd, size)
    except BaseException:
        _forget(fd, partial_path)
        raise
    return fd


def _put(partial_path: Path, target: Path) -> None:
    """Replace `target`. What fails after that is only a warning, because the file is there."""
    partial_path.replace(target)
    try:
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        logger.warning(
            "snapshot %s: it is complete, but might be gone after a power failure, because its "
            "folder cannot be flushed: %s",
            target,
            error.strerror,
        )


def _forget(fd: int, partial_path: Path) -> None:
    os.close(fd)
    partial_path.unlink(missing_ok=True)


# -- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was opened and checked."""

    description: object
    state: Mapping[str, object]
    open_memory: Callable[[RamLayout], GuestMemory]
    """Maps its RAM and closes the file. Call it only once."""
    close: Callable[[], None]
    """Closes the file, if RAM is not going to be mapped."""


def read(
    path: str | os.PathLike[str],
    *,
    verify: bool = False,
    on_chunk: Callable[[], object] = lambda: None,
) -> Snapshot:
    """Open a snapshot. Raises `SnapshotError` if it cannot be read, is not a snapshot, or is
    damaged.

    Blocks for some milliseconds; with `verify`, for as long as it takes to read the whole file.
    With `verify` it calls `on_chunk` again and again, and an error that `on_chunk` raises ends the
    reading.
    """
    name = os.fspath(path)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(Path(path).open("rb", buffering=0))
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            size = os.fstat(file.fileno()).st_size
            header = Header.unpack(os.pread(file.fileno(), HEADER_BYTES, 0), size, name)
            body = _body(file, header, name)
            if verify:
                _verify(file, header, name, on_chunk)
        except BlockingIOError:
            raise SnapshotError(
                f"snapshot {name}: another program has locked it, as one does that changes it; "
                "expected a file that nobody changes"
            ) from None
        except OSError as error:
            raise SnapshotError(f"snapshot {name}: {error.strerror}") from None
        stack.pop_all()
    open_memory = partial(_map, file, header, name)
    return Snapshot(body.description, body.state, open_memory, file.close)


def _body(file: BinaryIO, header: Header, name: str) -> _Body:
    """The decoded body. Its bytes are not copied first, because a file of holes may be long and
    contain nothing.
    """
    start = header.body_offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    end = header.body_offset + header.body_bytes
    with (
        mmap.mmap(file.fileno(), end - start, prot=mmap.PROT_READ, offset=start) as whole,
        memoryview(whole) as view,
        view[header.body_offset - start :] as body,
    ):
        _demand_sum(body, header.body_sum, name)
        try:
            content = decode(body, f"snapshot {name}: its state")
        except StateError as error:
            raise SnapshotError(str(error)) from None
        return _Body.read(f"snapshot {name}: its body", content)


def _demand_sum(data: bytes | memoryview, expected: int, name: str) -> None:
    if xxhash.xxh3_64_intdigest(data) != expected:
        raise SnapshotError(f"snapshot {name}: it is damaged: a checksum is wrong")


def _verify(file: BinaryIO, header: Header, name: str, on_chunk: Callable[[], object]) -> None:
    sums = os.pread(file.fileno(), header.sums_bytes, header.sums_offset)
    _demand_sum(sums, header.sums_sum, name)
    found = _sums(file.fileno(), header.memory_offset, header.memory_bytes)
    for number, value in enumerate(found):
        on_chunk()
        if value != int.from_bytes(sums[8 * number : 8 * number + 8], "little"):
            raise SnapshotError(
                f"snapshot {name}: its RAM is damaged, at {number * CHUNK:#x} to "
                f"{min((number + 1) * CHUNK, header.memory_bytes):#x}"
            )


def _map(file: BinaryIO, header: Header, name: str, layout: RamLayout) -> GuestMemory:
    with file:
        try:
            base = (file.fileno(), header.memory_offset)
            return GuestMemory(header.memory_bytes, base=base, layout=layout)
        except OSError as error:
            raise SnapshotError(f"snapshot {name}: {error.strerror}") from None
