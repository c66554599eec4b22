"""A command whose files are replaced while its guest runs: it uses none of the new ones."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.commands import ctl, output_until_prompt, receiver

pytestmark = [pytest.mark.usefixtures("kvm"), pytest.mark.timeout(60)]

WATCHED = """
import os, sys, sysconfig
folders = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def note(event, arguments):
    if event == "import":
        os.write(log, f"import {arguments[0]}\\n".encode())
    elif event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        path = os.fspath(arguments[0])
        if isinstance(path, str) and path.startswith(folders):
            os.write(log, f"open {path}\\n".encode())

sys.addaudithook(note)
from avmm.cli import main
main()
"""
"""The command, which notes in a file what it imports and which of Python's files it opens."""


def test_nothing_is_read_again_after_the_start(tmp_path: Path) -> None:
    log, control = tmp_path / "log", tmp_path / "control"
    program = tmp_path / "watched.py"
    program.write_text(WATCHED)
    with ExitStack() as stack:
        target = f"unix:{tmp_path / 'there'}"
        receiver(stack, target)
        command = [sys.executable, str(program), str(log), "run", "--memory", "64M"]
        guest = stack.enter_context(
            subprocess.Popen(
                [*command, "--control", f"unix:{control}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        stack.callback(guest.kill)
        output_until_prompt(guest)  # the control socket is served before that
        log.write_bytes(b"")
        for verb in (["status"], ["pause"], ["resume"], ["snapshot", str(tmp_path / "file")]):
            assert ctl(control, *verb).returncode == 0, verb
        assert ctl(control, "migrate", target).returncode == 0
        guest.wait(30)
    assert log.read_text() == ""
