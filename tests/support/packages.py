"""Debian packages made by hand, and what is in an initramfs."""

from __future__ import annotations

import gzip
import io
import lzma
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import zstandard

RELEASE = "6.1.0-9-cloud"
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    "": bytes,
}


def member(name: str, content: bytes) -> bytes:
    """ar(5)"""
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
    return head + content + b"\n" * (len(content) % 2)


def tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f".{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(f".{name}")
            info.type, info.linkname = tarfile.LNKTYPE, f".{target}"
            archive.addfile(info)
    return out.getvalue()


def deb(
    path: Path,
    files: dict[str, bytes],
    suffix: str = ".xz",
    *,
    architecture: str = "amd64",
    links: dict[str, str] | None = None,
) -> Path:
    control = f"Package: x\nArchitecture: {architecture}\nDescription: x\n".encode()
    members = member("debian-binary", b"2.0\n")
    members += member("control.tar.xz", lzma.compress(tar({"/control": control})))
    data = PACK[suffix](tar(files, links))
    path.write_bytes(b"!<arch>\n" + members + member(f"data.tar{suffix}", data))
    return path


def elf(folder: Path, *flags: str, source: str = "int x;") -> bytes:
    (folder / "x.c").write_text(source)
    subprocess.run(["gcc", *flags, "-o", folder / "x.o", folder / "x.c"], check=True)
    return (folder / "x.o").read_bytes()


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """(mode, content) by name, in a newc archive."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, length = fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length - 1].decode()
        start = at + -(-(110 + length) // 4) * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], archive[start : start + size])
        at = start + -(-size // 4) * 4
