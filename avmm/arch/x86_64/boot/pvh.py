"""PVH: an ELF with a note that gives a 32-bit entry point. It was made for Xen; Linux and the BSDs
support it.

Xen's docs/misc/pvh.pandoc, "Domain builder": the note XEN_ELFNOTE_PHYS32_ENTRY (owner "Xen", type
18) holds the physical address at which the guest starts in 32-bit protected mode, with paging off
and the physical address of an `hvm_start_info` in EBX.
"""

from __future__ import annotations

from typing import Final

from avmm.arch.x86_64.boot import elf
from avmm.arch.x86_64.boot.assembly import Assembly
from avmm.arch.x86_64.boot.startinfo import write_start_info
from avmm.boot.elf_headers import Elf, notes
from avmm.boot.entry import Entry, Mode

_OWNER: Final = b"Xen"
_PHYS32_ENTRY: Final = 18
"""XEN_ELFNOTE_PHYS32_ENTRY, xen/include/public/elfnote.h."""


def entry_point(image: Elf) -> int | None:
    """The entry point that the note gives, or None if there is no such note.

    Raises `ImageError` if the note is malformed or points outside the image.
    """
    for note in notes(image):
        if (note.owner, note.kind) == (_OWNER, _PHYS32_ENTRY):
            break
    else:
        return None
    if len(note.desc) not in (4, 8):
        raise image.image.error(f"has a PVH note of {len(note.desc)} bytes; expected 4 or 8")
    ip = int.from_bytes(note.desc, "little") + image.moved_by
    if ip >> 32 or not elf.holds(image, ip):
        raise image.image.error(
            f"has a PVH note with the entry point {ip:#x}; expected an address below 4 GiB "
            f"in one of its segments"
        )
    return ip


def load(assembly: Assembly, image: Elf, ip: int) -> Entry:
    """Load the segments and write the start info for the entry point `ip`."""
    assembly.claim_boot_info()
    elf.load_segments(assembly, image)
    start_info = write_start_info(assembly, assembly.load_modules())
    return Entry(Mode.PROTECTED, ip, {"rbx": start_info})
