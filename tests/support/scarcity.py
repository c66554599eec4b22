"""A process that has no descriptor left."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """This process cannot open a descriptor inside the block, as at its limit (EMFILE)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Descriptors are given from below: all below the limit are in use if the lowest free one is
    # at the limit. Holes are filled first.
    held = []
    try:
        highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        while (fd := os.open("/dev/null", os.O_RDONLY)) < highest:
            held.append(fd)
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
