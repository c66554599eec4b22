"""Builds `avmm.kvm._kvm`, the compiled border to the kernel (cffi, API mode).

Layouts and numbers come from the C compiler and `<linux/kvm.h>`; `cdef.h` only names what is
used, `shim.c` adds the few functions that must be C. Used by setup.py, not at run time.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "cdef.h").read_text())
ffibuilder.set_source(
    "avmm.kvm._kvm",
    '#include "shim.c"',
    include_dirs=[str(HERE)],
    depends=[
        str(HERE / "shim.c"),
        str(HERE / "bridge.h"),
        str(HERE / "parking.h"),
        str(HERE / "cdef.h"),
    ],
    extra_compile_args=["-O2", "-std=gnu11"],
)
