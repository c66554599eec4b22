"""avmm's own modules under test: as they are, or with a bug planted in their source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import avmm.loop
import avmm.migration
import avmm.vcpu.completion
import avmm.vcpu.exits


@dataclass(frozen=True)
class Production:
    """The modules that belong together. They are `Any`: a mutant has no types of its own."""

    completion: Any = avmm.vcpu.completion
    exits: Any = avmm.vcpu.exits
    loop: Any = avmm.loop
    migration: Any = avmm.migration


REAL: Final = Production()


def mutate(edits: Mapping[str, list[tuple[str, str]]]) -> Production:
    """avmm's modules with pieces of their source replaced: by module's name, (old, new).

    Each old piece must occur exactly once: where the source has changed, the mutation says so
    instead of planting nothing.
    """
    modules: dict[str, ModuleType] = {}
    for name in ("completion", "exits", "loop", "migration"):
        real: ModuleType = getattr(REAL, name)
        assert real.__file__ is not None
        source = Path(real.__file__).read_text()
        for old, new in edits.get(name, []):
            assert source.count(old) == 1, f"{name}.py has {source.count(old)} times: {old}"
            source = source.replace(old, new)
        module = ModuleType(real.__name__)
        module.__file__ = real.__file__
        exec(compile(source, f"{real.__file__} (mutated)", "exec"), module.__dict__)
        modules[name] = module
    loop, completion = modules["loop"], modules["completion"]
    vars(loop).update(
        drain=completion.drain,
        is_output=completion.is_output,
        CompletionPolicy=completion.CompletionPolicy,
    )
    return Production(**modules)
