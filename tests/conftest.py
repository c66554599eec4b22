"""What all tests share: the demand for KVM, and the proof that nothing is left behind."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.commands import PROMPT, Command
from support.engines import open_system
from support.leftovers import resources

from avmm.errors import EngineUnavailable
from avmm.kvm import KvmUnavailable

pytest_plugins = ["lab.plugin", "support.booting", "support.stock"]

# How long an example takes is the host's matter.
settings.register_profile("avmm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("avmm")

# What a shell runs in the background ignores Ctrl-C, and so would the commands that are tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def kvm() -> None:
    """Skips, with the reason, where there is no KVM; fails there if AVMM_REQUIRE_KVM=1."""
    try:
        open_system().close()
    except (KvmUnavailable, EngineUnavailable) as error:
        if os.environ.get("AVMM_REQUIRE_KVM") == "1":
            pytest.fail(f"AVMM_REQUIRE_KVM=1, but: {error}")
        pytest.skip(str(error))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No descriptor, thread or guest mapping outlives the test."""
    before = resources()
    gc.freeze()  # what is there now need not be looked through again: late in a run that is much
    yield
    after = resources()
    for kind, old, new in zip(("descriptors", "threads", "mappings"), before, after, strict=True):
        assert not new - old, f"{kind} left behind"


@pytest.fixture
def full_up_to(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own that has room for so many bytes more than what is there."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)  # for not every system has mount(8)
    if libc.mount(b"avmm-test", os.fsencode(folder), b"tmpfs", 0, b"size=64M"):
        reason = os.strerror(ctypes.get_errno())
        pytest.skip(f"no file system can be mounted here: {reason}")

    def leave(room: int) -> Path:
        filler = folder / "filler"
        filler.unlink(missing_ok=True)
        found = os.statvfs(folder)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - room)
        return folder

    yield leave
    assert libc.umount2(os.fsencode(folder), 0) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture
def commands() -> Iterator[ExitStack]:
    """Put a `Command` on this stack: it is ended with the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def guest(tmp_path: Path, commands: ExitStack) -> Command:
    """The shell, with its control socket at tmp_path/ctl."""
    guest = commands.enter_context(Command("run", "--control", f"unix:{tmp_path / 'ctl'}"))
    guest.expect(PROMPT)
    return guest
