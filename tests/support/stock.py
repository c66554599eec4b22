"""Guests that nobody here has made: Debian's kernels, libkrun's and others. In the lab they run on
its KVM, and here on whatever engine can run them: on most hosts without hardware virtualization,
that is the software engine.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
from lab import guest
from lab.cache import LabError

from avmm import engine
from support.required import not_here

GUEST, NEWER, NEWEST = "debian", "debian-6.12", "debian-newest"
OTHERS, KRUNFW, OTHER_KRUNFW = "kernels", "krunfw", "krunfw-other"


def folder(name: str) -> Path:
    """The folder with the files of such a guest (`lab.guest.folders`). Skips the test, or fails
    it, where it cannot be made."""
    place = f"sent/{name}"
    if "AVMM_LAB" in os.environ:  # the lab's machine has been sent them
        sent = Path(place).absolute()
        found: Path | None = sent if sent.exists() else None
    else:
        try:
            found = _folders().get(place)
        except LabError as error:
            not_here(str(error))
    return found or not_here(f"{name} could not be fetched")


def boot_files(name: str) -> dict[str, Path]:
    """The settings for its kernel and its initramfs."""
    place = folder(name)
    return {"kernel": place / "vmlinuz", "initrd": place / "initrd.cpio.gz"}


def engine_option() -> list[str]:
    """For an image that `auto` does not take for a kernel."""
    return [] if "AVMM_LAB" in os.environ else ["--engine", "soft"]


@cache
def _folders() -> dict[str, Path]:
    return guest.folders()


@pytest.fixture
def fitting_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """For this test, auto means auto again: what runs a kernel here."""
    if os.environ[engine.VARIABLE] == engine.KVM:
        monkeypatch.delenv(engine.VARIABLE)
