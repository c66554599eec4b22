"""Consoles to which clients attach, as `avmm run` serves them: who leaves what to whom."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from support.commands import Command, avmm

pytestmark = [pytest.mark.usefixtures("kvm"), pytest.mark.timeout(240)]


@contextmanager
def client(path: Path) -> Iterator[socket.socket]:
    """A client that is connected as soon as there is room for it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connected = False
        while not connected:
            with suppress(FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                connection.connect(str(path))
                connected = True
        yield connection


def read_to(connection: socket.socket, end: bytes) -> bytes:
    """What the guest prints up to `end`."""
    heard = b""
    while not heard.endswith(end):
        data = connection.recv(4096)
        assert data, heard
        heard += data
    return heard


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "console"


@pytest.fixture
def served(path: Path, commands: ExitStack) -> Command:
    """A guest at the prompt, whose greeting nobody has read."""
    command = commands.enter_context(Command("run", "--console", f"unix:{path}"))
    with client(path) as connection:
        connection.recv(1, socket.MSG_PEEK)  # it has begun to print
    return command


def ends(command: Command, connection: socket.socket) -> None:
    connection.sendall(b"exit 3\r")
    assert command.wait(timeout=200) == 3


def test_who_leaves_without_reading_leaves_the_output_to_the_next(
    served: Command, path: Path
) -> None:
    with client(path):
        pass
    with client(path) as health_check:
        health_check.recv(1, socket.MSG_PEEK)  # the output is there, and stays unread
    with client(path) as connection:
        assert b"guest shell" in read_to(connection, b"avmm> ")
        ends(served, connection)


def test_who_has_read_all_leaves_nothing(served: Command, path: Path) -> None:
    with client(path) as connection:
        read_to(connection, b"avmm> ")
        connection.sendall(b"echo once\r")
        read_to(connection, b"\nonce\r\navmm> ")
    with client(path) as connection:
        connection.sendall(b"echo twice\r")
        assert read_to(connection, b"\ntwice\r\navmm> ") == b"echo twice\r\ntwice\r\navmm> "
        ends(served, connection)


@pytest.mark.parametrize("backlog", ["empty", "full"])
def test_a_second_run_at_a_socket_in_use_is_refused_and_reads_nothing(
    served: Command, path: Path, backlog: str
) -> None:
    with ExitStack() as stack:
        if backlog == "full":
            stack.enter_context(client(path))
            with pytest.raises(BlockingIOError):
                for _ in range(10):
                    waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                    waiting.setblocking(False)
                    waiting.connect(str(path))
        second = avmm("run", "--console", f"unix:{path}")
        assert second.returncode == 2
        assert f"console socket {path}: Address already in use" in second.stderr
    with client(path) as connection:
        assert b"guest shell" in read_to(connection, b"avmm> ")
        ends(served, connection)


def test_who_ends_its_side_still_gets_the_answer(served: Command, path: Path) -> None:
    with client(path) as connection:
        connection.sendall(b"echo the answer\r")
        connection.shutdown(socket.SHUT_WR)
        read_to(connection, b"\nthe answer\r\navmm> ")
    with client(path) as connection:
        ends(served, connection)


def test_who_reads_no_more_still_sends(served: Command, path: Path) -> None:
    with client(path) as connection:
        connection.shutdown(socket.SHUT_RD)
        ends(served, connection)


def test_who_sends_and_leaves_at_once_is_heard(served: Command, path: Path) -> None:
    with client(path) as connection:
        connection.sendall(b"echo heard\r")
    with client(path) as connection:
        read_to(connection, b"\nheard\r\navmm> ")
        ends(served, connection)


def test_a_client_that_reads_nothing_does_not_keep_the_command(
    served: Command, path: Path
) -> None:
    with client(path) as connection:
        connection.sendall(b"count 20000\rexit 3\r")
        assert served.wait(timeout=200) == 3
    assert re.search(r"avmm: console: nobody has read the last \d+ bytes", served.told)


def test_a_terminal_that_nobody_opens_does_not_keep_the_command(commands: ExitStack) -> None:
    command = commands.enter_context(Command("run", "--console", "pty"))
    line = command.expect_error("\n")
    fd = os.open(line.split()[-1], os.O_RDWR | os.O_NOCTTY)
    os.write(fd, b"count 3000\rexit 3\r")
    os.close(fd)
    assert command.wait(timeout=200) == 3
    assert re.search(r"avmm: console: nobody has read the last \d+ bytes", command.told)
