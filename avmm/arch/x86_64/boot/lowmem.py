"""What a PC's firmware leaves in low memory: interrupt vectors, the BIOS data area, an EBDA.

Kernels that grew up on PCs read them without asking whether there is a BIOS. Xen takes the end of
base memory from the BIOS data area, and copies a trampoline below it: from a word of 0 it would
get an address near 4 GiB. It also calls the BIOS. So there are no services, but every call comes
back and says that it has failed.

The addresses are those of the IBM PC (Ralf Brown's "Memory list", MEM.LST; Phoenix, "System BIOS
for IBM PCs", chapter 3). They lie in RAM that the guest may use. If the image itself is loaded
there, nothing is written.
"""

from __future__ import annotations

import struct
from typing import Final

from avmm.arch.x86_64 import layout
from avmm.arch.x86_64.boot.assembly import Assembly

_CALL: Final = bytes.fromhex("f9 ca0200")
"""`stc; retf 2`: return with the carry flag set, which means failure, and drop the flags that the
interrupt has pushed."""
_VECTORS: Final = 256
_SEGMENT: Final = layout.BIOS >> 4

_COM1: Final = 0x3F8
_EQUIPMENT: Final = 1 << 1 | 1 << 9
"""A floating-point unit and one serial port."""
_WORDS: Final = {
    0x400: _COM1,
    0x40E: layout.EBDA >> 4,
    0x410: _EQUIPMENT,
    0x413: layout.BASE_MEMORY_END >> 10,
}
_EBDA_KIB: Final = (layout.EBDA_END - layout.EBDA) >> 10


def write(assembly: Assembly) -> None:
    """Write all of it, after everything else has been claimed. Does nothing if RAM ends below the
    BIOS area."""
    memory = assembly.memory
    if memory.ram[0].end < layout.BIOS_END:
        return
    memory.write(layout.BIOS_CALL, _CALL)
    memory.write(layout.EBDA, bytes([_EBDA_KIB]))
    if assembly.claims.is_free(layout.VECTORS, layout.BIOS_DATA - layout.VECTORS):
        vector = struct.pack("<HH", layout.BIOS_CALL - layout.BIOS, _SEGMENT)
        memory.write(layout.VECTORS, vector * _VECTORS)
    if assembly.claims.is_free(layout.BIOS_DATA, layout.BIOS_DATA_END - layout.BIOS_DATA):
        for address, word in _WORDS.items():
            memory.write(address, struct.pack("<H", word))
