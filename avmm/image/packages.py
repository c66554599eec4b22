"""Reads the files in Debian packages.

deb(5): an ar archive whose member `data.tar`, compressed in one of several ways, holds the files,
and `control.tar` what the package is.
The archive is read as a stream, once for each question. Nothing is unpacked to its own path.

tarfile keeps every header, and reads long ones (a name, a pax header) completely, however long
they claim to be. So what it reads besides the files' contents is counted, and limited.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Final

from avmm.errors import ImageError
from avmm.image.decoded import Decoded

_MAGIC: Final = b"!<arch>\n"
_LARGEST: Final = 256 << 20
"""The most bytes of a file in a package. Kernels and modules are far smaller."""
_MOST_CONTROL: Final = 1 << 20
_HEADERS: Final = 32 << 20
"""The most bytes of all headers in a package. Those of a cloud kernel with 1,150 files have 0.7
MiB.
"""


class Package:
    """A .deb file. Raises `ImageError`, which names the file, if it is not one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                magic = file.read(len(_MAGIC))
        except OSError as error:
            raise ImageError(f"{path}: cannot be opened: {error.strerror}") from None
        if magic != _MAGIC:
            raise ImageError(f"{path}: is not a Debian package: expected an ar archive (.deb)")

    @cached_property
    def architecture(self) -> str:
        """The architecture in Debian's words, like "amd64"; "all" if it does not matter."""
        for path, content, _ in self._entries("control.tar"):
            if path.name == "control" and content is not None:
                for line in content.read(_MOST_CONTROL).decode("utf-8", "replace").splitlines():
                    field, _, value = line.partition(":")
                    if field.lower() == "architecture":
                        return value.strip()
        raise ImageError(f"{self.path}: does not say for which architecture it is")

    def files(self) -> Iterator[tuple[PurePosixPath, Content]]:
        """The package's regular files, in its order: (path from the root, content). Hard links are
        left out.

        Read a content before you ask for the next one.
        """
        for path, content, _ in self._entries("data.tar"):
            if content is not None:
                yield path, content

    def hard_links(self) -> dict[PurePosixPath, PurePosixPath]:
        """The hard links in the package: the path of each, and that of the file that it is."""
        entries = self._entries("data.tar")
        return {path: target for path, _, target in entries if target is not None}

    def _entries(
        self, part: str
    ) -> Iterator[tuple[PurePosixPath, Content | None, PurePosixPath | None]]:
        """What is in a part of the package: (path, content, target of a hard link)."""
        with self._member(part) as (data, tar):
            while (member := tar.next()) is not None:
                # What is stored, because a folder has no content, whatever size it claims.
                stored = tar.offset - member.offset_data
                if max(member.size, stored) > _LARGEST:
                    raise ImageError(
                        f"{self.path}: {member.name} has {member.size} bytes, which is too much"
                    )
                data.allow(stored)
                path = _rooted(member.name)
                if member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    yield path, Content(self.path, content), None
                elif member.islnk():
                    yield path, None, _rooted(member.linkname)

    @contextmanager
    def _member(self, wanted: str) -> Iterator[tuple[_Counted, tarfile.TarFile]]:
        import arpy  # noqa: PLC0415 - only when a package is read

        with _damage_told(self.path), arpy.Archive(str(self.path)) as archive:
            for member in archive:
                name = member.header.name.decode("ascii", "replace")
                if name.startswith(wanted):
                    suffix = name.removeprefix(wanted)
                    data = _Counted(Decoded(member, member.header.size, suffix))
                    with tarfile.open(fileobj=data, mode="r|") as tar:  # type: ignore[call-overload]
                        yield data, tar
                    return
        raise ImageError(f"{self.path}: has no {wanted}: expected a Debian package")


def _rooted(name: str) -> PurePosixPath:
    return PurePosixPath("/", name.removeprefix("./"))


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Turn all errors that the libraries raise for a cut off or damaged package into
    `ImageError`.
    """
    import arpy  # noqa: PLC0415

    damage = (arpy.ArchiveFormatError, arpy.ArchiveAccessError, tarfile.TarError)
    # tarfile recurses one level for each header that describes the next one.
    more = (EOFError, ValueError, RecursionError, OSError)
    try:
        yield
    except (*damage, *more) as error:
        raise ImageError(f"{path}: is damaged: {error}") from error


class Content:
    """A file in a package. Reading it raises `ImageError` if the package is damaged."""

    def __init__(self, package: Path, content: IO[bytes]) -> None:
        self._package = package
        self._content = content

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes. If `size` is negative, all that are left."""
        with _damage_told(self._package):
            return self._content.read(size)


class _Counted:
    """The tar as tarfile reads it, limited to `_HEADERS` bytes plus what is allowed for each
    file's content.
    """

    def __init__(self, data: Decoded) -> None:
        self._data = data
        self._left = _HEADERS

    def allow(self, size: int) -> None:
        """The next `size` bytes belong to a file, and do not count as headers."""
        self._left += size

    def read(self, size: int) -> bytes:
        """Up to `size` bytes. Raises `ValueError` if the headers have become too long."""
        data = self._data.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"its headers have more than {_HEADERS} bytes")
        return data
