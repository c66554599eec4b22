"""The command as people use it: in pipes, on a terminal, with things that cannot be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pexpect
import pytest
from support import engines
from support.assembler import assemble

from avmm import engine, guests

pytestmark = pytest.mark.usefixtures("kvm")

AVMM = [sys.executable, "-m", "avmm"]
PROMPT = "avmm> "


def avmm(
    *arguments: str, given: str = "", env: Mapping[str, str] | None = None, timeout: float = 55
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AVMM, *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | (env or {}),
    )


def measured(*arguments: str, env: Mapping[str, str] | None = None, timeout: float = 55) -> Any:
    """What a command that must succeed prints as JSON."""
    done = avmm(*arguments, "--json", env=env, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_pipe_talks_to_the_guest_and_gets_its_status() -> None:
    done = avmm("run", given="echo hi\nexit 3\n")
    assert done.returncode == 3
    assert "\nhi\n" in done.stdout.replace("\r", "")


def test_the_end_of_a_pipe_is_the_end_of_the_guests_input() -> None:
    done = avmm("run", given="echo last words\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nlast words\n" in done.stdout.replace("\r", "")


def test_nothing_of_a_long_pipe_is_lost_either_way() -> None:
    lines = [f"echo line {number} of many" for number in range(300)]
    done = avmm("run", given="\n".join([*lines, "exit 0\n"]))
    said = [line for line in done.stdout.replace("\r", "").splitlines() if line.startswith("line")]
    assert said == [line.removeprefix("echo ") for line in lines]


def test_input_may_be_a_file_and_output_too(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("echo from a file\nexit 5\n")
    with (tmp_path / "in").open() as source, (tmp_path / "out").open("w") as sink:
        done = subprocess.run([*AVMM, "run"], stdin=source, stdout=sink, timeout=30, check=False)
    assert done.returncode == 5
    assert "\nfrom a file" in (tmp_path / "out").read_text().replace("\r", "")


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_the_virtio_console_takes_the_same_ways(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").write_text("count 2000\nexit 3\n")
    run = [*AVMM, "run", "--console", "virtio"]
    with (tmp_path / "in").open() as source, (tmp_path / "out").open("w") as sink:
        target = sink if kind == "file" else subprocess.PIPE
        done = subprocess.run(run, stdin=source, stdout=target, text=True, timeout=30, check=False)
    said = (done.stdout or (tmp_path / "out").read_text()).replace("\r", "").splitlines()
    assert done.returncode == 3
    assert [line for line in said if line.isdigit()] == [str(n) for n in range(1, 2001)]


def test_a_reader_that_goes_away_ends_it() -> None:
    process = subprocess.Popen(
        [*AVMM, "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"count 1000000\n")
    process.stdin.flush()
    process.stdout.read(100)
    process.stdout.close()
    assert process.wait(timeout=20) == 128 + signal.SIGPIPE
    process.stdin.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


def test_a_console_in_a_file_has_all_that_the_guest_printed(tmp_path: Path) -> None:
    out = tmp_path / "console"
    exits = [str(guests.path("exits")), "--cmdline", "count=3"]
    done = avmm("run", *exits, "--console", f"file:{out}")
    assert (done.returncode, done.stdout) == (0, "")
    assert "exits kind=pio" in out.read_text()


def test_a_console_file_on_a_full_disk_does_not_end_the_guest(
    full_up_to: Callable[[int], Path],
) -> None:
    out = full_up_to(0) / "console"
    exits = [str(guests.path("exits")), "--cmdline", "count=3"]
    done = avmm("run", *exits, "--console", f"file:{out}")
    assert (done.returncode, done.stdout) == (0, "")
    assert f"console file {out}: No space left on device; the guest runs on" in done.stderr


@pytest.fixture
def terminal() -> Iterator[pexpect.spawn]:
    child = pexpect.spawn(AVMM[0], [*AVMM[1:], "run"], timeout=20, encoding="utf-8", echo=True)
    yield child
    child.close(force=True)


def test_a_person_converses_with_the_guest(terminal: pexpect.spawn) -> None:
    terminal.expect_exact(PROMPT)
    terminal.send("ecko\b\b\bcho hello\r")
    terminal.expect_exact("hello\r\n" + PROMPT)
    terminal.send("exit 7\r")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 7


def test_the_escape_gives_help_pauses_and_quits(terminal: pexpect.spawn) -> None:
    terminal.expect_exact(PROMPT)
    terminal.send("\x01h")
    terminal.expect_exact("Ctrl-A x")
    terminal.send("\x01p")
    terminal.expect_exact("paused")
    terminal.send("echo later\r")
    terminal.send("\x01p")
    terminal.expect_exact("running")
    terminal.expect_exact("later\r\n" + PROMPT)
    terminal.send("\x01x")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


@pytest.mark.parametrize("end", ["exit", "quit", "SIGTERM", "SIGINT", "crash", "paused"])
def test_the_terminal_is_put_back_whatever_happens(end: str) -> None:
    """The shell that started avmm has the terminal's settings back, and says so."""
    near, far = os.openpty()
    before = termios.tcgetattr(far)
    child = subprocess.Popen([*AVMM, "run"], stdin=far, stdout=far, stderr=far)
    try:
        _read_until(near, PROMPT)
        assert termios.tcgetattr(far)[3] != before[3]
        if end == "exit":
            os.write(near, b"exit 0\r")
        elif end == "quit":
            os.write(near, b"\x01x")
        elif end == "crash":
            os.write(near, b"crash\r")
        elif end == "paused":
            os.write(near, b"\x01p")
            _read_until(near, "paused")
            child.send_signal(signal.SIGTERM)
        else:
            child.send_signal(getattr(signal, end))
        child.wait(timeout=20)
        assert termios.tcgetattr(far) == before
    finally:
        child.kill()
        child.wait()
        os.close(near)
        os.close(far)


def _read_until(fd: int, text: str) -> None:
    said = ""
    while text not in said:
        said += os.read(fd, 4096).decode()


def test_a_console_on_a_unix_socket_serves_one_client_after_another(tmp_path: Path) -> None:
    path = tmp_path / "console"
    process = subprocess.Popen([*AVMM, "run", "--console", f"unix:{path}"])
    try:
        with _connect(path) as client:
            _converse(client, PROMPT, "echo one\r", "one\r\n" + PROMPT)
        assert path.stat().st_mode & 0o077 == 0
        with _connect(path) as client:
            _converse(client, "", "echo two\r", "two\r\n" + PROMPT)
            client.sendall(b"exit 4\r")
            assert process.wait(timeout=20) == 4
        assert not path.exists()
    finally:
        process.kill()
        process.wait()


def _connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    while True:
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            os.sched_yield()
            continue
        return client


def _converse(client: socket.socket, before: str, say: str, after: str) -> None:
    heard = ""
    while before not in heard:
        heard += client.recv(4096).decode()
    client.sendall(say.encode())
    heard = ""
    while after not in heard:
        heard += client.recv(4096).decode()


def test_a_console_on_a_pty(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*AVMM, "run", "--console", "pty"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        path = process.stderr.readline().split()[-1]
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        _read_until(fd, PROMPT)
        os.write(fd, b"exit 6\r")
        assert process.wait(timeout=20) == 6
        os.close(fd)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_toml_file_holds_the_same_settings(tmp_path: Path) -> None:
    (tmp_path / "guest.bin").write_bytes(assemble("mov al, 4; out 0x55, al; hlt", 16, 0x8000))
    (tmp_path / "guest.toml").write_text(
        'kernel = "guest.bin"\nflat = "real@0x8000"\nmemory = "4M"\ndebug-exit = 0x55\n'
    )
    assert avmm("run", "--config", str(tmp_path / "guest.toml")).returncode == 4 << 1 | 1


def test_options_win_over_the_toml_file(tmp_path: Path) -> None:
    (tmp_path / "guest.toml").write_text('memory = "32M"\n')
    done = avmm("run", "--config", str(tmp_path / "guest.toml"), "--memory", "16M", given="exit\n")
    assert "16 MiB of memory" in done.stdout


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "bad.toml").write_text("memory =")
    (tmp_path / "unknown.toml").write_text("memroy = '64M'\n")
    (tmp_path / "real.bin").write_bytes(b"\xf4" * 8192)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/missing"], "No such file"),
        (["{}/empty"], "empty"),
        (["{}/text"], "looks like"),
        (["{}"], "directory"),
        (["--initrd", "{}/missing"], "No such file"),
        (["--memory", "0"], "avmm: --memory '0': expected a positive multiple of 4096"),
        (["--memory", "64"], "--memory '64': expected a positive multiple of 4096 bytes; did you"),
        (["--memory", "4096"], "at least 1 MiB for this image; did you mean '4096M'?"),
        (["--memory", "lots"], "'lots' is not a size"),
        (["--memory", "900T"], "this host has"),
        (["--memory", "1M", "--flat", "real@0xff000", "{}/real.bin"], "real.bin"),
        (["--cpus", "0"], "cpus 0"),
        (["--cpus", "5000"], "cpus 5000"),
        (["--cpus", "two"], "avmm: --cpus 'two': expected a whole number, 1 or more"),
        (["--console", "printer"], "console 'printer': expected stdio, pty"),
        (["--console", "virtio:printer"], "console 'virtio:printer': expected stdio, pty"),
        (["--console", "file:{}/no/such"], "no/such"),
        (["--debug-exit", "x"], "--debug-exit 'x': expected a port from 0 to 0xffff, or 'none'"),
        (["--debug-exit", "0x3f8"], "overlaps Serial"),
        (["--debug-exit", "0x10000"], "--debug-exit 65536: expected a port"),
        (["--rom", "x"], "--rom 'x': expected ADDRESS=PATH"),
        (["--disk", "a,fast"], "disk a: unknown option 'fast'"),
        (["--flat", "real@0"], "flat: expected a kernel"),
        (["--flat", "real", "{}/real.bin"], "flat 'real': expected MODE@ADDRESS"),
        (["--flat", "fast@0", "{}/real.bin"], "flat 'fast@0'"),
        (["--unclaimed", "loud"], "'loud' is not one of"),
        (["--config", "{}/missing.toml"], "No such file"),
        (["--config", "{}/bad.toml"], "not TOML"),
        (["--config", "{}/unknown.toml"], "unknown key 'memroy'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_what_cannot_be_is_said_and_ends_with_2(
    files: Path, arguments: list[str], message: str
) -> None:
    done = avmm("run", *(argument.format(files) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_vcpu_that_cannot_go_on_is_reported_and_ends_with_125(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(assemble(f"mov eax, {0xC800_0000}; jmp eax", 32, 0x100000))
    done = avmm("run", "--flat", "protected@0x100000", str(tmp_path / "bad"))
    assert done.returncode == 125
    assert "KVM_EXIT_INTERNAL_ERROR" in done.stderr
    assert "rip=00000000c8000000" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_instruction_that_is_refused_is_named_and_what_that_means(tmp_path: Path) -> None:
    code = "mov rbx, 0x108000; cpuid; mov rbx, 0x108000; lock cmpxchg16b [rbx]; mov dx, 0xf8;"
    (tmp_path / "kernel").write_bytes(assemble(code + "out dx, eax; hlt", 64, 0x100000))
    done = avmm("run", "--flat", "long@0x100000", str(tmp_path / "kernel"))
    if done.returncode != 125:
        pytest.skip("this KVM runs ring 0 natively and refuses nothing")
    assert "KVM_EXIT_INTERNAL_ERROR" in done.stderr
    assert "KVM cannot emulate the instruction f0 48 0f c7 0b" in done.stderr
    assert "instruction: lock cmpxchg16b xmmword ptr [rbx]" in done.stderr
    assert "rip=0000000000100" in done.stderr
    assert "A KVM that interprets ring 0 (see `avmm doctor`)" in done.stderr


def test_a_guest_that_resets_is_reported(tmp_path: Path) -> None:
    done = avmm("run", given="crash\n")
    assert (done.returncode, done.stderr[:37]) == (134, "avmm: the guest ended: triple fault, ")


def test_doctor_speaks_to_people_and_to_programs() -> None:
    done = avmm("doctor")
    assert done.returncode == 0
    assert "avmm works on this host." in done.stdout
    report = measured("doctor")
    assert report["soft"]["guest_ran"] and report["soft"]["runs_kernels"]
    assert not report["problems"]
    if report["kvm"]["usable"]:
        assert report["capabilities"]["KVM_CAP_IMMEDIATE_EXIT"] == 1
        assert report["kvm"]["guest_ran"]
    assert report["auto"] == {"guest": engines.NAME, "kernel": engines.NAME}  # by AVMM_ENGINE


def test_bench_exits_gives_a_ratio_for_each_case() -> None:
    rows = measured("bench", "exits", "--count", "50", "--rounds", "1")
    assert len({row["case"] for row in rows}) == len(rows) == 18
    for row in rows:
        assert set(row) == {"case", "us", "raw_us", "ratio"}
        assert row["ratio"] == pytest.approx(row["us"] / row["raw_us"])


def test_help_and_version() -> None:
    assert "Run small KVM guests" in avmm("--help").stdout
    assert "--console" in avmm("run", "--help").stdout
    assert avmm("--version").stdout.startswith("avmm, version ")


def test_doctor_shows_what_an_uncompleted_exit_costs_and_that_the_drain_is_right() -> None:
    findings = {row["access"]: row for row in measured("doctor", "--completion")}
    hypercall = findings.pop("hypercall")  # a KVM that interprets ring 0 cannot
    assert (hypercall["drained"] == "right") != ("did not return" in hypercall["error"])
    xens = findings.pop("Xen hypercall")  # nor can one without CONFIG_KVM_XEN
    impossible = "does not" in xens["error"] or "KVM_CAP_XEN_HVM" in xens["error"]
    assert (xens["drained"] == "right") != impossible
    assert all(row["drained"] == "right" for row in findings.values())
    assert "repeated: port read" in findings["in al, imm8"]["uncompleted"]
    other = "repeated" if engines.NAME == engine.SOFT else "lost"
    assert f"{other}: MMIO write" in findings["MMIO write across a page"]["uncompleted"]
    assert findings["MMIO read across a page"]["exits_until_drained"] == 2
    table = avmm("doctor", "--completion").stdout.splitlines()
    assert all(len(line) <= 110 for line in table)
    across = next(line for line in table if line.startswith("MMIO read across a page"))
    assert across.endswith("right, 2 exits")


def test_bench_many_gives_a_ratio_for_each_case() -> None:
    options = ("--count", "50", "--rounds", "1", "--guests", "2", "--idle", "1")
    rows = measured("bench", "many", *options)
    cases = [row["case"] for row in rows]
    assert cases == [
        "2 guests, pio ring0 at once",
        "2 guests, pio ring0 in a task",
        "2 guests, mmio ring3 at once",
        "2 guests, mmio ring3 in a task",
        "beside 1 idle ones, pio ring0 at once",
        "beside 1 idle ones, pio ring0 in a task",
    ]
    for row in rows:
        assert row["per_second"] > 0
        assert row["raw_per_second"] > 0
    printed = avmm("bench", "many", *options).stdout
    assert printed.splitlines()[0].split() == ["case", "exits/s", "raw", "×", "raw"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bench_all_has_each_case_with_its_spread(tmp_path: Path) -> None:
    options = ("--rounds", "2", "--exits", "50", "--idle", "2", "--clones", "2", "--pauses", "5")
    more = ("--requests", "20", "--memory", "16M", "--plot", str(tmp_path / "all.png"))
    rows = measured("bench", "all", *options, *more, timeout=280)
    assert {row["bench"] for row in rows} == {
        "exits", "many", "pause", "fork", "density", "start", "virtio", "snapshot", "migration",
    }  # fmt: skip
    for row in rows:
        if row["ratio"] is not None:
            assert row["least"] <= row["ratio"] <= row["most"]
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_bench_all_says_what_it_cannot_do(tmp_path: Path) -> None:
    done = avmm("bench", "all", "--json", "--markdown")
    assert (done.returncode, done.stderr) == (
        2,
        "avmm: --json and --markdown: expected one of them\n",
    )
    done = avmm("bench", "all", "--plot", str(tmp_path / "all.svg"))
    assert done.returncode == 2
    assert "expected a name that ends in .png" in done.stderr


def test_bench_start_gives_a_ratio() -> None:
    (row,) = measured("bench", "start", "--rounds", "1")
    assert row["case"] == "avmm run, to its prompt"
    assert row["ratio"] == pytest.approx(row["us"] / row["raw_us"])
    assert row["ratio"] > 1


def test_bench_density_compares_with_bare_vms() -> None:
    busy, memory, descriptors = measured("bench", "density", "--guests", "3")
    assert busy["unit"] == "% of a core"
    assert busy["baseline"] is None
    assert memory["ours"] > 0
    assert descriptors["ratio"] == pytest.approx(descriptors["ours"] / descriptors["baseline"])


def test_bench_fork_gives_a_ratio_for_one_and_for_many() -> None:
    rows = measured("bench", "fork", "--clones", "3", "--rounds", "1")
    assert [row["case"] for row in rows] == ["clone", "fork_many(3)"]
    for row in rows:
        assert row["us"] > 0
        assert row["ratio"] == pytest.approx(row["us"] / row["raw_us"])


def test_bench_pause_gives_a_ratio_for_each_number_of_vcpus() -> None:
    rows = measured("bench", "pause", "--count", "10", "--rounds", "1")
    assert [row["case"] for row in rows] == ["1 vCPU", "2 vCPUs", "4 vCPUs", "16 vCPUs"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["us"] / row["raw_us"])


def test_a_pipe_that_ends_within_a_line_ends_the_line_first() -> None:
    done = avmm("run", given="echo hi")
    assert done.returncode == 0
    assert "\nhi\n" in done.stdout.replace("\r", "")


def test_help_can_be_asked_for_while_the_guest_prints(terminal: pexpect.spawn) -> None:
    terminal.expect_exact(PROMPT)
    last = 100_000 if engines.NAME == engine.SOFT else 10_000  # of some seconds
    terminal.send(f"count {last}\r")
    for _ in range(12):
        terminal.send("\x01h")
        terminal.expect_exact("Ctrl-A x   end the guest")
    terminal.expect_exact(f"\n{last}\r\n")
    terminal.send("exit 8\r")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 8


@pytest.mark.parametrize(
    ("redirection", "status"),
    [("<&-", 0), ("</dev/null", 0), ("</dev/null >/dev/full", 125), ("</dev/null >&-", 0)],
)
def test_standard_descriptors_may_be_closed_or_full(redirection: str, status: int) -> None:
    done = subprocess.run(
        f"{sys.executable} -m avmm run {redirection}",
        shell=True,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stderr


def test_console_sockets_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("x" * 120)):
        done = avmm("run", "--console", f"unix:{path}")
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr and "None" not in done.stderr


def test_ctrl_c_ends_a_piped_run_with_130() -> None:
    process = subprocess.Popen([*AVMM, "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 128 + signal.SIGINT
    process.stdin.close()
    process.stdout.close()


def test_toml_says_none_as_the_command_does(tmp_path: Path) -> None:
    (tmp_path / "guest.bin").write_bytes(
        assemble("mov al, 5; out 0xf4, al; mov dx, 0xf8; mov al, 9; out dx, al; hlt", 16, 0x8000)
    )
    toml = 'kernel = "guest.bin"\nflat = "real@0x8000"\nmemory = "4M"\ndebug-exit = "none"\n'
    (tmp_path / "guest.toml").write_text(toml)
    assert avmm("run", "--config", str(tmp_path / "guest.toml")).returncode == 9


def test_disks_that_cannot_be(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    for disk, why in [
        (f"{tmp_path}/none", "none: expected one to read and write: No such file"),
        (f"{image},rw", "image: unknown option 'rw'; expected ro, overlay or serial=NAME"),
        (f"{image},serial={'x' * 21}", "image: serial 'xxxxxxxxxxxxxxxxxxxxx': expected at most"),
    ]:
        done = avmm("run", "--disk", disk)
        assert done.returncode == 2
        assert why in done.stderr
    done = avmm("run", "--disk", str(image), "--disk", str(image))
    assert (done.returncode, "image: it is in use" in done.stderr) == (2, True)


def test_disks_beside_a_guest_that_knows_none(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    done = avmm("run", "--disk", f"{image},overlay", "--disk", f"{image},ro", given="exit 3\n")
    assert done.returncode == 3


def test_bench_virtio_compares_with_qemu() -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed")
    rows = measured("bench", "virtio", "--count", "20", "--rounds", "1")
    assert len({row["case"] for row in rows}) == len(rows) == 9
    assert all(row["ratio"] == pytest.approx(row["us"] / row["raw_us"]) for row in rows)
    assert all(row["per_second"] == pytest.approx(1e6 / row["us"]) for row in rows)


def test_bench_migration_compares_with_qemu() -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed")
    rows = measured("bench", "migration", "--memory", "16M", "--rounds", "1")
    written = rows.pop()
    assert written["case"] == "written, MiB/s"
    assert written["ratio"] == pytest.approx(
        written["mib_per_second"] / written["raw_mib_per_second"]
    )
    cases = [(guest, what) for guest in ("idle", "200 MiB/s") for what in ("total", "downtime")]
    assert [row["case"] for row in rows] == [", ".join(case) for case in cases]
    assert all(row["ratio"] == pytest.approx(row["us"] / row["raw_us"]) for row in rows)
    assert all(rows[at]["us"] > rows[at + 1]["us"] for at in (0, 2))


@pytest.mark.parametrize(
    ("what", "options", "count"),
    [("virtio", ("--count", "20"), 9), ("migration", ("--memory", "16M"), 5)],
)
def test_without_qemu_there_is_no_ratio(what: str, options: tuple[str, ...], count: int) -> None:
    path = {"PATH": str(Path(sys.executable).parent)}
    rows = measured("bench", what, "--rounds", "1", *options, env=path)
    assert len(rows) == count
    for row in rows:
        assert row["ratio"] is row.get("raw_us") is row.get("raw_mib_per_second") is None
        assert row.get("us", row.get("mib_per_second")) > 0
    if what == "migration":
        said = avmm("bench", what, "--rounds", "1", *options, env=path).stdout
        assert said.splitlines()[-1].split()[-2:] == ["-", "-"]


def test_bench_snapshot_compares_with_qemu_and_with_a_boot() -> None:
    options = ("--memory", "16M", "--rounds", "1", "--clones", "2")
    rows = measured("bench", "snapshot", *options)
    cases = ["restore", "restore, 8 x RAM", "clone", "clone 2, RSS in KiB"]
    if shutil.which("qemu-system-x86_64") is not None:
        cases = ["write, total", "write, downtime", *cases]
    assert [row["case"] for row in rows] == cases
    for row in rows:
        ours, raw = ("kib", "raw_kib") if "RSS" in row["case"] else ("us", "raw_us")
        assert set(row) == {"case", ours, raw, "ratio"}
        assert row["ratio"] == pytest.approx(row[ours] / row[raw])
