"""What must not be left to chance in a deterministic run: random bytes, and the order of threads.

`Machine(deterministic=SEED)` makes `fixed` hold for its own tasks, and so does
`avmm.deterministic.run` for a whole program. Elsewhere `random_bytes` gives the kernel's bytes.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

_source: Final[ContextVar[random.Random | None]] = ContextVar("avmm's chance", default=None)


def is_fixed() -> bool:
    """Does the calling task belong to a deterministic run? Then nothing of it may depend on how
    fast threads are, or on the time of day."""
    return _source.get() is not None


def random_bytes(count: int) -> bytes:
    """So many random bytes: the run's own, which its seed makes, or secret ones."""
    source = _source.get()
    return secrets.token_bytes(count) if source is None else source.randbytes(count)


@contextmanager
def fixed(seed: int) -> Iterator[None]:
    """The calling task, and the tasks that it starts, belong to a deterministic run meanwhile."""
    before = _source.get()
    _source.set(random.Random(seed))  # its bytes are to be known
    try:
        yield
    finally:
        _source.set(before)  # not `reset`: a fixture of a test is left in another context
