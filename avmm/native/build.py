"""Builds `avmm.native._native`, the compiled code that does not concern KVM (cffi, API mode).

Used by setup.py, not at run time.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "cdef.h").read_text())
ffibuilder.set_source(
    "avmm.native._native",
    '#include "native.c"',
    include_dirs=[str(HERE)],
    depends=[str(HERE / name) for name in ("native.c", "pages.h", "vring.h", "cdef.h")],
    extra_compile_args=["-O2", "-std=gnu11"],
)
