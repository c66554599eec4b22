"""Kernel modules: those that are named, and all modules that these need, in the order in which
they must be loaded.

A module lists what it needs in its section `.modinfo` (`depends=`, `softdep=pre: ...`; see
include/linux/module.h of the kernel). Packages do not have the index that depmod makes when they
are installed, so the modules themselves are read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from avmm.errors import ImageError
from avmm.image.decoded import Decoded
from avmm.image.packages import Content, Package

_MODULE: Final = re.compile(
    r".*/lib/modules/(?P<release>[^/]+)/.*/(?P<name>[^/]+)\.ko(?P<compression>\.(xz|gz|zst))?"
)
_BUILTIN: Final = re.compile(r".*/lib/modules/(?P<release>[^/]+)/modules\.builtin")
_LARGEST: Final = 128 << 20


@dataclass(frozen=True)
class KernelModule:
    """A module, and the file with a copy of it, compressed as it is in the package."""

    name: str
    file: Path
    compression: str

    def content(self) -> bytes:
        """The module as an ELF file. Raises `ImageError` if it cannot be decompressed."""
        try:
            with self.file.open("rb") as file:
                size = self.file.stat().st_size
                plain = _limited(Decoded(file, size, self.compression))
        except ValueError as error:
            raise ImageError(f"module {self.name}: is damaged: {error}") from None
        except OSError as error:
            raise ImageError(f"{self.file}: cannot be read: {error.strerror}") from None
        if not plain.startswith(b"\x7fELF"):
            raise ImageError(f"module {self.name}: is not an ELF file")
        return plain


def release_of(path: PurePosixPath) -> str:
    """The release of the kernel to which a package's file `path` belongs, if it is a module or the
    list of what is built in; else ""."""
    match = _MODULE.fullmatch(str(path)) or _BUILTIN.fullmatch(str(path))
    return match["release"] if match else ""


class Modules:
    """The modules for the kernel `release` in some packages, unpacked into `folder`."""

    def __init__(self, packages: Sequence[Package], release: str, folder: Path) -> None:
        self._packages = ", ".join(str(package.path) for package in packages)
        self._release = release
        self._modules: dict[str, KernelModule] = {}
        self._builtin: set[str] = set()
        self._knows_builtin = False
        for package in packages:
            for path, content in package.files():
                if release_of(path) == release:
                    self._take(path, content, folder)

    def _take(self, path: PurePosixPath, content: Content, folder: Path) -> None:
        if match := _MODULE.fullmatch(str(path)):
            name = canonical(match["name"])
            file = folder / f"{len(self._modules)}.ko"
            _put(file, content.read())
            self._modules[name] = KernelModule(name, file, match["compression"] or "")
        else:
            lines = content.read().decode("utf-8", "replace").split()
            self._builtin |= {canonical(Path(line).name.split(".ko")[0]) for line in lines}
            self._knows_builtin = True

    def demand(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are modules. Raises `ImageError` if all the modules are missing,
        though some of these are not built into the kernel."""
        found = [name for name in names if name in self._modules]
        lacking = [n for n in names if n not in self._modules and n not in self._builtin]
        if lacking and not self._modules:
            raise ImageError(
                f"{self._packages}: no modules for the kernel {self._release}, which needs "
                f"{', '.join(lacking)}: expected the package linux-modules-{self._release} as well"
            )
        return found

    def closure(self, wanted: Iterable[str]) -> dict[str, bytes]:
        """The contents by name of these modules and of all that they need. Each comes after the
        modules that it needs.

        Modules that are built into the kernel are left out. Raises `ImageError` for a name that
        the packages do not have.
        """
        ordered: dict[str, bytes] = {}
        # The path from a named module to the current one; each is needed by the one before it.
        above: dict[str, bytes] = {}
        # This does not recurse, because in a malicious package a chain may be longer than Python's
        # stack.
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
                hint = (
                    ""
                    if self._knows_builtin
                    else f", and no list of what is built in, as in linux-base-{self._release}"
                )
                raise ImageError(f"{self._packages}: no module {name!r}{needed}{hint}")
        return ordered


def canonical(name: str) -> str:
    """A module's name as the kernel writes it. `-` and `_` mean the same, and become `_`."""
    return name.removesuffix(".ko").replace("-", "_")


def modinfo(content: bytes) -> Mapping[str, list[str]]:
    """A module's `.modinfo`: a list of values for each key. Empty if the module has none."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415
    from elftools.construct import ConstructError  # noqa: PLC0415
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415

    found: dict[str, list[str]] = {}
    try:
        section = ELFFile(io.BytesIO(content)).get_section_by_name(".modinfo")
        if section is None:
            return found
        if section["sh_type"] != "SHT_PROGBITS" or section.compressed:
            # The size of such a section is only claimed; the data may not be there.
            raise ImageError("a module is damaged: its .modinfo is not plain text")
        text = section.data()
    except (ELFError, ConstructError, OverflowError) as error:
        raise ImageError(f"a module is not an ELF file: {error}") from None
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
    """The modules that must be loaded before this one, each with whether this one can do without
    it.
    """
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
