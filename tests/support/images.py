"""Small images made by hand, with every field open to being wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
RX = 5

EHDR = {32: "<16sHHIIIIIHHHHHH", 64: "<16sHHIQQQIHHHHHH"}
PHDR_SIZE = {32: 32, 64: 56}
EHDR_SIZE = {32: 52, 64: 64}
MACHINE = {32: 3, 64: 62}


@dataclass
class Segment:
    """A program header and its data; None means what follows from the data."""

    data: bytes = b""
    paddr: int = 0x100000
    vaddr: int | None = None
    memsz: int | None = None
    filesz: int | None = None
    offset: int | None = None
    kind: int = PT_LOAD
    flags: int = RX
    align: int = 4


@dataclass
class Elf:
    """An ELF file; `bytes(elf)` is the file."""

    segments: list[Segment] = field(default_factory=lambda: [Segment(b"\xf4" * 16)])
    bits: int = 64
    entry: int = 0x100000
    kind: int = 2
    machine: int | None = None
    encoding: int = 1
    elf_class: int | None = None
    phoff: int | None = None
    phnum: int | None = None
    phentsize: int | None = None
    prefix: bytes = b""
    """What lies in the file between the program headers and the segments' data."""

    def __bytes__(self) -> bytes:
        bits = self.bits
        phdrs_at = EHDR_SIZE[bits]
        at = phdrs_at + PHDR_SIZE[bits] * len(self.segments) + len(self.prefix)
        headers, body = b"", b""
        for s in self.segments:
            offset = at + len(body) if s.offset is None else s.offset
            filesz = len(s.data) if s.filesz is None else s.filesz
            memsz = filesz if s.memsz is None else s.memsz
            vaddr = s.paddr if s.vaddr is None else s.vaddr
            if bits == 64:
                headers += struct.pack(
                    "<IIQQQQQQ", s.kind, s.flags, offset, vaddr, s.paddr, filesz, memsz, s.align
                )
            else:
                headers += struct.pack(
                    "<8I", s.kind, offset, vaddr, s.paddr, filesz, memsz, s.flags, s.align
                )
            body += s.data
        elf_class = self.elf_class if self.elf_class is not None else bits // 32
        form = EHDR[bits] if self.encoding == 1 else EHDR[bits].replace("<", ">")
        header = struct.pack(
            form,
            b"\x7fELF" + bytes([elf_class, self.encoding, 1]),
            self.kind,
            MACHINE[bits] if self.machine is None else self.machine,
            1,
            self.entry,
            phdrs_at if self.phoff is None else self.phoff,
            0,
            0,
            EHDR_SIZE[bits],
            PHDR_SIZE[bits] if self.phentsize is None else self.phentsize,
            len(self.segments) if self.phnum is None else self.phnum,
            0,
            0,
            0,
        )
        return header + headers + self.prefix + body


def note(owner: bytes, kind: int, desc: bytes, align: int = 4) -> bytes:
    """One note, padded."""
    data = struct.pack("<III", len(owner), len(desc), kind) + owner
    data += bytes(-len(data) % align) + desc
    return data + bytes(-len(data) % align)


def pvh_note(entry: int, size: int = 8) -> bytes:
    return note(b"Xen\0", 18, entry.to_bytes(size, "little"))


def pvh_elf(
    entry: int = 0x100004, bits: int = 64, system: bytes = b"Linux\0", **fields: object
) -> Elf:
    """An ELF with the note between two others, and code from 1 MiB on."""
    notes = note(b"GNU\0", 3, bytes(20)) + pvh_note(entry) + note(system, 257, b"\0")
    segments = [Segment(b"\xf4" * 16), Segment(notes, kind=PT_NOTE)]
    return Elf(segments, bits=bits, **fields)  # type: ignore[arg-type]


def multiboot_header(flags: int = 0, *fields: int, checksum: int | None = None) -> bytes:
    """The header: magic, flags, checksum and whatever else follows."""
    if checksum is None:
        checksum = -(0x1BADB002 + flags) & 0xFFFFFFFF
    return struct.pack(f"<III{len(fields)}I", 0x1BADB002, flags, checksum, *fields)


def multiboot_elf(flags: int = 0, bits: int = 32, **fields: object) -> Elf:
    """An ELF at 1 MiB that starts with a multiboot header; the code is behind it."""
    data = multiboot_header(flags) + b"\xf4" * 16
    return Elf([Segment(data)], bits=bits, entry=0x10000C, **fields)  # type: ignore[arg-type]


LINUX_HEADER = 0x1F1


@dataclass
class BzImage:
    """A bzImage; `bytes(image)` is the file. `payload` is what the build made of the vmlinux."""

    payload: bytes
    version: int = 0x20F
    xloadflags: int = 1
    sectors: int = 4
    payload_offset: int = 0x40
    payload_length: int | None = None
    initrd_addr_max: int = 0x7FFF_FFFF
    cmdline_size: int = 2047
    pref_address: int = 0x100000
    init_size: int = 0
    jump: int = 0x6A
    """The header's length after 0x202, in the second byte of its jump."""

    def __bytes__(self) -> bytes:
        page = bytearray(512 * ((self.sectors or 4) + 1))
        length = len(self.payload) if self.payload_length is None else self.payload_length
        page[LINUX_HEADER] = self.sectors
        page[0x1FE:0x202] = b"\x55\xaa\xeb" + bytes([self.jump])
        struct.pack_into("<4sH", page, 0x202, b"HdrS", self.version)
        struct.pack_into("<I", page, 0x22C, self.initrd_addr_max)
        struct.pack_into("<HI", page, 0x236, self.xloadflags, self.cmdline_size)
        struct.pack_into("<II", page, 0x248, self.payload_offset, length)
        struct.pack_into("<QI", page, 0x258, self.pref_address, self.init_size)
        return bytes(page) + bytes([0x90]) * self.payload_offset + self.payload
