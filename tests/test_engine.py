"""The choice between the engines, and what becomes of a guest on the other one."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.commands import AVMM
from support.required import not_here

import avmm
from avmm import arch, engine, soft
from avmm.cli import doctor
from avmm.errors import EngineUnavailable
from avmm.kvm import system as kvm_system

pytestmark = pytest.mark.usefixtures("kvm")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been said or found out in this process, and no variable chooses."""
    monkeypatch.delenv(engine.VARIABLE, raising=False)
    monkeypatch.setattr(engine, "_said", set())
    monkeypatch.setattr(engine, "_judged", [])


@pytest.fixture
def no_kvm(no_kvm_later: Callable[[], None]) -> None:
    """/dev/kvm is not there."""
    no_kvm_later()


@pytest.fixture
def no_kvm_later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on /dev/kvm is not there."""
    really = os.open

    def opened(path: str, *rest: int) -> int:
        if path == "/dev/kvm":
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return really(path, *rest)

    return lambda: monkeypatch.setattr(kvm_system.os, "open", opened)


@pytest.fixture
def no_unicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(arch.host()), "runs_kernels", lambda self, system: False)


@pytest.fixture
def real_kvm() -> None:
    try:
        arch.host().open_system().close()
    except avmm.KvmUnavailable as error:
        pytest.skip(str(error))


def taken(choice: str = engine.AUTO, *, is_kernel: bool = False) -> str:
    system = engine.opened(arch.host(), choice, is_kernel=is_kernel)
    system.close()
    return system.engine


def test_auto_takes_kvm_where_there_is_one(
    real_kvm: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert taken() == engine.KVM
    assert not caplog.records


def test_auto_takes_the_software_engine_where_there_is_no_kvm_and_says_so_once(
    no_kvm: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert taken() == taken(is_kernel=True) == engine.SOFT
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "because KVM cannot: open /dev/kvm failed: No such file" in record.message
    assert "no security boundary" in record.message


def test_auto_takes_the_software_engine_for_a_kernel_that_kvm_would_refuse(
    real_kvm: None, interpreting: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert taken() == engine.KVM
    assert taken(is_kernel=True) == taken(is_kernel=True) == engine.SOFT
    (record,) = caplog.records
    assert "because this host's KVM interprets ring 0" in record.message


def test_whether_kvm_runs_kernels_is_found_out_by_trying() -> None:
    kind = arch.host()
    for choice in engine.NAMES:
        try:
            system = engine.opened(kind, choice)
        except avmm.KvmUnavailable:
            continue
        interprets = choice == engine.KVM and Path("/sys/module/kvm_pvm").exists()
        assert kind.runs_kernels(system) == (not interprets)
        system.close()


def test_kvm_is_kept_where_only_the_other_engine_is_missing(
    real_kvm: None,
    interpreting: None,
    no_unicorn: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert taken(is_kernel=True) == engine.KVM
    assert "pip install 'avmm[soft]'" in caplog.records[0].message


def test_without_either_the_error_says_what_would_help(no_kvm: None, no_unicorn: None) -> None:
    with pytest.raises(avmm.KvmUnavailable, match="enable virtualization") as caught:
        taken()
    assert "pip install 'avmm[soft]'" in caught.value.__notes__[0]


def test_a_choice_is_not_replaced(no_kvm: None) -> None:
    with pytest.raises(avmm.KvmUnavailable):
        taken(engine.KVM)


def test_the_software_engine_asks_for_its_package(no_unicorn: None) -> None:
    with pytest.raises(EngineUnavailable, match=r"pip install 'avmm\[soft\]'"):
        taken(engine.SOFT)


@pytest.mark.parametrize("choice", engine.NAMES)
def test_the_environment_says_what_auto_is(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine.VARIABLE, choice)
    try:
        assert taken() == choice
    except avmm.KvmUnavailable:
        assert choice == engine.KVM


def test_an_unknown_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(avmm.ConfigError, match="engine 'xen': expected one of auto, kvm, soft"):
        avmm.Machine(engine="xen")
    monkeypatch.setenv(engine.VARIABLE, "xen")
    with pytest.raises(avmm.ConfigError, match="AVMM_ENGINE='xen': expected auto, kvm or soft"):
        taken()


# -- states ----------------------------------------------------------------------------------


async def state_on(choice: str) -> dict[str, object]:
    async with avmm.Machine(memory="16M", engine=choice) as vm, vm.paused():
        return vm.save()


async def test_a_state_goes_on_where_it_was_and_is_refused_elsewhere_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = await state_on(engine.SOFT)
    async with avmm.Machine(memory="16M", state=state) as vm:  # auto: the state says which
        assert vm.engine == engine.SOFT
    try:
        other = await state_on(engine.KVM)
    except avmm.KvmUnavailable as error:
        pytest.skip(str(error))
    pairs = ((state, engine.SOFT, engine.KVM), (other, engine.KVM, engine.SOFT))
    for wrong, theirs, choice in pairs:
        with pytest.RaisesGroup(
            pytest.RaisesExc(
                avmm.StateError, match=f"on the engine '{theirs}'; expected '{choice}'"
            ),
            allow_unwrapped=True,
            flatten_subgroups=True,
        ):
            async with avmm.Machine(memory="16M", state=wrong, engine=choice):
                pass


async def test_a_snapshot_and_a_clone_stay_on_their_engine(tmp_path: Path) -> None:
    file = tmp_path / "guest.snap"
    async with avmm.Machine(memory="16M", engine=engine.SOFT) as vm:
        await vm.snapshot(file)
        async with vm.clone() as twin:
            assert twin.engine == engine.SOFT
    async with avmm.restore(file) as again:
        assert again.engine == engine.SOFT
        await again.console.send_all(b"exit 3\r")
        assert (await again.wait()).status == 3
    with pytest.raises(avmm.ConfigError, match="engine: the guest has seen it"):
        async with avmm.restore(file, engine=engine.KVM):  # type: ignore[call-arg]
            pass


async def test_a_guest_of_kvm_is_missed_by_name_where_there_is_none(
    real_kvm: None, no_kvm_later: Callable[[], None], tmp_path: Path
) -> None:
    file = tmp_path / "guest.snap"
    async with avmm.Machine(memory="16M", engine=engine.KVM) as vm:
        await vm.snapshot(file)
    no_kvm_later()
    with pytest.raises(avmm.KvmUnavailable) as caught:
        async with avmm.restore(file):
            pass
    assert "on the engine 'kvm'. It can go on only on that one." in caught.value.__notes__[0]


# -- the command -----------------------------------------------------------------------------


def without_kvm(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """The command where /dev/kvm is no KVM."""
    hidden = 'mount --bind /dev/null /dev/kvm && exec "$@"'
    if os.geteuid() or shutil.which("unshare") is None or not Path("/dev/kvm").exists():
        pytest.skip("only root can hide /dev/kvm, if there is one, and with unshare(1)")
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", hidden, "sh", *AVMM, *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_the_readmes_first_command_needs_no_kvm() -> None:
    done = without_kvm("run", given="echo hi\nexit 3\n")
    assert done.returncode == 3
    assert "\nhi\n" in done.stdout.replace("\r", "")
    assert "avmm: the software engine runs this guest, because KVM cannot" in done.stderr
    assert len(done.stderr.splitlines()) == 1


async def test_a_bundled_guest_is_no_kernel(real_kvm: None, interpreting: None) -> None:
    async with avmm.Machine(memory="16M") as vm:
        assert vm.engine == engine.KVM


def test_doctor_works_without_kvm() -> None:
    done = without_kvm("doctor")
    assert done.returncode == 0
    assert "engine auto    takes the software engine\n" in done.stdout


def test_doctor_says_what_auto_takes(
    real_kvm: None, interpreting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.examine().auto == {"guest": engine.KVM, "kernel": engine.SOFT}
    monkeypatch.setenv(engine.VARIABLE, engine.SOFT)
    report = doctor.examine()
    assert report.auto == {"guest": engine.SOFT, "kernel": engine.SOFT}
    assert report.kvm.guest_ran  # it still looks at both
    told = CliRunner().invoke(doctor.command).output
    assert "engine auto    takes the software engine, as AVMM_ENGINE says\n" in told


def test_kvm_that_is_asked_for_and_missing_is_an_error() -> None:
    done = without_kvm("run", "--engine", "kvm")
    assert done.returncode == 125
    assert done.stderr.startswith("avmm: open /dev/kvm failed")


# -- what is no library that the engine knows ------------------------------------------------


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("cc")
    return found or not_here("there is no C compiler")


def loaded(library: Path) -> str:
    """Why the engine does not load this library. A process of its own has loaded no other."""
    script = (
        "import sys; from avmm.soft._soft import ffi, lib; why = ffi.new('char[]', 500)\n"
        "path = ffi.from_buffer(sys.argv[1].encode() + b'\\0')\n"
        "print(lib.soft_load(path, why, 500), ffi.string(why).decode())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, library], capture_output=True, text=True, check=True
    )
    answer, _, why = done.stdout.strip().partition(" ")
    assert answer == "-1"
    return why


def symbols() -> Iterator[str]:
    header = Path(soft.__file__).parent / "native/library.h"
    calls = header.read_text().split("#define LIBRARY_CALLS(X)")[1].split("struct library")[0]
    for call in calls.split(" X(")[1:]:
        yield call.split('"')[1]


def imitation(folder: Path, compiler: str, version: str, leave_out: str = "") -> Path:
    names = [name for name in symbols() if name not in (leave_out, "uc_version")]
    code = "".join(f"long {name}(void) {{ return 1; }}\n" for name in names)
    code += f"unsigned uc_version(unsigned *a, unsigned *b) {{ return {version}; }}\n"
    source, library = folder / "imitation.c", folder / "libimitation.so"
    source.write_text(code)
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    return library


def test_another_version_is_refused_by_its_number(tmp_path: Path, compiler: str) -> None:
    library = imitation(tmp_path, compiler, "2 << 24 | 1 << 16 | 3 << 8")
    assert loaded(library) == "unicorn 2.1.3; expected 2.1.4, whose insides the engine knows"


def test_a_library_of_another_make_is_refused(tmp_path: Path, compiler: str) -> None:
    lacking = imitation(tmp_path, compiler, "2 << 24 | 1 << 16 | 4 << 8", "tlb_set_dirty_x86_64")
    assert "has no symbol tlb_set_dirty_x86_64; expected PyPI's unicorn 2.1.4" in loaded(lacking)
    whole = imitation(tmp_path, compiler, "2 << 24 | 1 << 16 | 4 << 8")
    assert loaded(whole) == "the library cannot make an x86 engine"


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "lib.so"
    text.write_text("no library")
    assert "file too short" in loaded(text) or "invalid ELF header" in loaded(text)


def test_a_library_that_somebody_has_loaded_already_is_refused() -> None:
    script = (
        "import unicorn, avmm.soft\n"
        "try:\n    avmm.soft.opened()\n"
        "except avmm.soft.EngineUnavailable as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "is loaded already (by `import unicorn`?)" in done.stdout


def test_nothing_of_unicorn_is_imported_or_loaded_before_it_is_used() -> None:
    script = (
        "import sys, trio, avmm\n"
        "async def main():\n"
        "    async with avmm.Machine(engine=sys.argv[1]) as vm:\n"
        "        await vm.console.send_all(b'exit 0\\r')\n"
        "        await vm.wait()\n"
        "if sys.argv[1:]:\n    trio.run(main)\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('unicorn' in sys.modules, 'libunicorn' in maps, 'avmm.soft' in sys.modules)\n"
    )
    run = [sys.executable, "-c", script]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert said == "False False False\n"
    said = subprocess.run([*run, "soft"], capture_output=True, text=True, check=True).stdout
    assert said == "False True True\n"
