"""Fixtures for tests of what is loaded into a guest before it runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from avmm.memory.ram import GuestMemory

Write = Callable[[object, str], Path]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """16 MiB of fresh guest RAM."""
    ram = GuestMemory("16M")
    yield ram
    ram.close()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file: `write(content, name)`; content is bytes, or has `__bytes__`."""

    def write(content: bytes, name: str = "kernel") -> Path:
        path = tmp_path / name
        path.write_bytes(bytes(content))
        return path

    return write


@pytest.fixture(scope="session")
def compile_elf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Assemble and link a freestanding ELF with the C compiler that building avmm needs."""

    def compile_elf(source: str, *flags: str) -> Path:
        folder = tmp_path_factory.mktemp("elf")
        (folder / "guest.S").write_text(source)
        # fmt: off
        subprocess.run(
            ["gcc", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none",
             "-Wl,-z,max-page-size=4096", "-Wl,-z,noexecstack", *flags,
             "-o", folder / "guest", folder / "guest.S"],
            check=True,
        )
        # fmt: on
        return folder / "guest"

    return compile_elf
