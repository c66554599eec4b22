"""Debian packages, as far as their files are wanted.

deb(5): an ar archive whose member `data.tar`, compressed in one of several ways, holds the
files. It is read as a stream, once for each question; nothing is unpacked to its own path.

tarfile keeps every header, and reads the long ones whole (a name, a pax header), however long they
say to be. So what it reads besides the files' contents is counted, and limited.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Final

from avmm.errors import ImageError
from avmm.image.decoded import Decoded

_MAGIC: Final = b"!<arch>\n"
_LARGEST: Final = 256 << 20
"""Of a file that is taken out of a package; kernels and modules are far smaller."""
_HEADERS: Final = 32 << 20
"""Of all headers in a package; those of the 1,150 files of a cloud kernel are 0.7 MiB."""


class Package:
    """A .deb file. Raises `ImageError`, which names it, where it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                magic = file.read(len(_MAGIC))
        except OSError as error:
            raise ImageError(f"{path}: cannot be opened: {error.strerror}") from None
        if magic != _MAGIC:
            raise ImageError(f"{path}: is no Debian package: expected an ar archive (.deb)")

    def files(self) -> Iterator[tuple[PurePosixPath, Content]]:
        """Its regular files in the package's order: (path from the root, content).

        A content can be read until the next one is asked for.
        """
        with self._data() as (data, tar):
            while (member := tar.next()) is not None:
                stored = tar.offset - member.offset_data  # nothing of a folder, whatever it says
                if max(member.size, stored) > _LARGEST:
                    raise ImageError(f"{self.path}: {member.name} is {member.size} bytes")
                data.allow(stored)
                if not member.isfile():
                    continue
                content = tar.extractfile(member)
                assert content is not None
                yield (
                    PurePosixPath("/", member.name.removeprefix("./")),
                    Content(self.path, content),
                )

    @contextmanager
    def _data(self) -> Iterator[tuple[_Counted, tarfile.TarFile]]:
        import arpy  # noqa: PLC0415 - only where a package is read

        with _damage_told(self.path), arpy.Archive(str(self.path)) as archive:
            for member in archive:
                name = member.header.name.decode("ascii", "replace")
                if name.startswith("data.tar"):
                    suffix = name.removeprefix("data.tar")
                    data = _Counted(Decoded(member, member.header.size, suffix))
                    with tarfile.open(fileobj=data, mode="r|") as tar:  # type: ignore[call-overload]
                        yield data, tar
                    return
        raise ImageError(f"{self.path}: has no data.tar: expected a Debian package")


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """`ImageError` for all that the libraries raise where a package is cut off or damaged."""
    import arpy  # noqa: PLC0415

    damage = (arpy.ArchiveFormatError, arpy.ArchiveAccessError, tarfile.TarError)
    # tarfile descends a level with each header that is about the next one.
    more = (EOFError, ValueError, RecursionError, OSError)
    try:
        yield
    except (*damage, *more) as error:
        raise ImageError(f"{path}: is damaged: {error}") from error


class Content:
    """A file in a package; reading it raises `ImageError` where the package is damaged."""

    def __init__(self, package: Path, content: IO[bytes]) -> None:
        self._package = package
        self._content = content

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes, all that are left where it is negative."""
        with _damage_told(self._package):
            return self._content.read(size)


class _Counted:
    """A tar for tarfile to read: `_HEADERS` bytes, and what is allowed for each content."""

    def __init__(self, data: Decoded) -> None:
        self._data = data
        self._left = _HEADERS

    def allow(self, size: int) -> None:
        """So many bytes are a file's."""
        self._left += size

    def read(self, size: int) -> bytes:
        """Up to `size` bytes. Raises `ValueError` where that is too much."""
        data = self._data.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"its headers are more than {_HEADERS} bytes")
        return data
