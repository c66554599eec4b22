"""pytest's side in L1: every report as a line of JSON, on the second serial port.

In between comes a sign of life: a kernel that hangs under emulation, as one in some fifty hours
does, is then known from a test that takes its time.
"""

from __future__ import annotations

import json
import os
import threading
from typing import Final

import pytest

_PORT: Final = "/dev/ttyS1"
_ALIVE_SECONDS: Final = 10


class _Sender:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._fd = os.open(_PORT, os.O_WRONLY | os.O_NOCTTY)
        self._one_at_a_time = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._stay_alive, name="lab alive", daemon=True).start()

    def _stay_alive(self) -> None:
        while not self._ended.wait(_ALIVE_SECONDS):
            self._send(b"alive")

    def _send(self, line: bytes) -> None:
        rest = memoryview(line + b"\n")
        with self._one_at_a_time:
            while rest:
                rest = rest[os.write(self._fd, rest) :]

    def pytest_unconfigure(self) -> None:
        self._ended.set()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._send(json.dumps(data).encode())


def pytest_configure(config: pytest.Config) -> None:
    """Start sending."""
    config.pluginmanager.register(_Sender(config), "lab-sender")
