"""A host that has too little of descriptors, memory, threads or file size: the errors are
`AvmmError`s, and nothing is left behind."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from support.scarcity import no_more_descriptors

import avmm

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("kvm", "nothing_left")]


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


async def entered(**settings: object) -> None:
    async with avmm.Machine(memory="64M", **settings):  # type: ignore[arg-type]
        pass


async def test_no_descriptor_is_left() -> None:
    await entered()  # what is opened once is open now
    with no_more_descriptors(), pytest.raises(avmm.AvmmError, match="Too many open files"):
        await entered()


@pytest.mark.parametrize("free", range(1, 16))
async def test_one_descriptor_after_the_other_cannot_be_had(free: int) -> None:
    await entered()
    with no_more_descriptors(free):
        try:
            await entered()
        except avmm.AvmmError as error:
            assert "Too many open files" in str(error)


async def test_files_may_not_be_as_large_as_ram() -> None:
    with (
        limited(resource.RLIMIT_FSIZE, 16 << 20),
        pytest.raises(avmm.AvmmError, match=r"cannot be made: File too large"),
    ):
        await entered()


async def test_no_second_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "avmm vCPU 1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(avmm.AvmmError, match="vCPU 1 could not get a thread"):
        async with avmm.Machine(memory="64M", cpus=2) as vm:
            await vm.wait()
            await trio.sleep_forever()


def test_too_little_address_space_for_ram() -> None:
    """In a process of its own, because the limit counts what is mapped already."""
    code = (
        "import resource, sys\n"
        "from avmm.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "main(['run', '--memory', '2G'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 125
    assert "the machine cannot be made: Cannot allocate memory" in done.stderr


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        ("RuntimeError('odd')", 125, "unexpected RuntimeError: odd, at <string>:"),
        ("avmm.AvmmError('known')", 125, "avmm: known\n"),
        ("avmm.ConfigError('wrong')", 2, "avmm: wrong\n"),
        (
            "ExceptionGroup('two', [avmm.AvmmError('one'), avmm.AvmmError('two')])",
            125,
            "avmm: two",
        ),
        ("KeyboardInterrupt()", 130, ""),
        ("BaseExceptionGroup('x', [KeyboardInterrupt()])", 130, ""),
        ("BrokenPipeError(32, 'Broken pipe')", 141, ""),
    ],
)
def test_whatever_ends_the_command_gives_a_status_of_its_own(
    tmp_path: Path, raised: str, status: int, told: str
) -> None:
    """1 is never given: a debug exit uses it for success."""
    code = (
        "import avmm, avmm.cli, avmm.cli.doctor as doctor\n"
        f"def fail(*args, **kwargs): raise {raised}\n"
        "doctor.command.callback = fail\n"
        "avmm.cli.main(['doctor'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == status, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
