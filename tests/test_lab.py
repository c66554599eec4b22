"""The lab's own machinery, with a QEMU that is a shell script."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lab.__main__
import pytest
from lab import emulator, guest, initramfs, kernels, krunfw, machine, payload, plugin
from lab.cache import KEPT_SECONDS, LabError, artefact, root
from lab.debian import NEWER
from lab.machine import L1
from support.packages import RELEASE, deb, elf, entries

from avmm.image.packages import Package

pytestmark = pytest.mark.timeout(60)
Fake = Callable[[str], L1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "file").write_text(text) and None


# -- the cache -----------------------------------------------------------------------------


def test_what_is_built_is_kept_until_what_it_is_made_from_changes() -> None:
    built: list[int] = []

    def build(folder: Path) -> None:
        built.append(1)
        (folder / "file").write_text("x")

    first = artefact("thing", [1], build)
    assert artefact("thing", [1], build) == first
    assert built == [1]
    second = artefact("thing", [2], build)
    assert (built, second != first) == ([1, 1], True)
    assert first.exists(), "another clone may be using it"
    long_ago = time.time() - KEPT_SECONDS - 1
    os.utime(first, (long_ago, long_ago))
    artefact("thing", [3], build)
    assert not first.exists(), "what nobody has used for long is swept"
    assert second.exists()


def test_an_interrupted_build_leaves_nothing_that_looks_finished() -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artefact("thing", 1, interrupted)
    assert [path.name for path in root().iterdir()] == ["thing.lock"]
    assert (artefact("thing", 1, put("whole")) / "file").read_text() == "whole"


def test_what_a_killed_build_has_left_is_swept() -> None:
    partial = root() / "thing-partial"
    partial.mkdir(parents=True)
    (partial / "half").write_text("x")
    place = artefact("thing", 1, put("whole"))
    assert [path.name for path in place.iterdir()] == ["file"]
    assert not partial.exists()


def unused(made_from: object) -> Path:
    """An artefact that nobody has used for long."""
    place = artefact("thing", made_from, put("x"))
    long_ago = time.time() - KEPT_SECONDS - 1
    os.utime(place, (long_ago, long_ago))
    return place


def test_a_sweep_that_is_killed_leaves_nothing_that_looks_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = unused(1)
    delete = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists() and not ignore_errors:
            raise KeyboardInterrupt
        delete(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        artefact("thing", 2, put("x"))
    assert not first.exists()
    second = artefact("thing", 2, put("x"))
    assert {path.name for path in root().iterdir()} == {"thing.lock", second.name}


def test_what_is_found_while_others_are_swept_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    first = unused(1)
    found: list[Path] = []
    finder = threading.Thread(target=lambda: found.append(artefact("thing", 1, put("again"))))
    stat = Path.stat

    def stat_and_be_late(path: Path, **options: bool) -> os.stat_result:
        result = stat(path, **options)
        if path == first and threading.current_thread() is not finder and not finder.ident:
            finder.start()
            finder.join(0.5)  # it ends, or it waits for us
        return result

    monkeypatch.setattr(Path, "stat", stat_and_be_late)
    artefact("thing", 2, put("x"))
    finder.join(30)
    assert found == [first]
    assert first.exists()


def test_a_full_disk_is_told_and_cleared_up() -> None:
    def full(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(LabError, match=r"thing cannot be built in .*avmm-lab: .*No space left"):
        artefact("thing", 1, full)
    assert [path.name for path in root().iterdir()] == ["thing.lock"]


def test_one_builds_while_the_others_wait() -> None:
    built: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def build(folder: Path) -> None:
        built.append(1)
        begun.set()
        assert go_on.wait(30)
        (folder / "file").write_text("x")

    places: list[Path] = []
    threads = [
        threading.Thread(target=lambda: places.append(artefact("thing", 1, build)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert built == [1]
    assert len(set(places)) == 1
    assert len(places) == 3


# -- what is sent --------------------------------------------------------------------------


def test_a_wheel_that_cannot_be_fetched_costs_no_other_guest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def lacking() -> Path:
        raise LabError("lab: no wheel")

    monkeypatch.setattr(guest, "newer_kernel_package", lambda series: "newer")
    monkeypatch.setattr(guest, "kernel_package", lambda: "kernel")
    monkeypatch.setattr(guest, "download", Path)
    monkeypatch.setattr(guest, "_folder", lambda name, packages: tmp_path / packages[0])
    for module, name in (
        (krunfw, "folder"),
        (krunfw, "other"),
        (kernels, "newest"),
        (kernels, "others"),
    ):
        monkeypatch.setattr(module, name, lacking)
    assert guest.folders() == {
        "sent/debian": tmp_path / "kernel",
        f"sent/debian-{NEWER}": tmp_path / "newer",
    }
    assert capsys.readouterr().err == 4 * "lab: no wheel\n"


def test_preparing_a_lab_makes_its_guests_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking() -> dict[str, Path]:
        raise LabError(f"lab: no guests for {kinds}")

    kinds: list[str] = []
    monkeypatch.setattr(machine, "prepare", kinds.append)
    monkeypatch.setattr(guest, "folders", lacking)
    monkeypatch.setattr(sys, "argv", ["lab", "stock"])
    assert lab.__main__.main() == 1
    assert capsys.readouterr().err == "lab: no guests for ['stock']\n"


# -- one run -------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """An L1 whose QEMU is this script; $console and $sent are where its serial ports go."""

    def fake(script: str) -> L1:
        qemu = tmp_path / "qemu"
        find = "for word; do case $word in *id=console,path=*) console=${word##*path=};; *id=sent,path=*) sent=${word##*path=};; esac; done\n"  # noqa: E501
        qemu.write_text(f"#!/bin/sh\n{find}cd {tmp_path}\n{script}\n")
        qemu.chmod(0o755)
        for name in ("kernel", "initramfs", "root"):
            (tmp_path / name).touch()
        return L1(*(tmp_path / name for name in ("kernel", "initramfs", "root")), (str(qemu),))

    return fake


def run(l1: L1, seconds: float = 20, boot_seconds: float = 20) -> tuple[str, list[str]]:
    lines: list[str] = []
    said = machine.run(l1, Path("payload"), seconds, lines.append, boot_seconds)
    return said, lines


def test_lines_come_whole_and_the_console_is_given(fake: Fake) -> None:
    script = (
        "printf 'up\\nhal' >$sent; printf 'hello\\r\\n' >$console; printf 'f\\nlast\\n' >>$sent"
    )
    said, lines = run(fake(script))
    assert lines == ["up", "half", "last"]
    assert said == "hello\n"


def test_it_has_as_many_cpus_as_it_is_to_have(fake: Fake) -> None:
    script = 'echo up >$sent; printf "%s\\n" "$*" >$console'
    for cpus in (1, 2):
        assert f"-smp {cpus} " in run(replace(fake(script), cpus=cpus))[0]


def test_a_hung_boot_is_tried_once_more(fake: Fake, tmp_path: Path) -> None:
    script = "echo x >>tries; [ $(wc -l <tries) = 2 ] || exec sleep 100; echo up >$sent"
    assert run(fake(script), boot_seconds=3)[1] == ["up"]
    assert (tmp_path / "tries").read_text() == "x\n" * 2


def test_a_boot_that_hangs_twice_fails_with_the_console(fake: Fake, tmp_path: Path) -> None:
    script = "echo x >>tries; echo 'Kernel panic' >$console; exec sleep 100"
    with pytest.raises(LabError, match=r"not come up after 3 s; its console:\nKernel panic"):
        run(fake(script), boot_seconds=3)
    assert (tmp_path / "tries").read_text() == "x\n" * 2


def test_a_run_that_does_not_end_is_given_up(fake: Fake) -> None:
    with pytest.raises(LabError, match="L1 has not ended after 3 s"):
        run(fake("echo up >$sent; exec sleep 100"), seconds=3)


def test_a_run_that_falls_silent_is_given_up(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SILENT_SECONDS", 1)
    with pytest.raises(machine.Lost, match="L1 has sent nothing for 1 s; its console:\nOops"):
        run(fake("echo up >$sent; echo Oops >$console; exec sleep 100"))


def test_a_qemu_that_fails_is_told_with_what_it_said(fake: Fake) -> None:
    with pytest.raises(LabError, match="QEMU failed with status 3: no such machine"):
        run(fake("echo up >$sent; echo no such machine >&2; exit 3"))


def test_a_qemu_that_crashes_is_told(fake: Fake) -> None:
    with pytest.raises(machine.Lost, match=r"(?s)QEMU was ended by signal 11.*\nOops"):
        run(fake("echo up >$sent; echo Oops >$console; kill -SEGV $$"))


def test_nothing_is_left_behind(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    script = "echo $$ >pid; echo up >$sent; exec sleep 100"
    with pytest.raises(LabError):
        run(fake(script), seconds=3)
    assert not list(scratch.iterdir())
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_an_unknown_lab_is_refused() -> None:
    with pytest.raises(LabError, match="'other': expected one of stock, newer, newest, proposing"):
        machine.prepare("other")


def test_backports_come_from_where_debian_does(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = ["bookworm-updates http://here/updates/", "bookworm http://here/debian/"]
    monkeypatch.setattr(emulator, "run", lambda command: "\n".join(sources))
    assert emulator._site() == "http://here/debian/"
    sources.pop()
    with pytest.raises(LabError, match="apt has no source of bookworm"):
        emulator._site()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LabError, match=r"on Debian, apt-get install .*mmdebstrap"):
        machine.prepare("stock")


def test_the_payload_is_the_tree_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "payload.tar"
    payload.write(path, "stock", "echo hi\n", {"nodes": "a\n"}, {"sent/x": Path(__file__)})
    assert path.stat().st_size % 512 == 0
    with tarfile.open(path) as tar:
        names = tar.getnames()
        script = tar.extractfile("run.sh")
        assert script is not None
        assert script.read().decode().endswith("echo hi\n")
    assert {"avmm/loop.py", "avmm/guests/torture.elf", "tests/conftest.py", "nodes"} <= set(names)
    assert not any("__pycache__" in name for name in names)


# -- pytest's side -------------------------------------------------------------------------

TESTS = """
import pytest

pytestmark = pytest.mark.lab

def test_passes(): pass
def test_fails(): print("some output"); assert 1 == 2
def test_skips(): pytest.skip("not here")
def test_is_lost(): pass
"""
REPLAY = """
import json
import os
import shutil
from pathlib import Path
from lab import machine, payload
from lab.cache import LabError
from lab.machine import Lost

def prepare(kind, cpus): return kind

def write(tar, kind, script, texts, files):
    tar.write_text(texts["nodes"])

def run(l1, tar, seconds, on_line):
    on_line("up")
    on_line("a kernel message {")
    on_line('{"not": "a report"}')
    hangs = os.environ.pop("HANGS", "")
    late = os.environ.pop("LATE", "")
    for line in Path("reports").read_text().splitlines():
        report = json.loads(line)
        if hangs == report["nodeid"] and report["when"] == "teardown":
            raise Lost("L1 hangs")
        if late == report["nodeid"] and report["when"] == "call":
            report |= {"outcome": "failed", "longrepr": "E   trio.TooSlowError"}
            line = json.dumps(report)
        if "is_lost" not in line and report["nodeid"] in tar.read_text().splitlines():
            on_line(line)
    if os.environ.pop("DIES", ""):
        return "a triple fault"
    if late:
        return "lab: run.sh ended with 0"
    raise LabError("L1 died; its console: Oops")

machine.prepare, machine.run, payload.write = prepare, run, write
import lab.guest
lab.guest.folders = lambda: {}
"""
RECORD = """
import json
def pytest_configure(config):
    class Recorder:
        def pytest_runtest_logreport(self, report):
            data = config.hook.pytest_report_to_serializable(config=config, report=report)
            with open("reports", "a") as file:
                file.write(json.dumps(data) + "\\n")
    config.pluginmanager.register(Recorder())
"""


@pytest.mark.timeout(300)  # it runs pytest nine times
@pytest.mark.slow
def test_reports_from_there_are_as_if_made_here(tmp_path: Path) -> None:
    """What a run has recorded is played back as what L1 sends; one test's result is missing."""
    (tmp_path / "test_there.py").write_text(TESTS)
    (tmp_path / "record.py").write_text(RECORD)
    (tmp_path / "replay.py").write_text(REPLAY)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = lab\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent}"}

    def pytest_run(*options: str) -> str:
        command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *options]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    pytest_run("-p", "record")
    said = pytest_run("-p", "replay", "-p", "lab.plugin", "--lab", "stock")
    assert "2 failed, 1 passed, 1 skipped" in said
    assert "some output" in said
    assert "assert 1 == 2" in said
    assert "not here" in said
    assert "FAILED test_there.py::test_is_lost - the lab ended without a result" in said
    assert "L1 died; its console: Oops" in said
    environment["HANGS"] = "test_there.py::test_fails"
    said = pytest_run("-p", "replay", "-p", "lab.plugin", "--lab", "stock")
    assert "lab: once more, without the tests that have a result" in said
    assert "2 failed, 1 passed, 1 skipped" in said, "none is counted twice"
    assert "FAILED test_there.py::test_is_lost - the lab ended without a result" in said
    environment["HANGS"] = "test_there.py::test_passes"
    said = pytest_run("-p", "replay", "-p", "lab.plugin", "--lab", "stock", "-k", "passes")
    assert "1 passed, 3 deselected" in said
    assert "lab: once more" not in said, "no test is left for a second machine"
    environment["DIES"] = "1"
    said = pytest_run("-p", "replay", "-p", "lab.plugin", "--lab", "stock")
    assert "lab: L1 is gone before its time:\na triple fault" in said
    assert "lab: once more, without the tests that have a result" in said
    del environment["DIES"]
    environment["LATE"] = "test_there.py::test_passes"
    said = pytest_run("-p", "replay", "-p", "lab.plugin", "--lab", "stock")
    assert "lab: test_there.py::test_passes was late, and gets a second chance" in said
    assert "2 failed, 1 passed, 1 skipped" in said, "the second result counts, and lost ones do"
    environment["LATE"] = "test_there.py::test_fails"
    said = pytest_run("-p", "replay", "-p", "lab.plugin", "--lab", "stock", "-k", "fails")
    assert "1 failed, 3 deselected" in said, "it failed the second time"


# -- what L1 boots from --------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2], ids=["one package", "kernel and modules apart"])
def test_its_initramfs_has_the_modules_in_their_order(tmp_path: Path, parts: int) -> None:
    folder = f"/lib/modules/{RELEASE}"
    plain = elf(
        tmp_path,
        "-c",
        source='static const char i[] __attribute__((section(".modinfo"), used)) = "depends=";',
    )
    modules = {f"{folder}/kernel/{name}.ko": plain for name in initramfs._MODULES}
    modules[f"{folder}/modules.builtin"] = b""
    image = {f"/boot/vmlinuz-{RELEASE}": b"the kernel"}
    if parts == 1:
        linux = [deb(tmp_path / "linux.deb", image | modules)]
    else:
        linux = [deb(tmp_path / "binary.deb", image), deb(tmp_path / "modules.deb", modules)]
    program = elf(tmp_path, "-static", "-nostdlib", source="void _start(void) {}")
    busybox = deb(tmp_path / "busybox.deb", {"/bin/busybox": program})
    to = tmp_path / "boot"
    to.mkdir()
    initramfs._build(to, [Package(path) for path in linux], Package(busybox), None)
    assert (to / "vmlinuz").read_bytes() == b"the kernel"
    found = entries((to / "initramfs").read_bytes())
    _, order = found["modules/order"]
    assert order.decode().split() == list(initramfs._MODULES)
    assert all(found[f"modules/{name}.ko"][1] == plain for name in initramfs._MODULES)


def test_each_kind_has_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initramfs, "download", Path)
    monkeypatch.setattr(initramfs, "kernel_package", lambda: "own")
    monkeypatch.setattr(initramfs, "newer_kernel_package", lambda series: series)
    monkeypatch.setattr(kernels, "newest", lambda: [Path("binary"), Path("modules")])
    assert {kind: initramfs._packages(kind) for kind in machine.KINDS} == {
        "stock": [Path("own")],
        "newer": [Path(NEWER)],
        "newest": [Path("binary"), Path("modules")],
        "proposing": [Path("own")],
    }


# -- which tests run there -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "here", "stock", "whole", "newer"),
    [
        (None, True, False, False, False),
        (pytest.mark.lab, True, True, True, True),
        (pytest.mark.lab(long=True), True, False, True, False),
        (pytest.mark.lab(only="stock"), False, True, True, False),
        (pytest.mark.lab(only="stock", long=True), False, False, True, False),
        (pytest.mark.lab(also="stock"), True, True, True, False),
    ],
)
def test_which_tests_run_in_which_lab(
    request: pytest.FixtureRequest,
    mark: pytest.MarkDecorator | None,
    here: bool,
    stock: bool,
    whole: bool,
    newer: bool,
) -> None:
    item = request.node
    if mark is not None:
        item.add_marker(mark)
    assert plugin._belongs(item, None, False) is here
    assert plugin._belongs(item, "stock", False) is stock
    assert plugin._belongs(item, "stock", True) is whole
    assert plugin._belongs(item, "newer", False) is newer


@pytest.mark.parametrize(
    ("option", "environment", "workers"), [(None, None, None), ("stock", None, 0), (None, "x", 0)]
)
def test_a_labs_tests_run_in_one_process(
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
    option: str | None,
    environment: str | None,
    workers: int | None,
) -> None:
    monkeypatch.delenv(plugin.KIND, raising=False)
    if environment:
        monkeypatch.setenv(plugin.KIND, environment)
    monkeypatch.setattr(pytestconfig.option, "lab", option)
    assert plugin.pytest_xdist_auto_num_workers(pytestconfig) == workers
