"""What every architecture's avmm is compiled from needs nothing that only x86 has."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from cffi import FFI

from avmm import kvm

HERE = Path(kvm.__file__).parent
COMPILER = "aarch64-linux-gnu-gcc"


def test_the_common_part_compiles_for_another_architecture(tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed (Debian: gcc-aarch64-linux-gnu)")
    builder = FFI()
    builder.cdef((HERE / "cdef.h").read_text())
    builder.set_source("common", '#include "shim.c"')
    builder.emit_c_code(str(tmp_path / "common.c"))
    includes = [f"-I{HERE}", f"-I{sysconfig.get_path('include')}"]
    command = [COMPILER, "-std=gnu11", "-fsyntax-only", *includes, str(tmp_path / "common.c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
