"""docs/architecture.md names what there is, and leaves no room out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/architecture.md").read_text()
_BLOCK = re.compile(r"```\n(.*?)```", re.DOTALL)
_ENTRY = re.compile(r"( *)([\w.]+/?)(?:  |$)")
_NAMED = re.compile(r"`([\w./-]+(?:/|\.(?:py|h|c|md)))`")
_SOURCES = (".py", ".c", ".h", ".S")


def tree(block: str) -> Iterator[str]:
    """The paths in a drawing of a tree: one a line, two spaces deeper for each folder; what stands
    after two more spaces is text, and so is a line that is indented further than any entry."""
    folders: list[str] = []
    for line in block.splitlines():
        entry = _ENTRY.match(line)
        if entry is None or len(entry[1]) // 2 > len(folders):
            continue
        del folders[len(entry[1]) // 2 :]
        yield "".join(folders) + entry[2]
        if entry[2].endswith("/"):
            folders.append(entry[2])


BLOCKS = _BLOCK.findall(TEXT)
TREE = list(tree(BLOCKS[0]))
ROWS = [row.split() for row in BLOCKS[1].splitlines()]
NAMED = sorted({name for name in _NAMED.findall(_BLOCK.sub("", TEXT))})


def sources() -> Iterator[str]:
    """The files of the package that are written by hand, from the tree's root."""
    for path in (ROOT / "avmm").rglob("*"):
        if path.suffix in _SOURCES:
            yield path.relative_to(ROOT).as_posix()


def test_the_document_is_read() -> None:
    assert {"avmm/", "avmm/loop.py", "avmm/devices/virtio/"} <= set(TREE)
    assert {"kvm/parking.h", "arch/x86_64/acpi.py", "tests/model/", "devices/"} <= set(NAMED)


@pytest.mark.parametrize("name", TREE)
def test_what_the_tree_shows_is_there(name: str) -> None:
    path = ROOT / name
    assert path.is_dir() if name.endswith("/") else path.is_file()


@pytest.mark.parametrize("name", NAMED)
def test_what_the_text_names_is_there(name: str) -> None:
    """From `avmm/`, or from the repository's root."""
    paths = [folder / name for folder in (ROOT / "avmm", ROOT)]
    assert any(path.is_dir() if name.endswith("/") else path.is_file() for path in paths)


def test_every_folder_is_in_the_tree() -> None:
    folders = {f"{Path(source).parent.as_posix()}/" for source in sources()}
    assert folders - set(TREE) == set()


def test_every_module_outside_of_a_folder_is_in_the_tree() -> None:
    modules = {source for source in sources() if Path(source).parent == Path("avmm")}
    assert modules - set(TREE) == set()


def test_its_rows_are_those_that_imports_are_held_to() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (order,) = [each for each in contracts["contracts"] if each["id"] == "order"]
    assert [re.findall(r"\w+", layer) for layer in order["layers"]] == ROWS
