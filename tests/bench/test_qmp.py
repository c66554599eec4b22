"""What the benchmarks make of QEMU's answers."""

from __future__ import annotations

from typing import Any

import pytest

from avmm.bench.qmp import Qemu


def test_a_total_time_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU says "completed" a moment before it has reckoned it."""
    times = iter([0, 0, 54])

    def execute(qemu: Qemu, command: str, **arguments: Any) -> dict[str, Any]:
        return {"status": "completed", "total-time": next(times)} if "query" in command else {}

    monkeypatch.setattr(Qemu, "execute", execute)
    assert Qemu.__new__(Qemu).migrate("unix:line", 0.1)["total-time"] == 54
