"""The user's own files for a guest (`--add FILE:PATH`): what goes where, and with which mode."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final

from avmm.errors import ConfigError, ImageError
from avmm.image.cpio import MOST_BYTES, Archive

_LONGEST_NAME: Final = 255
_LONGEST_PATH: Final = 4095
"""Linux's NAME_MAX, and PATH_MAX without its NUL."""
_FILES: Final = frozenset(
    map(PurePosixPath, ("/init", "/bin/busybox", "/bin/finish", "/etc/script", "/dev/console"))
)
_FOLDERS: Final = frozenset(
    map(PurePosixPath, ("/", "/bin", "/dev", "/etc", "/lib", "/lib/modules", "/proc", "/root"))
) | frozenset(map(PurePosixPath, ("/sbin", "/sys", "/tmp", "/run", "/mnt", "/usr")))
"""What avmm's own init makes or needs."""


@dataclass(frozen=True)
class Added:
    """A file or folder of the host, and its place in the guest."""

    source: Path
    target: PurePosixPath

    @classmethod
    def parse(cls, text: str) -> Added:
        """Read "FILE:PATH". If PATH ends with a slash, it is the folder into which the file goes.
        Raises `ConfigError`."""
        source, colon, target = text.rpartition(":")
        if not colon or not source or not target.startswith("/"):
            raise ConfigError(f"--add {text!r}: expected FILE:PATH with an absolute PATH")
        path = PurePosixPath("/", target.lstrip("/"))
        if target.endswith("/"):
            path /= Path(source).name or Path(source).resolve().name
        why = _why_not(path)
        if why:
            raise ConfigError(f"--add {text!r}: {why}")
        return cls(Path(source), path)

    def write(self, archive: Archive) -> None:
        """Add it to an archive; a folder with all that is in it. Symbolic links are followed for
        what is named, and kept as links in a folder. Raises `ImageError`."""
        found = _stat(self.source, follow=True)
        if stat.S_ISDIR(found.st_mode):
            for path in _below(self.source):
                _write(archive, path, self.target / path.relative_to(self.source), follow=False)
        else:
            _write(archive, self.source, self.target, follow=True)


def _why_not(path: PurePosixPath) -> str:
    """Why nothing can be put at `path`; "" if it can."""
    if ".." in path.parts:
        return "expected a PATH without '..'"
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        return f"a name in PATH has more than {_LONGEST_NAME} bytes"
    if len(os.fsencode(path)) > _LONGEST_PATH:
        return f"PATH has more than {_LONGEST_PATH} bytes"
    for parent in path.parents:
        if parent in _FILES:
            return f"{parent} is a file in the guest; expected a PATH in a folder"
    if path in _FOLDERS:
        return f"{path} is a folder in the guest; expected {path}/ to put FILE into it"
    return ""


def _below(folder: Path) -> Iterator[Path]:
    """All that is in a folder, a folder before what is in it, and the folder itself."""
    yield folder
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ImageError(f"{folder}: cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            yield from _below(entry)
        else:
            yield entry


def _write(archive: Archive, source: Path, target: PurePosixPath, *, follow: bool) -> None:
    found = _stat(source, follow=follow)
    place, mode = str(target).lstrip("/"), stat.S_IMODE(found.st_mode)
    if stat.S_ISREG(found.st_mode):
        if found.st_size > MOST_BYTES:
            raise ImageError(
                f"{source}: has {found.st_size} bytes; expected at most {MOST_BYTES}, because "
                "an initramfs holds no larger file: give it to the guest as a disk"
            )
        with _errors_of(source):
            # Not blocking, if somebody has put a FIFO there meanwhile.
            fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:  # noqa: PTH123 - there is no path to open
            try:
                archive.copy(place, _Source(file, source), found.st_size, mode=mode)
            except ValueError as error:
                raise ImageError(f"{source}: has changed while it was read: {error}") from None
    elif stat.S_ISDIR(found.st_mode):
        archive.folder(place, mode=mode)
    elif stat.S_ISLNK(found.st_mode):
        with _errors_of(source):
            to = os.readlink(source)  # noqa: PTH115 - as it is
        archive.symlink(place, to)
    else:
        raise ImageError(f"{source}: expected a file, a folder or a symbolic link")


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from None


class _Source:
    """A file whose errors are told as its own, not as the archive's."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path

    def read(self, size: int, /) -> bytes:
        with _errors_of(self._path):
            return self._file.read(size)


def _stat(path: Path, *, follow: bool) -> os.stat_result:
    try:
        return path.stat(follow_symlinks=follow)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from None
