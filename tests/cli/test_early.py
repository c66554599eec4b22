"""The control socket is there before avmm has been imported."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from support.commands import ctl, output_until_prompt

import avmm_early

WATCHED = """
import os, socket, sys
class Watch:
    def find_spec(self, name, path, target=None):
        if name == "avmm":
            sys.meta_path.remove(self)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(sys.argv[-1].removeprefix("unix:"))
            os.write(1, b"connected before\\n")
sys.meta_path.insert(0, Watch())
import avmm_early
avmm_early.main()
"""
"""The command, and a client that connects when it begins to import avmm."""


@pytest.mark.usefixtures("kvm")
def test_a_client_may_come_before_avmm_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "control"
    command = [sys.executable, "-c", WATCHED, "run", "--memory=64M", "--control", f"unix:{path}"]
    with ExitStack() as stack:
        guest = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        stack.callback(guest.kill)
        said = output_until_prompt(guest)
        assert said.startswith(b"connected before\n")
        assert path.stat().st_mode & 0o777 == 0o600
        assert ctl(path, "stop").returncode == 0
        guest.wait(30)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [["--memory", "x"], ["--nonsense"], ["--help"]])
def test_a_socket_that_nobody_takes_is_removed(tmp_path: Path, wrong: list[str]) -> None:
    command = [sys.executable, "-m", "avmm", "run", "--control", f"unix:{tmp_path / 'c'}", *wrong]
    done = subprocess.run(command, capture_output=True, timeout=50, check=False)
    assert done.returncode == (0 if wrong == ["--help"] else 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("run --control unix:/a/b", "/a/b"),
        ("run --control=unix:c image", "c"),
        ("--log-level debug restore file --control unix:/a:b", "/a:b"),
        ("receive unix:/x --control unix:/first --control unix:/last", "/last"),
        ("run --control tcp:1", None),
        ("run --control unix:", None),
        ("run --control", None),
        ("run image -- --control unix:/a", None),
        ("run unix:/a", None),
        ("ctl /a status --control unix:/a", None),
    ],
)
def test_where_the_command_line_wants_it(line: str, path: str | None) -> None:
    assert avmm_early.control_path(line.split()) == path


def test_who_finds_a_socket_can_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it gets its name, it listens."""
    link, named = os.link, []

    def linked(hidden: str, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(hidden)
        named.append(path)
        link(hidden, path)

    monkeypatch.setattr(os, "link", linked)
    path = tmp_path / "socket"
    with closing(avmm_early.listen(str(path), 1)):
        assert named == [str(path)]
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_what_is_there_stays(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(hidden: str, path: str) -> None:
        raise PermissionError(1, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "socket"
    path.write_text("a file")
    with pytest.raises(OSError, match="Address already in use"):
        avmm_early.listen(str(path), 1)
    assert path.read_text() == "a file"
    path.unlink()
    served = closing(avmm_early.listen(str(path), 1))
    with served, pytest.raises(OSError, match="Address already in use"):
        avmm_early.listen(str(path), 1)
    with closing(avmm_early.listen(str(path), 1)):  # nobody serves what is left of the first
        assert list(tmp_path.iterdir()) == [path]


def test_a_path_of_all_bytes_that_linux_takes(tmp_path: Path) -> None:
    path = str(tmp_path / ("x" * (107 - len(str(tmp_path)) - 1)))
    with closing(avmm_early.listen(path, 1)):
        assert os.path.exists(path)  # noqa: PTH110
    with pytest.raises(OSError, match="too long"):
        avmm_early.listen(path + "xx", 1)


def test_what_cannot_listen_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, mode: int) -> None:
        raise PermissionError(1, "no modes here")

    monkeypatch.setattr(os, "chmod", refuse)
    with pytest.raises(OSError, match="no modes here"):
        avmm_early.listen(str(tmp_path / "socket"), 1)
    assert list(tmp_path.iterdir()) == []
