"""Says what a file that cannot be booted looks like. This is the helpful part of the error.

Only the beginning of the file is looked at, and only the text of an error depends on it.
"""

from __future__ import annotations

import string
from typing import Final

HEAD: Final = 0x8000
"""The number of bytes at the file's beginning that `describe` needs."""

_MULTIBOOT2: Final = b"\xd6\x50\x52\xe8"
_TEXT: Final = frozenset(string.printable.encode()) | frozenset(range(0x80, 0x100))

_MAGICS: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"#!", "a shell script or another script"),
    (0, b"\x7fELF", "a damaged ELF"),
    (0x38, b"ARM\x64", "a Linux kernel Image for aarch64"),
    (0x30, b"RISCV", "a Linux kernel Image for RISC-V"),
    (0, b"MZ", "an EFI or Windows program"),
    (0, b"\x1f\x8b", "gzip that was compressed twice, or with another method than deflate"),
    (0, b"\x89LZO", "data that were compressed with lzop: decompress them first"),
    (0, b"070701", "a cpio archive such as an initrd, not a kernel"),
    (0, b"070702", "a cpio archive such as an initrd, not a kernel"),
    (257, b"ustar", "a tar archive"),
    (0, b"PK\3\4", "a zip archive"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"\x27\x05\x19\x56", "a U-Boot uImage"),
    (0x438, b"\x53\xef", "an ext2/3/4 file system"),
    (510, b"\x55\xaa", "a boot sector or disk image"),
)


def describe(head: bytes) -> str:
    """What a file with this beginning looks like, as the words after "looks like"."""
    for offset, magic, text in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return text
    if _MULTIBOOT2 in (head[at : at + 4] for at in range(0, len(head), 8)):
        return "a multiboot 2 kernel, which is not supported (multiboot 1 is)"
    if not any(head[:512]):
        return "nothing: its beginning is all zeros"
    if all(byte in _TEXT for byte in head[:512]):
        return "text"
    return f"nothing that avmm knows: it starts with {head[:8].hex(' ')}"
