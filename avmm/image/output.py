"""Files that are made: whole under their names, or not there.

Whoever starts a guest from a folder that is being made anew, or after the making was interrupted,
finds the old file or the new one, never half of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from avmm.errors import ImageError


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which becomes `path` when the block ends without an error.

    Raises `ImageError` for any `OSError`, those of the block included: it reads nothing.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # the first error tells more
            partial.unlink(missing_ok=True)
