"""Kernel modules: those that are named, and all that these need, in the order of loading.

A module tells what it needs in its section `.modinfo` (`depends=`, `softdep=pre: ...`; see
include/linux/module.h of the kernel). Packages come without the index that depmod makes at
installation, so the modules themselves are asked.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avmm.errors import ImageError
from avmm.image.decoded import Decoded
from avmm.image.packages import Package

_MODULE: Final = re.compile(
    r".*/lib/modules/[^/]+/.*/(?P<name>[^/]+)\.ko(?P<compression>\.(xz|gz|zst))?"
)
_BUILTIN: Final = re.compile(r".*/lib/modules/[^/]+/modules\.builtin")
_LARGEST: Final = 128 << 20


@dataclass(frozen=True)
class KernelModule:
    """A module and where it was put, as it is in the package."""

    name: str
    file: Path
    compression: str

    def content(self) -> bytes:
        """The ELF. Raises `ImageError` where it cannot be decompressed."""
        try:
            with self.file.open("rb") as file:
                size = self.file.stat().st_size
                plain = _limited(Decoded(file, size, self.compression))
        except ValueError as error:
            raise ImageError(f"module {self.name}: is damaged: {error}") from None
        except OSError as error:
            raise ImageError(f"{self.file}: cannot be read: {error.strerror}") from None
        if not plain.startswith(b"\x7fELF"):
            raise ImageError(f"module {self.name}: is no ELF")
        return plain


class Modules:
    """The modules of a kernel package, unpacked into `folder`."""

    def __init__(self, package: Package, folder: Path) -> None:
        self._package = package
        self._modules: dict[str, KernelModule] = {}
        self._builtin: set[str] = set()
        for path, content in package.files():
            if match := _MODULE.fullmatch(str(path)):
                name = canonical(match["name"])
                file = folder / f"{len(self._modules)}.ko"
                _put(file, content.read())
                self._modules[name] = KernelModule(name, file, match["compression"] or "")
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
        # Those on the way down to where we are, each needed by the one before it.
        above: dict[str, bytes] = {}
        # No recursion: a chain may be longer than Python's stack, in a package that means harm.
        left: list[Iterator[tuple[str, bool]]] = [iter([(name, False) for name in wanted])]
        while left:
            step = next(left[-1], None)
            if step is None:
                left.pop()
                if above:
                    name, content = above.popitem()
                    ordered[name] = content
                continue
            name, soft = canonical(step[0]), step[1]
            if name in ordered or name in self._builtin or name in above:
                continue
            module = self._modules.get(name)
            if module is not None:
                above[name] = module.content()
                left.append(iter(_needs(above[name])))
            elif not soft:
                needed = f", which {next(reversed(above))} needs" if above else ""
                raise ImageError(f"{self._package.path}: has no module {name!r}{needed}")
        return ordered


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
        if section is None:
            return found
        if section["sh_type"] != "SHT_PROGBITS" or section.compressed:
            # Such a section's size is what it says, not what is there.
            raise ImageError("a module is damaged: its .modinfo holds no plain text")
        text = section.data()
    except (ELFError, ConstructError, OverflowError) as error:
        raise ImageError(f"a module is no ELF: {error}") from None
    for entry in text.split(b"\0"):
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


def _needs(content: bytes) -> list[tuple[str, bool]]:
    """The modules that must be there before this one, and whether it can do without."""
    info = modinfo(content)
    depends = [name for text in info.get("depends", []) for name in text.split(",") if name]
    return [*((name, True) for name in _pre(info)), *((name, False) for name in depends)]


def _put(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise ImageError(f"{file}: cannot be written: {error.strerror}") from None


def _limited(decoded: Decoded) -> bytes:
    plain = bytearray()
    for piece in decoded.pieces():
        plain += piece
        if len(plain) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
    return bytes(plain)
