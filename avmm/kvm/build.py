"""Builds `avmm.kvm._kvm`, the compiled border to the kernel (cffi, API mode).

Layouts and numbers come from the C compiler and `<linux/kvm.h>`. `cdef.h`, and `kvm.h` in the
folder of this machine's architecture, only name what is used. `shim.c` adds the few functions that
must be C. Used by setup.py, not at run time.
"""

import platform
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
OWN = HERE.parent / "arch" / platform.machine() / "kvm.h"
DECLARATIONS = [HERE / "cdef.h", *([OWN] if OWN.exists() else [])]

ffibuilder = FFI()
for declarations in DECLARATIONS:
    ffibuilder.cdef(declarations.read_text())
ffibuilder.set_source(
    "avmm.kvm._kvm",
    '#include "shim.c"',
    include_dirs=[str(HERE)],
    depends=[
        *map(str, [HERE / "shim.c", *HERE.glob("*.h"), *DECLARATIONS]),
    ],
    extra_compile_args=["-O2", "-std=gnu11"],
)
