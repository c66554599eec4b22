"""hvm_start_info, version 1: the boot information for PVH guests, and for guests that are entered
in long mode by avmm's own contract.

Xen's public header xen/include/public/arch-x86/hvm/start_info.h: all fields are little endian, and
an address of 0 means "not there".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from avmm.arch.x86_64 import layout
from avmm.arch.x86_64.boot.assembly import Assembly, Module
from avmm.arch.x86_64.boot.infoblock import InfoBlock

MAGIC: Final = 0x336E_C578
VERSION: Final = 1
_START_INFO: Final = struct.Struct("<IIIIQQQQII")
"""magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap, memmap_entries, 0"""
_MODULE: Final = struct.Struct("<QQQQ")
"""paddr, size, cmdline, 0"""
_MEMMAP: Final = struct.Struct("<QQII")
"""addr, size, type, 0"""


def write_start_info(assembly: Assembly, modules: Sequence[Module]) -> int:
    """Write the structure and everything that it points to. Returns its address.

    A module's command line is its path. Its range (`Assembly.claim_boot_info`) and all others must
    have been claimed before.
    """
    assembly.write_cmdline(assembly.cmdline)
    block = InfoBlock(_START_INFO.size)
    listed = [_MODULE.pack(m.gpa, m.size, block.add_string(m.name), 0) for m in modules]
    memory_map = assembly.claims.memory_map()
    return block.write(
        assembly.memory,
        _START_INFO.pack(
            MAGIC,
            VERSION,
            0,
            len(modules),
            block.add(b"".join(listed)) if listed else 0,
            layout.CMDLINE,
            assembly.rsdp,
            block.add(b"".join(_MEMMAP.pack(e.gpa, e.size, e.kind, 0) for e in memory_map)),
            len(memory_map),
            0,
        ),
    )
