"""The control socket, and `avmm ctl` with it, on guests of real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pexpect
import pytest
from support.commands import AVMM, PROMPT, Command, avmm, ctl, receiver, status

pytestmark = pytest.mark.usefixtures("kvm")


class Raw:
    """A client that says what it likes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("rb")
        self.greeting = self.read()

    def read(self) -> Any:
        return json.loads(self.lines.readline())

    def say(self, line: bytes) -> Any:
        self.socket.sendall(line + b"\n")
        return self.read()

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


@pytest.fixture
def raw(guest: Command, tmp_path: Path) -> Iterator[Raw]:
    client = Raw(tmp_path / "ctl")
    yield client
    client.close()


def test_the_socket_is_its_users_alone_and_goes_with_the_guest(
    guest: Command, tmp_path: Path
) -> None:
    path = tmp_path / "ctl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    done = ctl(path, "status")
    assert done.returncode == 0
    told = status(path)
    on = {"kvm": "", "soft": " on the software engine,"}[told["engine"]]
    assert done.stdout.startswith(f"running: 1 vCPU, 64 MiB of RAM,{on} process ")
    assert told["pid"] == guest.pid
    done = ctl(path, "stop")
    assert (done.returncode, done.stdout) == (0, "the guest has ended\n")
    assert guest.wait() == 0
    assert not path.exists()
    done = ctl(path, "status")
    assert (done.returncode, done.stderr) == (
        2,
        f"avmm: control socket {path}: No such file or directory\n",
    )


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("{}/ctl", "expected unix:PATH"),
        ("unix:", "expected unix:PATH"),
        ("unix:{}", "Address already in use"),
        ("unix:{}/no/ctl", "No such file"),
    ],
)
def test_control_sockets_that_cannot_be(tmp_path: Path, target: str, why: str) -> None:
    done = avmm("run", "--control", target.format(tmp_path))
    assert (done.returncode, why in done.stderr, done.stdout) == (2, True, "")


def test_a_client_is_greeted_and_answered_line_by_line(raw: Raw) -> None:
    assert raw.greeting == {"avmm": "0.1.0", "control": [1]}
    raw.socket.sendall(b'{"command": "status"}\n{"command": "pau')
    assert raw.read()["result"]["state"] == "running"
    raw.socket.sendall(b'se"}\n')
    assert raw.read() == {"result": {"pauses": {"terminal": 0, "control": 1}}}
    assert raw.say(b'{"command": "status"}')["result"]["state"] == "paused"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("migrate", "tcp:a..b:5"), "expected unix:PATH or tcp:HOST:PORT"),
        (("migrate", "tcp:" + "x" * 70 + ":5"), "expected unix:PATH or tcp:HOST:PORT"),
        (("migrate", "tcp:no-such-host.invalid:5"), "tcp:no-such-host.invalid:5: "),
        (("migrate", "unix:/" + "x" * 200), "unix:/xxx"),
        (("snapshot", "/"), "snapshot /: expected the name of a file"),
        (("pause", "--deadline=nan"), "nan: expected a number of seconds above 0"),
        (("pause", "--deadline=-1"), "-1: expected a number of seconds above 0"),
        (("pause", "--deadline=soon"), "'soon' is not a valid float"),
        (("snapshot", "/proc/1"), "snapshot /proc/1: "),
    ],
)
def test_a_mistyped_place_ends_no_guest(
    guest: Command, tmp_path: Path, arguments: tuple[str, str], why: str
) -> None:
    done = ctl(tmp_path / "ctl", *arguments)
    assert done.returncode in (2, 125)
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert status(tmp_path / "ctl")["state"] == "running"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "not one line of JSON"),
        (b"status", "not one line of JSON"),
        (b"\xff\xfe", "not one line of JSON"),
        (b"[" * 60000, "not one line of JSON"),
        (b'{"command": "pause", "deadline": NaN}', "not one line of JSON"),
        (b'{"command": "pause", "deadline": ' + b"9" * 5000 + b"}", "not one line of JSON"),
        (b"[]", "expected an object"),
        (b"{}", "no such command"),
        (b'{"command": ["status"]}', "no such command"),
        (b'{"command": "format"}', "there is no such command; expected one of status, pause"),
        (b'{"command": "status", "loud": true}', "status: unknown argument 'loud'"),
        (b'{"command": "pause", "deadline": -1}', "deadline: expected a number above 0"),
        (b'{"command": "pause", "deadline": 1e999}', "deadline: expected a number above 0"),
        (b'{"command": "pause", "deadline": true}', "deadline: expected a number above 0"),
        (b'{"command": "snapshot"}', "snapshot: expected file"),
        (b'{"command": "snapshot", "file": 3}', "file: expected text"),
        (b'{"command": "snapshot", "file": "a\\u0000b"}', "file: expected text"),
        (b'{"command": "snapshot", "file": "\\ud800"}', "file: expected text"),
        (b'{"command": "snapshot", "file": "here"}', "expected an absolute path"),
        (b'{"command": "migrate", "target": "x"}', "target 'x': expected unix:PATH or tcp:"),
        (b'{"command": "migrate", "target": "tcp:a:1", "tls": {"ca": "/x"}}', "expected cert"),
        (b'{"command": "settle", "runs": "anywhere"}', "expected 'here' or 'there'"),
        (b'{"command": "settle", "runs": "here"}', "expected one whose hand-over got no answer"),
        (b'{"command": "resume"}', "the control socket has not paused the guest"),
    ],
)
def test_what_is_no_command_is_answered_with_an_error(raw: Raw, line: bytes, why: str) -> None:
    assert why in raw.say(line)["error"]
    assert raw.say(b'{"command": "status"}')["result"]["state"] == "running"


def test_a_line_without_end_is_cut_off(raw: Raw, tmp_path: Path) -> None:
    raw.socket.sendall(b" " * 65_537)
    assert raw.read() == {"error": "the line is longer than 65536 bytes", "kind": "RequestError"}
    assert raw.lines.readline() == b""
    assert status(tmp_path / "ctl")["state"] == "running"


def test_several_clients_at_once_and_too_many(raw: Raw, tmp_path: Path) -> None:
    others = [Raw(tmp_path / "ctl") for _ in range(31)]
    assert all(other.say(b'{"command": "status"}')["result"] for other in others)
    late = socket.socket(socket.AF_UNIX)
    late.connect(str(tmp_path / "ctl"))
    assert late.recv(100) == b""
    late.close()
    for other in others:
        other.close()


def test_pauses_count_and_outlive_their_client(guest: Command, tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    for times in (1, 2):
        done = ctl(path, "pause", "--deadline", "10")
        assert (done.returncode, done.stdout) == (0, f"paused by control ({times})\n")
    assert status(path)["state"] == "paused"
    guest.say("echo later\r")
    assert ctl(path, "resume").stdout == "paused by control (1)\n"
    assert "paused by control (1)" in ctl(path, "status").stdout
    assert ctl(path, "resume").stdout == "running\n"
    guest.expect("\nlater\r\n" + PROMPT)
    done = ctl(path, "resume")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == "avmm: the control socket has not paused the guest\n"


def test_a_paused_guest_ends_all_the_same(guest: Command, tmp_path: Path) -> None:
    assert ctl(tmp_path / "ctl", "pause").returncode == 0
    assert ctl(tmp_path / "ctl", "stop").returncode == 0
    assert guest.wait() == 0


def test_the_terminal_and_the_socket_pause_each_for_itself(
    tmp_path: Path, commands: ExitStack
) -> None:
    path = tmp_path / "ctl"
    terminal = pexpect.spawn(
        AVMM[0], [*AVMM[1:], "run", "--control", f"unix:{path}"], timeout=20, encoding="utf-8"
    )
    commands.callback(terminal.close, force=True)
    terminal.expect_exact(PROMPT)
    terminal.send("\x01p")
    terminal.expect_exact("avmm: paused")
    assert ctl(path, "pause").stdout == "paused by terminal (1) and control (1)\n"
    terminal.send("\x01p")
    terminal.expect_exact("avmm: still paused by control (1)")
    assert status(path)["state"] == "paused"
    terminal.send("\x01p")
    terminal.expect_exact("avmm: paused")
    assert ctl(path, "resume").stdout == "paused by terminal (1)\n"
    done = ctl(path, "resume")
    assert (done.returncode, "it is paused by terminal (1)" in done.stderr) == (125, True)
    terminal.send("echo later\r\x01p")
    terminal.expect_exact("avmm: running")
    terminal.expect_exact("\nlater\r\n" + PROMPT)


def test_a_snapshot_is_restored_again_and_again(guest: Command, tmp_path: Path) -> None:
    path, file = tmp_path / "ctl", tmp_path / "file"
    guest.say("poke 0x200000 0x1234\r")
    guest.expect(PROMPT)
    done = ctl(path, "snapshot", str(file))
    assert done.returncode == 0
    assert done.stdout.startswith(f"{file}: ")
    assert done.stderr.startswith("round 1: 0 of ")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    guest.say("poke 0x200000 0x5678\r")
    guest.expect(PROMPT)
    for options in ([], ["--verify"], ["--unclaimed", "error", "--completion", "always"]):
        done = avmm("restore", str(file), *options, given="peek 0x200000\nexit 3\n")
        assert done.returncode == 3
        assert "1234" in done.stdout
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-1])
    done = avmm("restore", str(tmp_path / "cut"))
    assert (done.returncode, "it was cut off" in done.stderr) == (125, True)
    done = avmm("restore", str(tmp_path / "none"))
    assert (done.returncode, "No such file" in done.stderr) == (125, True)
    done = avmm("restore", str(file), "--console", "virtio")
    assert (done.returncode, "no virtio console" in done.stderr) == (2, True)
    done = ctl(path, "snapshot", str(tmp_path / "no" / "file"))
    assert (done.returncode, "No such file" in done.stderr) == (125, True)
    done = ctl(path, "stop")


def test_what_a_restored_guest_is_linked_to_is_asked_for(
    tmp_path: Path, commands: ExitStack
) -> None:
    disk, path, file = tmp_path / "disk", tmp_path / "ctl", tmp_path / "file"
    disk.write_bytes(bytes(4096))
    options = ["--console", "virtio", "--disk", f"{disk},ro", "--vsock", "cid=7"]
    guest = commands.enter_context(Command("run", *options, "--control", f"unix:{path}"))
    guest.expect(PROMPT)
    assert ctl(path, "snapshot", str(file)).returncode == 0
    done = avmm("restore", str(file))
    assert (done.returncode, "the guest has 1 disk" in done.stderr) == (2, True)
    done = avmm("restore", str(file), "--disk", f"{disk},ro")
    assert (done.returncode, "socket device, with CID 7" in done.stderr) == (2, True)
    links = ["--disk", f"{disk},ro", "--vsock", "cid=8"]
    done = avmm("restore", str(file), *links, given="echo by hvc0\nexit 5\n")
    assert (done.returncode, "\nby hvc0" in done.stdout) == (5, True)


def test_closing_the_connection_gives_a_migration_up(
    guest: Command, raw: Raw, tmp_path: Path, commands: ExitStack
) -> None:
    guest.say("burn 20 60\r")
    guest.expect("Ctrl-C stops")
    peer, target = receiver(commands, f"unix:{tmp_path / 'move'}")
    raw.socket.sendall(
        json.dumps({"command": "migrate", "target": target, "bandwidth": 1 << 20}).encode() + b"\n"
    )
    assert raw.read()["event"] == "progress"
    path = tmp_path / "ctl"
    assert status(path)["state"] == "migrating"
    for command in (["pause"], ["migrate", target], ["snapshot", str(tmp_path / "file")]):
        done = ctl(path, *command)
        assert (done.returncode, "migrated" in done.stderr) == (125, True)
    raw.socket.shutdown(socket.SHUT_WR)
    while "event" in (answer := raw.read()):
        pass
    assert answer["kind"] == "Cancelled"
    assert status(path)["state"] == "running"
    assert peer.wait() == 125
    guest.say("\x03")
    guest.expect(PROMPT)


def test_a_client_that_is_killed_gives_its_migration_up(
    guest: Command, tmp_path: Path, commands: ExitStack
) -> None:
    guest.say("burn 20 60\r")
    guest.expect("Ctrl-C stops")
    peer, target = receiver(commands, f"unix:{tmp_path / 'move'}")
    path = tmp_path / "ctl"
    client = commands.enter_context(
        Command("ctl", str(path), "migrate", target, "--bandwidth", "1M")
    )
    client.expect_error("round 1")
    os.kill(client.pid, signal.SIGKILL)
    assert peer.wait() == 125
    guest.say("\x03")
    guest.expect(PROMPT)
    assert status(path)["state"] == "running"


def test_the_help_of_each_command() -> None:
    for command in ("run", "receive", "restore"):
        text = avmm(command, "--help").stdout
        assert "--control unix:PATH" in text and "--console" in text
    text = subprocess.run(
        [sys.executable, "-m", "avmm", "ctl", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in ("status", "pause", "resume", "snapshot", "migrate", "settle", "stop"):
        assert f"\n  {command}  " in text
