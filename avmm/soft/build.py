"""Builds `avmm.soft._soft`, the software engine (cffi, API mode).

The C compiler needs neither unicorn nor its headers: the library is found and loaded when the
engine is first used (`soft_load`). Used by setup.py, not at run time.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
SOURCES = sorted([*(HERE / "native").glob("*.c"), *(HERE / "chips").glob("*.c")])
HEADERS = sorted([*(HERE / "native").glob("*.h"), *(HERE / "chips").glob("*.h")])
ROOT = HERE.parent.parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "cdef.h").read_text())
ffibuilder.set_source(
    "avmm.soft._soft",
    '#include "soft.h"\n',
    sources=[str(path.relative_to(ROOT)) for path in SOURCES],
    include_dirs=[str(HERE / "native"), str(HERE / "chips")],
    depends=[str(path) for path in [*HEADERS, HERE / "cdef.h"]],
    extra_compile_args=["-O2", "-std=gnu11", "-fvisibility=hidden", "-ftls-model=initial-exec"],
    libraries=["dl", "pthread"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(ROOT), verbose=False)
