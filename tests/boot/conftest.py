"""What all tests of booting share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """No test leaves a file open, whether it went well or failed inside."""
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)  # noqa: PTH208
