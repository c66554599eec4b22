"""Where what a test needs cannot be had: it is skipped, or fails where that must not be."""

from __future__ import annotations

import os
from typing import Final, NoReturn

import pytest

REQUIRE_LAB: Final = "AVMM_REQUIRE_LAB"
"""1: what is built or fetched for tests (kernels, images, the lab) must be there."""


def not_here(why: str) -> NoReturn:
    """Skip the test with this reason, or fail it."""
    if os.environ.get(REQUIRE_LAB) == "1":
        pytest.fail(f"{REQUIRE_LAB}=1, but: {why}")
    pytest.skip(why)
