"""A process that has few descriptors left, or none."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def no_more_descriptors(free: int = 0) -> Iterator[None]:
    """This process can open only so many descriptors inside the block, as near its limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        # The lowest free number is always given next, so holes are filled first.
        highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        while (fd := os.open("/dev/null", os.O_RDONLY)) < highest:
            held.append(fd)
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + free, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
