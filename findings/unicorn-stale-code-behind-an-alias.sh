#!/bin/sh
# unicorn 2.1.4 (PyPI, manylinux x86_64): code that a guest changes through a second, non-executable
# mapping of its page goes on running as it was, if that mapping was written through before the code
# ran for the first time.
#
# The guest has a page of code at one virtual address, and the same page again at another, through
# its own page tables. It calls a function there, changes the function's constant from 1 to 2 through
# the second address, executes CPUID (which serializes), and calls the function again. A kernel that
# patches its text through a temporary mapping does the same.
#
#   written before  second mapping    the second call returns
#   no              executable        2
#   no              not executable    2
#   yes             executable        2
#   yes             not executable    1, though the memory holds 2
#
# So a data store that comes first, and touches nothing that is executed, decides whether a later
# change of the code is noticed. (In the source, qemu/accel/tcg/cputlb.c: a store through an
# executable mapping always takes the slow path, and one through another does not, once the page
# counts as dirty there. Translating code protects its page under the executing address alone.)
#
# Exits with 0 if this is still so, with 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet unicorn==2.1.4
"$folder/venv/bin/python" - <<'END'
import struct
import sys

import unicorn
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
from unicorn.x86_const import (
    UC_X86_REG_CR0,
    UC_X86_REG_CR3,
    UC_X86_REG_CR4,
    UC_X86_REG_RAX,
    UC_X86_REG_RSI,
    UC_X86_REG_RSP,
)

FUNCTION, PROGRAM, STACK, TABLES = 0x1000, 0x2000, 0x9000, 0x10000
ALIAS = 0x4000_0000
EFER, LONG_MODE_AND_NX, NX = 0xC000_0080, 0xD01, 1 << 63


def results(written_before: bool, not_executable: bool) -> tuple[int, int]:
    """What the function returns before and after the change."""
    guest = Uc(UC_ARCH_X86, UC_MODE_64)
    guest.mem_map(0, 0x40_0000)
    top, middle, low, low_pages, high, high_pages = range(TABLES, TABLES + 0x6000, 0x1000)
    entries = {top: middle | 3, middle: low | 3, middle + 8: high | 3}
    entries |= {low: low_pages | 3, high: high_pages | 3}
    entries |= {low_pages + 8 * page: page << 12 | 3 for page in range(512)}
    entries[high_pages] = FUNCTION | 3 | (NX if not_executable else 0)
    for address, entry in entries.items():
        guest.mem_write(address, struct.pack("<Q", entry))

    def call(before: bytes) -> bytes:
        return b"\xe8" + struct.pack("<i", FUNCTION - (PROGRAM + len(before) + 5))

    guest.mem_write(FUNCTION, bytes.fromhex("b801000000 c3"))  # mov eax, 1; ret
    code = b"\xbf" + struct.pack("<I", ALIAS)  # mov edi, ALIAS
    if written_before:
        code += bytes.fromhex("c68700080000 00")  # mov byte [rdi + 0x800], 0
    code += call(code)
    code += bytes.fromhex("89c6 c6470102 31c0 0fa2")  # mov esi, eax; mov byte [rdi+1], 2; cpuid
    code += call(code)
    guest.mem_write(PROGRAM, code)
    guest.reg_write(UC_X86_REG_RSP, STACK)
    guest.reg_write(UC_X86_REG_CR3, top)
    guest.reg_write(UC_X86_REG_CR4, 1 << 5)
    guest.msr_write(EFER, LONG_MODE_AND_NX)
    guest.reg_write(UC_X86_REG_CR0, 0x8000_0033)
    guest.emu_start(PROGRAM, PROGRAM + len(code), count=100)
    assert guest.mem_read(FUNCTION, 6)[1] == 2, "the function was not changed"
    return guest.reg_read(UC_X86_REG_RSI), guest.reg_read(UC_X86_REG_RAX)


print(f"unicorn {unicorn.__version__}")
found = {}
for before in (False, True):
    for nx in (False, True):
        found[before, nx] = results(before, nx)
        print(f"written before: {before}, not executable: {nx}: returns {found[before, nx]}")
stale = found.pop((True, True)) == (1, 1)
sys.exit(0 if stale and set(found.values()) == {(1, 2)} else 1)
END
