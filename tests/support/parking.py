"""The source of avmm's parking lot, for tests that compile it, as it is or with a bug."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import avmm

SUPPORT: Final = Path(__file__).parent
HEADERS: Final = Path(avmm.__file__).parent / "kvm"


def planted(old: str, new: str) -> str:
    """parking.h with a piece of it replaced, which it has exactly once."""
    source = (HEADERS / "parking.h").read_text()
    assert source.count(old) == 1, "the source has changed"
    return source.replace(old, new)
