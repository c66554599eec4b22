"""Each kind of socket that the command opens, and each kind of client that is none: the guest
lives, nothing is lost that was owed, and nothing hangs."""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import Command, ctl, receiver

pytestmark = [pytest.mark.usefixtures("kvm"), pytest.mark.timeout(120)]

SECONDS = 30
REQUEST = json.dumps({"command": "status"}).encode() + b"\n"
FRAME = struct.pack(">I", 60) + bytes(60)


def connected(path: Path) -> socket.socket:
    """A client, which waits for room in the queue."""
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(str(path))
    except BaseException:
        client.close()
        raise
    client.settimeout(SECONDS)
    return client


def heard(client: socket.socket, end: bytes) -> bytes:
    said = b""
    while end not in said:
        data = client.recv(1 << 16)
        assert data, f"{said!r} ended without {end!r}"
        said += data
    return said


@dataclass
class Served:
    """A command that serves a socket of this kind."""

    kind: str
    path: Path
    says: bytes
    """What a client of it may say."""
    command: Command
    control: Path
    console: Path | None

    def lives(self) -> None:
        """It answers at its control socket, and its guest at the console."""
        told = json.loads(ctl(self.control, "status", "--json").stdout)
        assert told["state"].startswith("running" if self.console else "waiting at unix:")
        if self.console is not None:
            with connected(self.console) as client:
                client.sendall(b"echo it $ lives\r")
                heard(client, b"\r\nit $ lives\r\navmm> ")

    def limit(self, more: int | None) -> None:
        """Let it open so many more descriptors; None for as many as it may."""
        _, most = resource.prlimit(self.command.pid, resource.RLIMIT_NOFILE)
        found = most
        if more is not None:
            found = len(os.listdir(f"/proc/{self.command.pid}/fd")) + more  # noqa: PTH208
        resource.prlimit(self.command.pid, resource.RLIMIT_NOFILE, (found, most))


KINDS = ("console", "control", "vsock", "net", "migration", "receiver's control")


@pytest.fixture(scope="module", params=KINDS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("sockets")
    control, console = folder / "control", folder / "console"
    kind = request.param
    with ExitStack() as stack:
        if kind in ("migration", "receiver's control"):
            line = folder / "line"
            options = ("--control", f"unix:{control}")
            command, _ = receiver(stack, f"unix:{line}", *options)
            path, says = (line, b"GET / HTTP/1.1\r\n\r\n")
            if kind != "migration":
                path, says = control, REQUEST
            yield Served(kind, path, says, command, control, None)
            arrives(stack, line, folder, command)
            return
        command = stack.enter_context(
            Command(
                *("run", "--console", f"unix:{console}", "--control", f"unix:{control}"),
                *(
                    "--vsock",
                    f"cid=5,unix={folder / 'vsock'}",
                    "--net",
                    f"listen={folder / 'net'}",
                ),
            )
        )
        for name in ("console", "control", "vsock", "net"):
            while not (folder / name).exists():
                time.sleep(0.01)
        says = {
            "console": b"echo $\r",
            "control": REQUEST,
            "vsock": b"CONNECT 52\nhello",
            "net": FRAME,
        }[kind]
        yield Served(kind, folder / kind, says, command, control, console)
        with connected(console) as client:
            client.sendall(b"exit 3\r")
            assert command.wait(60) == 3


def arrives(stack: ExitStack, line: Path, folder: Path, there: Command) -> None:
    """After all, a guest arrives at the receiver."""
    control = folder / "source"
    source = stack.enter_context(Command("run", "--control", f"unix:{control}"))
    source.expect("avmm> ")
    done = ctl(control, "migrate", f"unix:{line}")
    assert done.returncode == 0, done.stderr
    there.say("exit 4\r")
    assert there.wait(60) == 4


def connects_and_leaves(served: Served) -> None:
    connected(served.path).close()


def half_closes(served: Served) -> None:
    """It may still be told something."""
    with connected(served.path) as client:
        client.sendall(served.says)
        client.shutdown(socket.SHUT_WR)
        if served.kind == "console":
            heard(client, b"\r\n$\r\navmm> ")
        elif "control" in served.kind:
            assert b"state" in heard(client, b'"result"')


def sends_and_closes_at_once(served: Served) -> None:
    with connected(served.path) as client:
        if served.kind == "console":
            client.sendall(b"echo was $ here\r")
        else:
            client.sendall(served.says)
    if served.kind == "console":
        with connected(served.path) as client:
            client.sendall(b"\r")
            heard(client, b"\r\nwas $ here\r\navmm> ")


def reads_nothing(served: Served) -> None:
    """What a console's client did not read goes to the next."""
    number = 300
    with connected(served.path) as client:
        client.setblocking(False)
        sent = 0
        for _ in range(number):
            try:
                sent += client.send(served.says) == len(served.says)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                break
        if served.kind != "console":
            served.lives()
    if served.kind == "console":
        with connected(served.path) as client:
            client.sendall(b"\recho this is the $ end\r")
            said = heard(client, b"\r\nthis is the $ end\r\navmm> ")
            assert said.count(b"\r\n$\r\n") >= sent - 1  # of the first a part may have been read


def comes_at_the_descriptor_limit(served: Served) -> None:
    """It waits, or is turned away, and the next one is served."""
    served.limit(0)
    try:
        with connected(served.path) as client, suppress(BrokenPipeError):
            client.sendall(served.says)
            client.settimeout(0.5)
            with suppress(TimeoutError, ConnectionResetError):
                client.recv(1)
            served.limit(None)
            client.settimeout(SECONDS)
            if served.kind == "console":
                heard(client, b"avmm> ")
    finally:
        served.limit(None)


def comes_300_times(served: Served) -> None:
    for _ in range(300):
        connected(served.path).close()


CASES: list[Callable[[Served], None]] = [
    connects_and_leaves,
    half_closes,
    sends_and_closes_at_once,
    reads_nothing,
    comes_at_the_descriptor_limit,
    comes_300_times,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_client_that(served: Served, case: Callable[[Served], None]) -> None:
    case(served)
    served.lives()
