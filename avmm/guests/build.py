"""Compiles the bundled guests, and the programs for Linux guests that `avmm image` puts into them.

It needs only a C compiler and binutils for x86-64.

The package build calls build(). To run it by hand, use `python build.py PACKAGE`. It imports
nothing of avmm, because avmm cannot be imported yet at build time.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent
NAMES = sorted(main.parent.name for main in SOURCE.glob("*/main.c"))
PROGRAMS = SOURCE.parent / "image"
"""One C file for each program."""

FLAGS = (
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror=implicit-function-declaration"),
    *("-ffreestanding", "-fno-builtin", "-fno-stack-protector", "-fno-pic", "-fno-pie"),
    *("-fno-asynchronous-unwind-tables", "-fno-strict-aliasing", "-ffunction-sections"),
    *("-fdata-sections", "-fcf-protection=none"),
    # No vector or FPU registers, so that interrupt handlers need not save them. No red zone,
    # because interrupts would overwrite it. Only baseline x86-64, because some hosts interpret
    # ring 0 and know little more.
    *("-march=x86-64", "-m64", "-mgeneral-regs-only", "-mno-red-zone", "-mcmodel=small"),
    *("-nostdlib", "-static", "-no-pie"),
    *("-Wl,--gc-sections", "-Wl,--build-id=none", "-Wl,-z,noexecstack"),
    *("-Wl,-z,max-page-size=4096",),
)


class BuildError(Exception):
    """A guest could not be compiled. The message says what to do about it."""


def build(out: Path, cc: str = os.environ.get("CC", "cc")) -> list[Path]:
    """Compile every guest to out/<name>.elf. An image appears there complete or not at all. Raises
    `BuildError`.
    """
    script = ("-T", str(SOURCE / "common/guest.ld"), f"-I{SOURCE / 'common'}")
    images = []
    for name in NAMES:
        sources = [
            file
            for folder in (SOURCE / "common", SOURCE / name)
            for file in sorted(folder.iterdir())
            if file.suffix in (".c", ".S")
        ]
        images.append(_compile(name, out, sources, script, shlex.split(cc)))
    return images


def build_programs(out: Path, cc: str = os.environ.get("CC", "cc")) -> list[Path]:
    """Compile the programs for Linux guests to out/<name>.elf. Raises `BuildError`."""
    return [
        _compile(source.stem, out, [source], (), shlex.split(cc))
        for source in sorted(PROGRAMS.glob("*.c"))
    ]


def _compile(
    name: str, out: Path, sources: list[Path], options: tuple[str, ...], cc: list[str]
) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    image = out / f"{name}.elf"
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as scratch:
        linked = Path(scratch, image.name)
        command = [*cc, *FLAGS, *options, "-o", str(linked), *map(str, sources)]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, errors="replace"
            )
        except OSError as error:
            raise BuildError(_explain(name, cc, str(error))) from error
        if done.returncode != 0:
            raise BuildError(_explain(name, cc, done.stderr.strip()))
        sys.stderr.write(done.stderr)
        linked.replace(image)
    return image


def _explain(name: str, cc: list[str], details: str) -> str:
    return (
        f"cannot compile {name!r} with {shlex.join(cc)!r}. avmm needs a C compiler for "
        f"x86-64; on Debian: apt install gcc libc6-dev. What went wrong:\n{details}"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: build.py PACKAGE, the folder avmm")
    package = Path(sys.argv[1])
    try:
        for built in (*build(package / "guests"), *build_programs(package / "image")):
            print(built)
    except BuildError as failure:
        sys.exit(str(failure))
