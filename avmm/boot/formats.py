"""Loading a guest: from a file and a command line to memory that is ready to run.

`load` looks at the file and takes the first of these that fits:

1. *Flat*, only where the caller says so: nothing in the file could.
2. *Multiboot with address fields* (`multiboot`): they are there to be used whatever else the
   file is, an ELF included (multiboot 3.1.3). 64-bit kernels boot so, and what their ELF
   headers say may well not be meant for a loader.
3. *PVH* (`pvh`): an ELF with Xen's note. It comes before multiboot's plain header because it
   serves 32- and 64-bit images alike, and before plain ELF because who puts the note there
   means it; Linux's vmlinux cannot be entered in any other way that is not its own.
4. *Multiboot* (`multiboot`): a 32-bit ELF with the header.
5. *ELF* (`elf`): a 64-bit ELF, entered in long mode by our own contract (`longmode`).

All else is refused in words that say what it looks like. A further format, such as bzImage
(whose mark is "HdrS" at 0x202), gets a file of its own and a line in `_load_image`, before the
ELF formats if it is no ELF.

Where `load` fails, guest memory is partly written and of no further use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from avmm.boot import elf, flat, multiboot, pvh
from avmm.boot.assembly import Assembly
from avmm.boot.describe import HEAD, describe
from avmm.boot.elf_headers import MAGIC, parse
from avmm.boot.entry import Entry, FlatOptions
from avmm.boot.image import GZIP_SLACK, Image, open_image
from avmm.memory import GuestMemory

StrPath = str | os.PathLike[str]


def load(
    memory: GuestMemory,
    image: StrPath,
    *,
    cmdline: str = "",
    initrd: StrPath | None = None,
    modules: Sequence[StrPath] = (),
    cpus: int = 1,
    flat: FlatOptions | None = None,
) -> Entry:
    """Load `image` into fresh guest memory and say where the boot processor starts.

    The guest is told of `cmdline`, of the memory map and of the `modules`, of which `initrd`
    is the first, in its format's own way; of its `cpus` in an MP table. A gzip'ed image is
    decompressed (not a flat one, nor initrd and modules, which are the guest's business).

    Blocks while it reads the files. Raises `ImageError` where a file cannot be loaded, and
    `ConfigError` where the command line, the number of CPUs or `flat` cannot be.
    """
    files = [os.fspath(path) for path in ([] if initrd is None else [initrd])]
    files += [os.fspath(path) for path in modules]
    assembly = Assembly(memory, os.fspath(image), cmdline, files)
    assembly.write_mp_table(cpus)
    limit = None if flat is not None else memory.size + GZIP_SLACK
    with open_image(image, gunzip_limit=limit) as content:
        return _load_image(assembly, content, flat)


def _load_image(assembly: Assembly, image: Image, options: FlatOptions | None) -> Entry:
    if options is not None:
        return flat.load(assembly, image, options)
    header = multiboot.find(image)
    if header is not None and header.addresses is not None:
        return multiboot.load(assembly, image, header)
    if image.head(4) == MAGIC:
        executable = parse(image)
        ip = pvh.entry_point(executable)
        if ip is not None:
            return pvh.load(assembly, executable, ip)
        if header is not None:
            return multiboot.load(assembly, image, header)
        return elf.load(assembly, executable)
    looks = describe(image.head(HEAD))
    raise image.error(
        f"looks like {looks}. Expected an ELF (PVH, multiboot or 64-bit) or a multiboot image, "
        f"gzip'ed or not"
    )
