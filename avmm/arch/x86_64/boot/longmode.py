"""How a guest is entered in long mode: avmm's own contract, for ELF and flat images.

No standard says what a 64-bit image finds when it is entered directly. With avmm it finds this:

- long mode as `Mode.LONG` describes it, with the GDT and page tables of `arch.x86_64.tables`;
- RDI: the physical address of an `hvm_start_info`, as in PVH (`startinfo`), with the command line,
  the memory map, the initrd and the modules;
- RSI: the physical address of Linux's zero page (`zeropage`), which contains the same by Linux's
  64-bit boot protocol, so that a vmlinux without a PVH note boots, too;
- RSP: as at the entry of a function (System V ABI: RSP + 8 is a multiple of 16), on a stack of
  7 KiB; the return address there is 0;
- all other registers 0.

So the entry point may be a C function: `void start(const struct hvm_start_info *info)`.
"""

from __future__ import annotations

from typing import Final

from avmm.arch.x86_64 import layout, tables
from avmm.arch.x86_64.boot import zeropage
from avmm.arch.x86_64.boot.assembly import Assembly
from avmm.arch.x86_64.boot.startinfo import write_start_info
from avmm.boot.entry import Entry, Mode

_RETURN_ADDRESS_SIZE: Final = 8


def claim(assembly: Assembly) -> None:
    """Claim the ranges for everything that the contract promises."""
    assembly.claim_own(layout.GDT, layout.GDT_ROOM, "GDT")
    assembly.claim_own(layout.PAGE_TABLES, layout.PAGE_TABLES_SIZE, "page tables")
    assembly.claim_own(layout.STACK, layout.STACK_TOP - layout.STACK, "first stack")
    assembly.claim_boot_info()


def enter(assembly: Assembly, ip: int, header: bytes | None = None) -> Entry:
    """Fill the claimed ranges and load the modules. The image must be in place already.

    `header` is the setup header of the bzImage that the image comes from, if any.
    """
    header = header or zeropage.own_header(assembly.longest_cmdline)
    assembly.longest_cmdline = zeropage.longest_cmdline(header)
    modules = assembly.load_modules(zeropage.initrd_limit(header))
    start_info = write_start_info(assembly, modules)
    zeropage.write(assembly, modules, header)
    tables.write_long_mode_tables(assembly.memory)
    rsp = layout.STACK_TOP - _RETURN_ADDRESS_SIZE
    return Entry(Mode.LONG, ip, {"rdi": start_info, "rsi": layout.ZERO_PAGE, "rsp": rsp})
