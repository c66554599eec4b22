#!/bin/sh
# unicorn 2.1.4 (PyPI, manylinux x86_64): NEG with a LOCK prefix leaves a wrong sign flag and a wrong
# parity flag: those of the value before it was negated. The value in memory is right.
#
# The guest negates one dword in memory, with and without the prefix (Intel SDM 2B, NEG: the flags are
# "according to the result").
#
#   value         neg            lock neg
#   0x00000001    CF PF AF SF    CF AF
#   0x00000080    CF SF          CF
#   0xffffffff    CF AF          CF PF AF SF
#   0x80000000    CF PF SF OF    CF PF SF OF, which happens to be the same
#
# Code that counts on them (a sign test after an atomic negation) takes the wrong way.
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
from unicorn.x86_const import UC_X86_REG_EFLAGS, UC_X86_REG_RBX

FLAGS = {"CF": 1, "PF": 4, "AF": 16, "ZF": 64, "SF": 128, "OF": 2048}


def negated(code: str, value: int) -> tuple[int, str]:
    guest = Uc(UC_ARCH_X86, UC_MODE_64)
    guest.mem_map(0, 0x8000)
    guest.mem_write(0x3000, value.to_bytes(4, "little"))
    guest.mem_write(0x1000, bytes.fromhex(code))
    guest.reg_write(UC_X86_REG_RBX, 0x3000)
    guest.emu_start(0x1000, 0x1000 + len(bytes.fromhex(code)))
    found = guest.reg_read(UC_X86_REG_EFLAGS)
    names = " ".join(name for name, bit in FLAGS.items() if found & bit)
    return int.from_bytes(guest.mem_read(0x3000, 4), "little"), names


print(f"unicorn {unicorn.__version__}")
wrong = []
for value in (0, 1, 0x7F, 0x80, 0x10, 0x1234_5678, 0x8000_0000, 0xFFFF_FFFF):
    plain, locked = negated("f71b", value), negated("f0f71b", value)
    assert plain[0] == locked[0] == -value & 0xFFFF_FFFF
    print(f"{value:#010x}   neg: {plain[1]:16}   lock neg: {locked[1]:16}")
    if plain[1] != locked[1]:
        wrong.append(value)
print(f"other flags for {len(wrong)} of 8 values")
sys.exit(0 if len(wrong) == 6 else 1)
END
