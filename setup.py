"""The parts of the build that compile C: the extensions and the bundled guests.

Everything else is in pyproject.toml. A missing compiler or header is reported before anything is
compiled, with the names of the Debian packages that contain it.
"""

import compileall
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGES = "gcc libc6-dev linux-libc-dev python3-dev"


def load(path: Path):
    """Import a build script by its path, because avmm itself cannot be imported yet."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demand_toolchain() -> None:
    wanted = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    compiler = shutil.which(wanted.split()[0])
    if compiler is None and "CC" not in os.environ:
        compiler = shutil.which("cc")
    if compiler is None:
        sys.exit(f"avmm needs a C compiler ({wanted}). On Debian: apt-get install {PACKAGES}")
    probe = "#include <Python.h>\n#include <linux/kvm.h>\n"
    include = sysconfig.get_path("include")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text(probe)
        command = [compiler, "-fsyntax-only", f"-I{include}", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"avmm needs the headers of Python and of Linux's KVM. "
            f"On Debian: apt-get install {PACKAGES}\n{done.stderr}"
        )


class BuildNative(build_ext):
    """Compile the extensions, then the programs that guests run, and put them into the package."""

    def run(self) -> None:
        demand_toolchain()
        super().run()
        package = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        guests = load(ROOT / "avmm/guests/build.py")
        try:
            guests.build(package / "avmm/guests")
            guests.build_programs(package / "avmm/image")
        except guests.BuildError as error:
            sys.exit(str(error))
        if self.editable_mode:
            # pip compiles the Python files that it copies, but not those that it only refers to.
            compileall.compile_dir(ROOT / "avmm", quiet=1)
            compileall.compile_file(ROOT / "avmm_early.py", quiet=1)

    def get_outputs(self) -> list[str]:
        build = load(ROOT / "avmm/guests/build.py")
        package = Path(self.build_lib) / "avmm"
        images = [package / "guests" / f"{name}.elf" for name in build.NAMES]
        images += [package / "image" / f"{c.stem}.elf" for c in build.PROGRAMS.glob("*.c")]
        return [*super().get_outputs(), *map(str, images)]


setup(
    cffi_modules=[
        "avmm/kvm/build.py:ffibuilder",
        "avmm/native/build.py:ffibuilder",
        "avmm/soft/build.py:ffibuilder",
    ],
    cmdclass={"build_ext": BuildNative},
)
