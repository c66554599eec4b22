"""Kernel modules: those that are named, and all that these need, in the order of loading.

A module tells what it needs in its section `.modinfo` (`depends=`, `softdep=pre: ...`; see
include/linux/module.h of the kernel). Packages come without the index that depmod makes at
installation, so the modules themselves are asked.
"""

from __future__ import annotations

import io
import lzma
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avmm.errors import ImageError
from avmm.image.packages import Package

_MODULE: Final = re.compile(
    r".*/lib/modules/[^/]+/.*/(?P<name>[^/]+)\.ko(\.(?P<compression>xz|gz|zst))?"
)
_BUILTIN: Final = re.compile(r".*/lib/modules/[^/]+/modules\.builtin")
_LARGEST: Final = 128 << 20


@dataclass(frozen=True)
class Module:
    """A module and where it was put, as it is in the package."""

    name: str
    file: Path
    compression: str

    def content(self) -> bytes:
        """The ELF. Raises `ImageError` where it cannot be decompressed."""
        data = self.file.read_bytes()
        try:
            plain = _decompressed(data, self.compression)
        except (lzma.LZMAError, zlib.error, ValueError) as error:
            raise ImageError(f"module {self.name}: is damaged: {error}") from None
        if not plain.startswith(b"\x7fELF"):
            raise ImageError(f"module {self.name}: is no ELF")
        return plain


class Modules:
    """The modules of a kernel package, unpacked into `folder`."""

    def __init__(self, package: Package, folder: Path) -> None:
        self._package = package
        self._modules: dict[str, Module] = {}
        self._builtin: set[str] = set()
        for path, content in package.files():
            if match := _MODULE.fullmatch(str(path)):
                name = canonical(match["name"])
                file = folder / f"{len(self._modules)}.ko"
                file.write_bytes(content.read())
                self._modules[name] = Module(name, file, match["compression"] or "")
            elif _BUILTIN.fullmatch(str(path)):
                lines = content.read().decode("utf-8", "replace").split()
                self._builtin |= {canonical(Path(line).name.split(".ko")[0]) for line in lines}

    @property
    def names(self) -> Iterable[str]:
        """All modules, without those that are built in."""
        return self._modules.keys()

    def closure(self, wanted: Iterable[str]) -> dict[str, bytes]:
        """These modules and what they need, each after all that it needs: content by name.

        What is built into the kernel is left out. Raises `ImageError` for a name that the
        package does not have.
        """
        ordered: dict[str, bytes] = {}
        self._visit(wanted, ordered, (), soft=False)
        return ordered

    def _visit(
        self, names: Iterable[str], ordered: dict[str, bytes], above: tuple[str, ...], soft: bool
    ) -> None:
        for name in map(canonical, names):
            if name in ordered or name in self._builtin or name in above:
                continue
            module = self._modules.get(name)
            if module is None:
                if soft:
                    continue
                needed = f", which {above[-1]} needs" if above else ""
                raise ImageError(f"{self._package.path}: has no module {name!r}{needed}")
            content = module.content()
            info = modinfo(content)
            chain = (*above, name)
            self._visit(_pre(info), ordered, chain, soft=True)
            depends = [one for text in info.get("depends", []) for one in text.split(",") if one]
            self._visit(depends, ordered, chain, soft=False)
            ordered[name] = content


def canonical(name: str) -> str:
    """A module's name as the kernel has it: `-` and `_` are the same."""
    return name.removesuffix(".ko").replace("-", "_")


def modinfo(content: bytes) -> Mapping[str, list[str]]:
    """The lists of values by key of a module's `.modinfo`; empty where it has none."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415
    from elftools.construct import ConstructError  # noqa: PLC0415
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415

    found: dict[str, list[str]] = {}
    try:
        section = ELFFile(io.BytesIO(content)).get_section_by_name(".modinfo")
    except (ELFError, ConstructError) as error:
        raise ImageError(f"a module is no ELF: {error}") from None
    for entry in section.data().split(b"\0") if section is not None else ():
        key, _, value = entry.decode("utf-8", "replace").partition("=")
        found.setdefault(key, []).append(value)
    return found


def _pre(info: Mapping[str, list[str]]) -> list[str]:
    """`softdep=pre: a b post: c` → a, b"""
    names = []
    for text in info.get("softdep", []):
        before = text.partition("post:")[0]
        names += before.removeprefix("pre:").split()
    return names


def _decompressed(data: bytes, compression: str) -> bytes:
    if compression == "xz":
        plain = lzma.LZMADecompressor().decompress(data, _LARGEST)
    elif compression == "gz":
        plain = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(data, _LARGEST)
    elif compression == "zst":
        import zstandard  # noqa: PLC0415

        try:
            plain = zstandard.ZstdDecompressor().stream_reader(data).read(_LARGEST)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
    else:
        plain = data
    if len(plain) >= _LARGEST:
        raise ValueError(f"more than {_LARGEST} bytes")
    return plain
