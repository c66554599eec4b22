"""Compiles avmm's own C for a test, as it is or with a bug."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

from support.parking import HEADERS


def compiled(folder: Path, source: str, header: str, old: str = "", new: str = "") -> Any:
    """A library of this source, with a piece of a header of avmm's replaced."""
    for each in HEADERS.glob("*.h"):
        shutil.copy(each, folder)
    text = (HEADERS / header).read_text()
    assert not old or text.count(old) == 1, "the source has changed"
    (folder / header).write_text(text.replace(old, new) if old else text)
    (folder / "source.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", "-pthread", f"-I{folder}", "-o", folder / "library.so"]
    subprocess.run([*command, folder / "source.c"], check=True)
    return ctypes.CDLL(str(folder / "library.so"))
