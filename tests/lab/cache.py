"""What the lab builds is kept in the user's cache, by the content it was made from.

Artefacts are folders. One is built in a folder beside its place and renamed when it is whole, so
an interrupted build or a full disk leaves nothing that looks finished; a lock file lets one
process build while others wait. The next builder sweeps what was left behind, and what nobody has
used for a week: another clone of avmm may be using what this one does not know. It is renamed
before it is deleted, for the same reason; and a lock on the cache's folder is held for as long as
it takes to find an artefact or to take it away, so that nobody is given one that goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from avmm.errors import ImageError

KEPT_SECONDS: Final = 7 * 86400
_KEY: Final = 16
"""Digits of the content's hash in a folder's name."""


class LabError(Exception):
    """The lab cannot be built or run; says what is missing."""


def root() -> Path:
    """The cache's folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "avmm-lab"


def artefact(name: str, made_from: object, build: Callable[[Path], None]) -> Path:
    """The folder `name` as `build` makes it from what `made_from` tells (by its `repr`).

    Raises `LabError` where the disk is full, and what `build` raises.
    """
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:_KEY]
    folder = root()
    place = folder / f"{name}-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return place if _found(place) else _built(folder, name, place, build)
    except (OSError, ImageError) as error:
        raise LabError(f"lab: {name} cannot be built in {folder}: {error}") from error


def _built(folder: Path, name: str, place: Path, build: Callable[[Path], None]) -> Path:
    with _locked(folder / f"{name}.lock"):
        if _found(place):  # somebody else has built it meanwhile
            return place
        _sweep(folder, name)
        partial = folder / f"{name}-partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            with step(f"lab: building {name}"):
                build(partial)
            partial.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return place


def _found(place: Path) -> bool:
    """Is it there? It counts as used now."""
    with _still(place.parent):
        if not place.is_dir():
            return False
        os.utime(place)
        return True


def _sweep(folder: Path, name: str) -> None:
    """Delete the artefacts of that name which nobody has used for long."""
    aside = folder / f"{name}-swept"
    shutil.rmtree(aside, ignore_errors=True)  # whoever swept before us may have been killed
    for other in folder.glob(f"{name}-" + "[0-9a-f]" * _KEY):
        with _still(folder):
            unused = time.time() - other.stat().st_mtime > KEPT_SECONDS
            if unused:
                other.rename(aside)
        if unused:
            shutil.rmtree(aside)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say what is going on, and how long it took."""
    start = time.monotonic()
    print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print(" failed", file=sys.stderr, flush=True)
        raise
    print(f" {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def _still(folder: Path) -> Iterator[None]:
    """Nobody finds an artefact or takes one away meanwhile; held for moments only."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"lab: waiting for another build ({path})", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
