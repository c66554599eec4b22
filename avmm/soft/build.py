"""Builds `avmm.soft._soft`, the software engine (cffi, API mode).

The C compiler needs neither unicorn nor its headers: the library is found and loaded when the
engine is first used (`soft_load`). Used by setup.py, not at run time.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
FOLDERS = [HERE / "native", HERE / "chips", HERE.parent / "kvm"]
SOURCES = sorted(path for folder in FOLDERS[:2] for path in folder.glob("*.c"))
HEADERS = sorted(path for folder in FOLDERS for path in folder.glob("*.h"))
ROOT = HERE.parent.parent

ffibuilder = FFI()
# cffi's parser knows no preprocessor.
declared = (HERE / "native" / "soft.h").read_text().splitlines()
ffibuilder.cdef("\n".join(line for line in declared if not line.startswith("#")))
ffibuilder.set_source(
    "avmm.soft._soft",
    '#include "soft.h"\n',
    sources=[str(path.relative_to(ROOT)) for path in SOURCES],
    include_dirs=[str(folder) for folder in FOLDERS],
    depends=[str(path) for path in HEADERS],
    extra_compile_args=["-O2", "-std=gnu11", "-fvisibility=hidden", "-ftls-model=initial-exec"],
    libraries=["dl", "pthread"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(ROOT), verbose=False)
