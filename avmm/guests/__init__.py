"""Small guests that come with avmm: something to boot before there is anything to boot.

Their sources stand next to this file; the package build compiles them (see build.py).
"""

from pathlib import Path

NAMES = ("shell", "exits", "rings", "torture")


def path(name: str) -> Path:
    """The ELF image of a bundled guest."""
    if name not in NAMES:
        raise ValueError(f"no bundled guest {name!r}; there are: {', '.join(NAMES)}")
    image = Path(__file__).parent / f"{name}.elf"
    if not image.is_file():
        raise FileNotFoundError(
            f"{image} is missing: avmm's guests are compiled when the package is built, "
            f"and this one was not (try: pip install -e ., or python {image.parent}/build.py "
            f"{image.parent.parent})"
        )
    return image
