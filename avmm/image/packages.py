"""Debian packages, as far as their files are wanted.

deb(5): an ar archive whose member `data.tar`, compressed in one of several ways, holds the
files. It is read as a stream, once for each question; nothing is unpacked to its own path.
"""

from __future__ import annotations

import tarfile
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

    def files(self) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
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
                yield PurePosixPath("/", member.name.removeprefix("./")), content

    @contextmanager
    def _data(self) -> Iterator[tarfile.TarFile]:
        import arpy  # noqa: PLC0415 - only where a package is read

        try:
            with arpy.Archive(str(self.path)) as archive:
                for member in archive:
                    name = member.header.name.decode("ascii", "replace")
                    if name.startswith("data.tar"):
                        with _tar(member, name.removeprefix("data.tar")) as tar:
                            yield tar
                        return
        except (arpy.ArchiveFormatError, tarfile.TarError, EOFError, OSError) as error:
            raise ImageError(f"{self.path}: is damaged: {error}") from error
        raise ImageError(f"{self.path}: has no data.tar: expected a Debian package")


def _tar(content: Any, suffix: str) -> tarfile.TarFile:
    if suffix == ".zst":
        import zstandard  # noqa: PLC0415

        content = zstandard.ZstdDecompressor().stream_reader(content)
        suffix = ""
    mode = _MODES.get(suffix)
    if mode is None:
        raise tarfile.ReadError(f"data.tar{suffix}: a compression that is not known")
    return tarfile.open(fileobj=content, mode=mode)  # type: ignore[call-overload,no-any-return]
