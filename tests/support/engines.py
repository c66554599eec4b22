"""The engine that the tests run on: KVM, or what AVMM_ENGINE says."""

from __future__ import annotations

import os
from typing import Final

import pytest

from avmm import arch, engine
from avmm.arch.x86_64.kvm import X86System

NAME: Final = os.environ.setdefault(engine.VARIABLE, engine.KVM)
"""Also for the commands that tests start. It is not `auto`, so that tests of KVM do not quietly
run on something else."""

about_kvm = pytest.mark.skipif(NAME == engine.SOFT, reason="this is about KVM itself")


def open_system() -> X86System:
    """The engine, as `Machine` opens it. Raises what `avmm.engine.opened` raises."""
    system = engine.opened(arch.host(), engine.AUTO)
    assert isinstance(system, X86System)
    return system
