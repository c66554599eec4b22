"""Guests that move from one `avmm` process to another."""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pexpect
import pytest
import trustme
from support.commands import AVMM, PROMPT, Command, avmm, ctl, receiver, status

from avmm.disks import RawDisk
from avmm.transfer.protocol import Commit, Destination, Offer, State

pytestmark = pytest.mark.usefixtures("kvm")


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, list[str]]:
    """TLS options of a source and a destination, and of somebody else."""
    options = {}
    authority, other = trustme.CA(), trustme.CA()
    for name, signer in (("source", authority), ("destination", authority), ("other", other)):
        certificate = signer.issue_cert("127.0.0.1")
        cert, key, ca = (tmp_path / f"{name}.{part}" for part in ("cert", "key", "ca"))
        certificate.cert_chain_pems[0].write_to_path(cert)
        certificate.private_key_pem.write_to_path(key)
        authority.cert_pem.write_to_path(ca)
        options[name] = [
            *("--tls-cert", str(cert)),
            *("--tls-key", str(key)),
            *("--tls-ca", str(ca)),
        ]
    return options


@pytest.fixture(params=["unix", "tcp", "tls"])
def line(
    request: pytest.FixtureRequest, tmp_path: Path, certificates: dict[str, list[str]]
) -> tuple[str, list[str], list[str]]:
    """Where a guest is received, and the source's and the destination's options for it."""
    if request.param == "unix":
        return f"unix:{tmp_path / 'move'}", [], []
    if request.param == "tcp":
        return "tcp:127.0.0.1:0", [], []
    return "tcp:127.0.0.1:0", certificates["source"], certificates["destination"]


def spawn(commands: ExitStack, *arguments: str) -> pexpect.spawn[str]:
    child = pexpect.spawn(AVMM[0], [*AVMM[1:], *arguments], timeout=30, encoding="utf-8")
    child.delaybeforesend = None
    commands.callback(child.close, force=True)
    return child


@pytest.mark.parametrize("console", ["stdio", "virtio"])
def test_a_guest_moves_while_somebody_types(
    tmp_path: Path, commands: ExitStack, line: tuple[str, list[str], list[str]], console: str
) -> None:
    """What both terminals have shown is one conversation; what did not go over was named."""
    at, of_source, of_destination = line
    path = tmp_path / "ctl"
    source = spawn(commands, "run", "--console", console, "--control", f"unix:{path}")
    source.expect_exact(PROMPT)
    destination = spawn(commands, "receive", at, *of_destination)
    destination.expect(r"waiting at (\S+) for a guest\r\n")
    mover = commands.enter_context(
        Command("ctl", str(path), "migrate", destination.match[1], *of_source)
    )
    shown, number = "", 0
    while "the guest has moved" not in shown:
        number += 1
        source.send(f"echo {number}\r")
        # It goes before the answer, in the midst of it, or after the prompt.
        source.expect([f"\n{number}\r\n{PROMPT}", r"avmm: the guest has moved to \S+\r\n"])
        shown += source.before + source.after
    source.expect(pexpect.EOF)
    source.close()
    assert source.exitstatus == 0
    shown = shown[: shown.index("avmm: the guest has moved")]
    unsent = re.search(r"had moved before it got this input: (.*)\r\n", source.before)
    destination.expect_exact("on its way here\r\n")
    destination.send((ast.literal_eval(unsent[1]) if unsent else "") + "echo the end\r")
    destination.expect_exact("\nthe end\r\n" + PROMPT)
    asked = [text for n in range(1, number + 1) for text in (f"{PROMPT}echo {n}", f"{n}")]
    expected = [asked[0].removeprefix(PROMPT), *asked[1:], f"{PROMPT}echo the end"]
    # Where the guest was caught within a line, the source ended that line for its own message.
    assert expected in [
        [text for text in (first + destination.before).replace("\r", "").split("\n") if text]
        for first in (shown, shown.removesuffix("\r\n"))
    ]
    assert mover.wait() == 0
    assert mover.said.startswith("the guest has moved to ")
    destination.send("exit 7\r")
    destination.expect(pexpect.EOF)
    destination.close()
    assert destination.exitstatus == 7


def test_the_source_says_where_to_and_ends_with_0(
    guest: Command, tmp_path: Path, commands: ExitStack
) -> None:
    peer, target = receiver(commands, "tcp:127.0.0.1:0", "--control", f"unix:{tmp_path / 'ctl2'}")
    done = ctl(tmp_path / "ctl", "migrate", target, "--downtime", "0.2", "--deadline", "10")
    assert done.returncode == 0
    assert done.stdout.startswith(f"the guest has moved to {target}: ")
    assert done.stderr.startswith("round 1: 0 of ")
    assert guest.wait() == 0
    assert guest.told == f"avmm: the guest has moved to {target}\n"
    assert status(tmp_path / "ctl2")["state"] == "running"
    peer.say("exit 6\n")
    assert peer.wait() == 6


def test_a_guest_goes_there_and_back(guest: Command, tmp_path: Path, commands: ExitStack) -> None:
    guest.say("poke 0x200000 0x1234\r")
    guest.expect(PROMPT)
    at = tmp_path / "ctl"
    for number in range(4):
        control = tmp_path / f"ctl{number}"
        peer, target = receiver(
            commands, f"unix:{tmp_path / 'move'}", "--control", f"unix:{control}"
        )
        assert ctl(at, "migrate", target).returncode == 0
        at = control
    peer.say("peek 0x200000\rexit 3\r")
    assert peer.wait() == 3
    assert "1234" in peer.said


def test_ctrl_c_gives_it_up_and_the_guest_stays(
    guest: Command, tmp_path: Path, commands: ExitStack
) -> None:
    guest.say("burn 20 60\r")
    guest.expect("Ctrl-C stops")
    peer, target = receiver(commands, f"unix:{tmp_path / 'move'}")
    path = tmp_path / "ctl"
    client = spawn(commands, "ctl", str(path), "migrate", target, "--bandwidth", "2M")
    client.expect(r"round 1 +\d+% \|.*\| [1-9][\d,]*/[\d,]+ pages, .* MiB/s")
    client.sendintr()
    client.expect_exact("avmm: the migration was cancelled, and the guest stays here")
    client.expect(pexpect.EOF)
    client.close()
    assert client.exitstatus == 128 + signal.SIGINT
    assert peer.wait() == 125
    # If it was cancelled when a frame had just left, the line is cut without a word.
    ways = ("gave up: the migration was cancelled", "cut in a frame", "the line was cut\n")
    assert any(way in peer.told for way in ways)
    assert status(path)["state"] == "running"
    guest.say("\x03echo still here\r")
    guest.expect("\nstill here\r\n")


@pytest.mark.parametrize(
    ("options", "theirs", "code", "why"),
    [
        ([], ["--most-memory", "32M"], 2, "has 67108864 bytes of RAM; expected at most 33554432"),
        (["--disk", "{}/disk"], [], 2, "the guest has 1 disk ('disk')"),
        (["--disk", "{}/disk,ro"], ["--disk", "{}/disk"], 2, "the guest's 'disk' is read-only"),
        (
            ["--disk", "{}/disk"],
            ["--disk", "{}/small"],
            2,
            "has 4096 bytes, but the guest's disk has 8192",
        ),
        (["--vsock", "cid=9"], [], 2, "socket device, with CID 9"),
        ([], ["--console", "virtio"], 2, "the guest has no virtio console"),
    ],
)
def test_a_guest_that_cannot_be_there_is_refused_and_runs_on_here(
    tmp_path: Path,
    commands: ExitStack,
    options: list[str],
    theirs: list[str],
    code: int,
    why: str,
) -> None:
    (tmp_path / "disk").write_bytes(bytes(8192))
    (tmp_path / "small").write_bytes(bytes(4096))
    path = tmp_path / "ctl"
    ours = [option.format(tmp_path) for option in options]
    guest = commands.enter_context(Command("run", "--control", f"unix:{path}", *ours))
    guest.expect(PROMPT)
    there = [option.format(tmp_path) for option in theirs]
    peer, target = receiver(commands, f"unix:{tmp_path / 'move'}", *there)
    done = ctl(path, "migrate", target)
    assert (done.returncode, done.stdout) == (125, "")
    assert why in done.stderr
    assert peer.wait() == code
    assert why in peer.told
    guest.say("echo still here\r")
    guest.expect("\nstill here\r\n")


def test_a_paused_guest_is_not_moved(guest: Command, tmp_path: Path) -> None:
    """It would run there."""
    assert ctl(tmp_path / "ctl", "pause").returncode == 0
    done = ctl(tmp_path / "ctl", "migrate", f"unix:{tmp_path / 'nobody'}")
    assert (done.returncode, "paused by control (1)" in done.stderr) == (125, True)


def test_lines_that_cannot_be(
    guest: Command, tmp_path: Path, certificates: dict[str, list[str]]
) -> None:
    path = tmp_path / "ctl"
    for target, options, code, why in [
        (f"unix:{tmp_path / 'nobody'}", [], 125, "nobody: No such file or directory"),
        ("tcp:127.0.0.1:1", [], 125, "tcp:127.0.0.1:1: "),
        ("tcp:127.0.0.1", [], 2, "expected unix:PATH or tcp:HOST:PORT"),
        ("udp:127.0.0.1:1", [], 2, "expected unix:PATH or tcp:HOST:PORT"),
        ("tcp:127.0.0.1:70000", [], 2, "expected unix:PATH or tcp:HOST:PORT"),
        ("unix:x", certificates["source"], 2, "TLS is for tcp:HOST:PORT"),
        ("tcp:127.0.0.1:1", certificates["source"][:2], 2, "expected all three"),
        ("tcp:127.0.0.1:1", ["--bandwidth", "fast"], 2, "'fast' is not a size"),
        ("tcp:127.0.0.1:1", ["--downtime", "-1"], 2, "-1: expected a number of seconds above 0"),
    ]:
        done = ctl(path, "migrate", target, *options)
        assert (done.returncode, why in done.stderr) == (code, True), done.stderr
    done = avmm("receive", f"unix:{tmp_path}")
    assert (done.returncode, "Address already in use" in done.stderr) == (2, True)
    done = avmm("receive", "tcp:192.0.2.1:4000")
    assert (done.returncode, "Cannot assign requested address" in done.stderr) == (2, True)
    bad = ["--tls-cert", str(path), "--tls-key", str(path), "--tls-ca", str(path)]
    done = avmm("receive", "tcp:127.0.0.1:0", *bad)
    assert (done.returncode, "TLS: " in done.stderr) == (2, True)
    done = avmm("receive", f"unix:{tmp_path / 'move'}", "--console", f"file:{tmp_path}/no/file")
    assert (done.returncode, "no/file" in done.stderr) == (2, True)
    assert status(path)["state"] == "running"


def test_both_sides_must_show_a_certificate_that_the_other_knows(
    guest: Command, tmp_path: Path, commands: ExitStack, certificates: dict[str, list[str]]
) -> None:
    path = tmp_path / "ctl"
    peer, target = receiver(commands, "tcp:127.0.0.1:0", *certificates["destination"])
    done = ctl(path, "migrate", target, *certificates["other"])
    assert done.returncode == 125
    assert "does not accept this side's certificate: its --tls-ca has not signed" in done.stderr
    peer.expect_error("the other side's certificate")
    done = ctl(path, "migrate", target)  # no TLS at all
    assert (done.returncode, "this side wants TLS: give the source --tls" in done.stderr) == (
        125,
        True,
    )
    peer.expect_error("it does not speak TLS")
    strict, named = receiver(
        commands, "tcp:127.0.0.1:0", *certificates["destination"], "--tls-peer", "source.example"
    )
    done = ctl(path, "migrate", named, *certificates["source"])
    assert (done.returncode, "is not for 'source.example'" in done.stderr) == (125, True)
    strict.expect_error("its certificate is not for 'source.example' (--tls-peer)")
    plain, door = receiver(commands, "tcp:127.0.0.1:0")
    done = ctl(path, "migrate", door, *certificates["source"])
    assert (done.returncode, "it may not have been given --tls-cert" in done.stderr) == (125, True)
    plain.expect_error("it speaks TLS, and this side was given no --tls-cert")
    _, elsewhere = receiver(commands, "tcp:127.0.0.1:0", *certificates["other"])
    done = ctl(path, "migrate", elsewhere, *certificates["source"])
    assert (done.returncode, "certificate" in done.stderr) == (125, True)
    assert ctl(path, "migrate", target, *certificates["source"]).returncode == 0
    peer.say("exit 2\n")
    assert peer.wait() == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_waits_can_be_ended(tmp_path: Path, commands: ExitStack, number: int) -> None:
    peer, _ = receiver(commands, f"unix:{tmp_path / 'move'}")
    assert (tmp_path / "move").stat().st_mode & 0o077 == 0
    os.kill(peer.pid, number)
    assert peer.wait() == 128 + number
    assert not (tmp_path / "move").exists()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_callers_that_are_no_source_do_not_use_the_receiver_up(
    guest: Command, tmp_path: Path, commands: ExitStack, kind: str
) -> None:
    """A port scan, a health check, an HTTP client, half a HELLO, somebody silent: the guest comes
    nevertheless, while some of them still hold their connections."""
    at = f"unix:{tmp_path / 'move'}" if kind == "unix" else "tcp:127.0.0.1:0"
    destination, target = receiver(commands, at)
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    host, _, port = target.removeprefix("tcp:").rpartition(":")
    for said in (None, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x02" * 16, b"\x01\0\0", b""):
        caller = commands.enter_context(socket.socket(family))
        caller.connect(target.removeprefix("unix:") if kind == "unix" else (host, int(port)))
        if said is None:
            caller.close()
        else:
            caller.sendall(said)
    moved = ctl(tmp_path / "ctl", "migrate", target)
    assert moved.returncode == 0, moved.stderr
    assert guest.wait() == 0
    destination.say("exit 5\n")
    assert destination.wait() == 5
    assert "it did not begin as a guest's source does" in destination.told


def test_a_receiver_that_waits_is_asked_and_stopped(
    guest: Command, tmp_path: Path, commands: ExitStack
) -> None:
    there = tmp_path / "there"
    at = f"unix:{tmp_path / 'move'}"
    destination, target = receiver(commands, at, "--control", f"unix:{there}")
    assert status(there)["state"] == f"waiting at {target}"
    assert ctl(there, "status").stdout == f"waiting at {target}: process {destination.pid}\n"
    for verb in (
        ["pause"],
        ["resume"],
        ["snapshot", "x"],
        ["migrate", "unix:x"],
        ["settle", "here"],
    ):
        refused = ctl(there, *verb)
        assert refused.returncode == 125, verb
        assert f"there is no guest yet: this process waits for one at {target}" in refused.stderr
    assert ctl(there, "stop").returncode == 0
    assert destination.wait() == 0
    assert "stopped before a guest came" in destination.told
    assert not there.exists()
    # A guest that comes is steered through the same socket.
    destination, target = receiver(commands, at, "--control", f"unix:{there}")
    assert status(there)["cpus"] == 0
    assert ctl(tmp_path / "ctl", "migrate", target).returncode == 0
    assert status(there)["state"] == "running"
    assert guest.wait() == 0
    assert ctl(there, "stop").returncode == 0
    assert destination.wait() == 0


def test_a_report_is_drawn(guest: Command, tmp_path: Path, commands: ExitStack) -> None:
    _, target = receiver(commands, f"unix:{tmp_path / 'move'}")
    picture = tmp_path / "report.png"
    done = ctl(tmp_path / "ctl", "migrate", target, "--report", str(picture))
    assert (done.returncode, done.stdout[:23]) == (0, "the guest has moved to ")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_a_report_is_drawn_of_what_was_begun_and_of_nothing_else(
    tmp_path: Path, commands: ExitStack
) -> None:
    disk, other = tmp_path / "disk", tmp_path / "other"
    disk.write_bytes(bytes(8192))
    other.write_bytes(bytes(8192))
    picture, path = tmp_path / "report.png", tmp_path / "ctl"
    guest = commands.enter_context(
        Command("run", "--control", f"unix:{path}", "--disk", str(disk))
    )
    guest.expect(PROMPT)
    for options, is_drawn in [(["--most-memory", "1M"], False), (["--disk", str(other)], True)]:
        _, target = receiver(commands, f"unix:{tmp_path / 'move'}", *options)
        with RawDisk(other):  # in use, which shows when the guest is to be taken over
            done = ctl(path, "migrate", target, "--report", str(picture))
        assert done.returncode == 125
        assert picture.exists() is is_drawn
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_report_that_cannot_be_is_said_before_anything_begins(
    guest: Command, tmp_path: Path, commands: ExitStack
) -> None:
    path, target = tmp_path / "ctl", f"unix:{tmp_path / 'nobody'}"
    for report, why in [
        ("no/report.png", "No such file"),
        ("report.jpg", "expected a name that ends"),
    ]:
        done = ctl(path, "migrate", target, "--report", str(tmp_path / report))
        assert (done.returncode, why in done.stderr) == (2, True)
    without = "import sys; sys.modules['matplotlib'] = None; from avmm.cli import main; main()"
    arguments = ["ctl", str(path), "migrate", target, "--report", str(tmp_path / "report.png")]
    done = subprocess.run(
        [sys.executable, "-c", without, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "pip install 'avmm[report]'" in done.stderr) == (2, True)
    assert not (tmp_path / "report.png").exists()


class Forgetful:
    """A destination that takes a guest, up to its COMMIT, and says no more."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.has_committed = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        line, _ = self._listener.accept()
        line.settimeout(20)
        with line:
            side = Destination()
            while not self.has_committed:
                taken = side.next()
                if taken is None:
                    side.feed(line.recv(1 << 20))
                    continue
                event, answer = taken
                if isinstance(event, State):
                    side.acquire()
                say: dict[type, Any] = {Offer: side.accept, State: side.ready}
                if type(event) in say:
                    answer = say[type(event)]()
                line.sendall(b"".join(answer))
                self.has_committed = isinstance(event, Commit)

    def close(self) -> None:
        self._thread.join()
        self._listener.close()


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_hand_over_without_an_answer_is_the_operators_to_settle(
    guest: Command, tmp_path: Path, where: str
) -> None:
    path, target = tmp_path / "ctl", f"unix:{tmp_path / 'move'}"
    peer = Forgetful(tmp_path / "move")
    done = ctl(path, "migrate", target)
    peer.close()
    assert peer.has_committed
    assert (done.returncode, done.stdout) == (3, "")
    assert "the guest runs at the destination, or nowhere" in done.stderr
    assert f"avmm ctl {path} settle here" in done.stderr
    told = status(path)
    assert (told["state"], "or nowhere" in told["unsettled"]) == ("unsettled", True)
    for command in (["pause"], ["migrate", target]):
        assert ctl(path, *command).returncode == 125
    guest.say("echo later\r")
    assert ctl(path, "settle", where).returncode == 0
    if where == "here":
        guest.expect("\nlater\r\n" + PROMPT)
        assert status(path)["state"] == "running"
        assert ctl(path, "settle", where).returncode == 125
    else:
        assert guest.wait() == 0
        assert f"avmm: the guest has moved to {target}\n" in guest.told
        assert "later" not in guest.said
