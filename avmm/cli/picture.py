"""What all pictures of the command have in common: matplotlib, and a file that is written last.

matplotlib is slow to import, and optional (`pip install 'avmm[report]'`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avmm.errors import AvmmError, ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def demand(path: Path, option: str) -> None:
    """Raise `ConfigError`, which names `option`, if no picture can be written at `path`. Call this
    before anything else begins.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(
            f"{option} needs matplotlib, which is not installed: pip install 'avmm[report]'"
        )
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{option} {path}: expected a name that ends in .png")
    try:
        with path.open("ab") as file:
            is_new = not file.tell()
        if is_new:
            path.unlink()  # perhaps there will be nothing to draw
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from None


def pyplot() -> Any:
    """matplotlib's pyplot, for files."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and optional

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    return plt


def save(figure: Figure, path: Path, option: str) -> None:
    """Write the picture, and close it. Raises `AvmmError`, which names `option`, if it cannot be
    written.
    """
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise AvmmError(f"{option} {path}: {error.strerror}") from None
    finally:
        pyplot().close(figure)
