"""Data compressed in every format that Linux's build and distributions use."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable

import lz4.block
import lz4.frame
import zstandard


def lz4_legacy(data: bytes) -> bytes:
    """As `lz4 -l` and Linux's build write it."""
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        out += len(block).to_bytes(4, "little") + block
    return out


X86 = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32, filters=X86),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "lz4": lz4.frame.compress,
    "lz4 legacy": lz4_legacy,
    "zstd": lambda data: zstandard.ZstdCompressor(19).compress(data),
}
