"""The small guests that come with avmm, so that there is something to boot at once.

Their sources are next to this file. The package build compiles them (see build.py).
"""

from pathlib import Path

NAMES = ("shell", "exits", "rings", "torture")


def path(name: str) -> Path:
    """The path of a bundled guest's ELF image. Raises `ValueError` for an unknown name, and
    `FileNotFoundError` if the guest was not compiled.
    """
    if name not in NAMES:
        raise ValueError(f"there is no bundled guest {name!r}; expected one of {', '.join(NAMES)}")
    image = Path(__file__).parent / f"{name}.elf"
    if not image.is_file():
        raise FileNotFoundError(
            f"{image} is missing: avmm's guests are compiled when the package is built, "
            f"and this one was not (try: pip install -e ., or python {image.parent}/build.py "
            f"{image.parent.parent})"
        )
    return image
