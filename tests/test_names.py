"""One meaning for each name: of public classes, and of modules in their packages."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import avmm

SOURCES = Path(avmm.__file__).parent
MEANT: dict[str, str] = {}
"""Names that several public classes have, and why."""


def classes() -> dict[str, list[str]]:
    """The modules of each public class, by its name."""
    found = defaultdict(list)
    for path in sorted(SOURCES.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCES.parent).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(module)
    return found


def test_a_public_class_shares_its_name_with_no_other() -> None:
    shared = {name: modules for name, modules in classes().items() if len(modules) > 1}
    assert set(shared) == set(MEANT), shared


def packages() -> list[ModuleType]:
    names = [avmm.__name__]
    for module in pkgutil.walk_packages(avmm.__path__, "avmm."):
        if module.ispkg:
            names.append(module.name)
    return [importlib.import_module(name) for name in names]


def test_no_module_is_hidden_by_what_its_package_exports() -> None:
    """`import avmm.restore` would give the function where a module of that name existed too."""
    hidden = []
    for package in packages():
        for module in pkgutil.iter_modules(package.__path__):
            found = vars(package).get(module.name)
            if found is not None and not isinstance(found, ModuleType):
                hidden.append(f"{package.__name__}.{module.name}")
    assert not hidden
