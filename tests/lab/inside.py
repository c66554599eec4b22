"""pytest's side in L1: every report as a line of JSON, on the second serial port."""

from __future__ import annotations

import json
import os
from typing import Final

import pytest

_PORT: Final = "/dev/ttyS1"


class _Sender:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._fd = os.open(_PORT, os.O_WRONLY | os.O_NOCTTY)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        rest = memoryview(json.dumps(data).encode() + b"\n")
        while rest:
            rest = rest[os.write(self._fd, rest) :]


def pytest_configure(config: pytest.Config) -> None:
    """Start sending."""
    config.pluginmanager.register(_Sender(config), "lab-sender")
