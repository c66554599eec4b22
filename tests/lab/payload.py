"""What is sent into L1: the working tree as it is here, built, and a script to run."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from support.required import REQUIRE_LAB

import avmm

TREE: Final = Path(avmm.__file__).parents[1]
_BLOCK: Final = 512
_SKIPPED: Final = frozenset({"__pycache__", ".hypothesis", ".git", "build"})
_PROLOGUE: Final = """\
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp PYTHONPATH=/lab:/lab/tests:/site
export PYTHONDONTWRITEBYTECODE=1 AVMM_REQUIRE_KVM=1 AVMM_LAB={kind} LC_ALL=C.UTF-8
export AVMM_REQUIRE_LAB={required}
cd /lab
stty raw -echo </dev/ttyS1 2>/dev/null || /usr/bin/busybox stty raw -echo </dev/ttyS1
echo up >/dev/ttyS1
"""


def write(
    path: Path, kind: str, script: str, texts: Mapping[str, str], files: Mapping[str, Path]
) -> None:
    """Write the tar: the tree, texts and files by name, and `script` as run.sh."""
    with tarfile.open(path, "w") as tar:
        for name in ("avmm", "avmm_early.py", "tests", "pyproject.toml", "examples"):
            tar.add(TREE / name, name, filter=_wanted)
        content = _PROLOGUE.format(kind=kind, required=os.environ.get(REQUIRE_LAB, "0")) + script
        for name, text in {"run.sh": content, **texts}.items():
            info = tarfile.TarInfo(name)
            data = text.encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, file in files.items():
            tar.add(file, name)
    with path.open("ab") as file:  # a disk has whole sectors
        file.truncate(-(-path.stat().st_size // _BLOCK) * _BLOCK)


def _wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if _SKIPPED & set(Path(info.name).parts) else info
