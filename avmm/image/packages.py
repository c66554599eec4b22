"""Debian packages, as far as their files are wanted.

deb(5): an ar archive whose member `data.tar`, compressed in one of several ways, holds the
files. It is read as a stream, once for each question; nothing is unpacked to its own path.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from avmm.errors import ImageError

_MAGIC: Final = b"!<arch>\n"
_LARGEST: Final = 256 << 20
"""Of a file that is taken out of a package; kernels and modules are far smaller."""
_MODES: Final = {".gz": "r|gz", ".xz": "r|xz", ".bz2": "r|bz2", "": "r|"}


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
        with self._data() as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.size > _LARGEST:
                    raise ImageError(f"{self.path}: {member.name} is {member.size} bytes")
                content = tar.extractfile(member)
                assert content is not None
                yield (
                    PurePosixPath("/", member.name.removeprefix("./")),
                    Content(self.path, content),
                )

    @contextmanager
    def _data(self) -> Iterator[tarfile.TarFile]:
        import arpy  # noqa: PLC0415 - only where a package is read

        with _damage_told(self.path), arpy.Archive(str(self.path)) as archive:
            for member in archive:
                name = member.header.name.decode("ascii", "replace")
                if name.startswith("data.tar"):
                    with _tar(member, name.removeprefix("data.tar")) as tar:
                        yield tar
                    return
        raise ImageError(f"{self.path}: has no data.tar: expected a Debian package")


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """`ImageError` for all that the libraries raise where a package is cut off or damaged."""
    import arpy  # noqa: PLC0415
    import zstandard  # noqa: PLC0415

    damage = (arpy.ArchiveFormatError, arpy.ArchiveAccessError, zstandard.ZstdError)
    more = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError, OSError)
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


def _tar(content: Any, suffix: str) -> tarfile.TarFile:
    if suffix == ".zst":
        import zstandard  # noqa: PLC0415

        content = zstandard.ZstdDecompressor().stream_reader(content)
        suffix = ""
    mode = _MODES.get(suffix)
    if mode is None:
        raise tarfile.ReadError(f"data.tar{suffix}: a compression that is not known")
    return tarfile.open(fileobj=content, mode=mode)  # type: ignore[call-overload,no-any-return]
