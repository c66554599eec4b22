"""Files appear under their names when they are complete, or not at all.

A guest that is started from a folder while the folder is made again, or after that was
interrupted, finds either the old file or the new one, but never half a file.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from avmm.errors import ImageError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else makes files in this folder inside the block. Raises `ImageError` if somebody
    does."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"{folder}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ImageError(f"{folder}: another build is making a guest there now") from None
    finally:
        os.close(fd)


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which becomes `path` when the block ends without an error.

    Turns every `OSError` into an `ImageError`, including those of the block, which must therefore
    read no other file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # the first error tells more
            partial.unlink(missing_ok=True)
