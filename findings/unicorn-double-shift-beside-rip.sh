#!/bin/sh
# unicorn 2.1.4 (PyPI, manylinux x86_64): SHLD and SHRD by an immediate count reach one byte below
# their operand, if the operand's address is relative to RIP.
#
# Such an address counts from the end of the instruction, and the immediate byte is its end. The
# guest runs the same shift twice: with the address in a register, and relative to RIP. Before each,
# memory holds 01 02 03 ... from 0x3000 on, and 00 below.
#
#   shld dword [rbx], eax, 8            0x2fff: 00 aa 01 02 03 05    right
#   shld dword [rip + ...], eax, 8      0x2fff: aa 00 01 02 04 05    the dword at 0x2fff was shifted
#   shrd dword [rip + ...], eax, 8      in the same way
#   rol dword [rip + ...], 8            right, although it has an immediate, too
#
# Compilers make such shifts of globals for arithmetic on wide integers, in position-independent
# code. By a count in CL, which has no immediate, the place is right.
#
# Exits with 0 if this is still so, with 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet unicorn==2.1.4
"$folder/venv/bin/python" - <<'END'
import sys

import unicorn
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
from unicorn.x86_const import UC_X86_REG_RAX, UC_X86_REG_RBX, UC_X86_REG_RCX

CODE, DATA = 0x1000, 0x3000


def shifted(opcode: str, modrm: int, immediate: str, *, relative: bool) -> str:
    """Memory from a byte below the operand on, after this instruction."""
    guest = Uc(UC_ARCH_X86, UC_MODE_64)
    guest.mem_map(0, 0x8000)
    guest.mem_write(DATA, bytes(range(1, 17)))
    guest.reg_write(UC_X86_REG_RAX, 0xAABBCCDD)
    guest.reg_write(UC_X86_REG_RBX, DATA)
    guest.reg_write(UC_X86_REG_RCX, 8)
    head, tail = bytes.fromhex(opcode), bytes.fromhex(immediate)
    if relative:
        end = CODE + len(head) + 1 + 4 + len(tail)
        code = head + bytes([modrm | 5]) + (DATA - end).to_bytes(4, "little") + tail
    else:
        code = head + bytes([modrm | 3]) + tail  # by RBX
    guest.mem_write(CODE, code)
    guest.emu_start(CODE, CODE + len(code))
    return guest.mem_read(DATA - 1, 6).hex(" ")


print(f"unicorn {unicorn.__version__}")
same = {}
for name, opcode, modrm, immediate in (
    ("shld by 8", "0fa4", 0, "08"),
    ("shrd by 8", "0fac", 0, "08"),
    ("shld by cl", "0fa5", 0, ""),
    ("rol by 8", "c1", 0, "08"),
):
    found = [shifted(opcode, modrm, immediate, relative=how) for how in (False, True)]
    same[name] = found[0] == found[1]
    print(f"{name:10}  by a register: {found[0]}   by RIP: {found[1]}")
expected = {"shld by 8": False, "shrd by 8": False, "shld by cl": True, "rol by 8": True}
sys.exit(0 if same == expected else 1)
END
