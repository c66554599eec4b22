"""The engine that the tests run on: what AVMM_ENGINE says, or else KVM where there is one."""

from __future__ import annotations

import os
from typing import Final

import pytest

from avmm import arch, engine
from avmm.arch.x86_64.kvm import X86System
from avmm.kvm import KvmUnavailable


def _found() -> str:
    if os.environ.get("AVMM_REQUIRE_KVM") == "1":
        return engine.KVM
    try:
        arch.host().open_system().close()
    except KvmUnavailable:
        return engine.SOFT
    return engine.KVM


NAME: Final = os.environ.get(engine.VARIABLE) or _found()
"""Never `auto`: tests of KVM do not quietly run on something else. It also holds for the commands
that tests start."""
os.environ[engine.VARIABLE] = NAME

about_kvm = pytest.mark.skipif(NAME == engine.SOFT, reason="this is about KVM itself")


def open_system() -> X86System:
    """The engine, as `Machine` opens it. Raises what `avmm.engine.opened` raises."""
    system = engine.opened(arch.host(), engine.AUTO)
    assert isinstance(system, X86System)
    return system
