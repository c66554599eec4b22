"""What the tests on the model share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def quiet_log() -> Iterator[None]:
    """Lying kernels are named in the log, by the thousand."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
