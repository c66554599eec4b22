"""The power button: guests that listen to ACPI's, to a keyboard, or to nothing."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from support.assembler import assemble
from support.commands import AVMM, ctl
from support.guest import EXIT, ORIGIN, machine

import avmm
from avmm.arch.x86_64 import button

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("kvm")]

READY = "mov al, 0x21; mov dx, 0x3f8; out dx, al"
"""Says "!" on the serial port."""
VECTOR = 0x41


def unmasked(pin: int) -> str:
    """Lets the IOAPIC send a pin's interrupt to a vector that the guest never takes."""
    return f"""
        mov rax, 0xfee000f0
        mov dword ptr [rax], 0x1ff
        mov rbx, 0xfec00000
        mov dword ptr [rbx], {0x11 + 2 * pin}
        mov dword ptr [rbx + 0x10], 0
        mov dword ptr [rbx], {0x10 + 2 * pin}
        mov dword ptr [rbx + 0x10], {VECTOR}
    """


REQUESTED = f"""
1:  mov rcx, {0xFEE0_0200 + 0x10 * (VECTOR // 32)}
    mov eax, [rcx]
    test eax, {1 << VECTOR % 32}
    jz 1b
"""
ACPI = f"{unmasked(button.GSI)}; {READY}; {REQUESTED}; {EXIT.format(5)}"
DEAF = f"{READY}; 1: jmp 1b"
STUBBORN = f"{unmasked(button.GSI)}; {READY}; 1: jmp 1b"
SCANNING = """
    mov al, 0x60; out 0x64, al; mov al, 0x41; out 0x60, al
    mov al, 0xf4; out 0x60, al; in al, 0x60
"""
POLLING = f"{SCANNING}; mov al, 0xff; out 0x21, al; {DEAF}"
"""Its keyboard would interrupt it, but all pins of both chips are masked."""
KEYBOARD = f"""
    {SCANNING}
    {unmasked(button.KEYBOARD_IRQ)}
    {READY}
    {REQUESTED}
2:  in al, 0x64; test al, 1; jz 2b
    in al, 0x60; cmp al, 0x53; jne 2b
    {EXIT.format(6)}
"""


async def ready(vm: avmm.Machine) -> None:
    assert await vm.console.receive_some() == b"!"


@pytest.mark.lab
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("source", "status"), [(ACPI, 5), (KEYBOARD, 6)], ids=["acpi", "keys"])
async def test_a_guest_that_listens(tmp_path: Path, source: str, status: int) -> None:
    async with machine(tmp_path, source) as vm:
        await ready(vm)
        vm.powerdown()
        with trio.fail_after(30):
            assert (await vm.wait()).status == status
        with pytest.raises(avmm.RunstateError, match="powerdown: this machine has ended"):
            vm.powerdown()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("source", [DEAF, POLLING], ids=["nothing", "keys without interrupts"])
async def test_a_guest_that_listens_to_nothing(tmp_path: Path, source: str) -> None:
    async with machine(tmp_path, source) as vm:
        await ready(vm)
        with pytest.raises(avmm.AvmmError, match="the guest listens to no power button"):
            vm.powerdown()


@pytest.mark.usefixtures("nothing_left")
async def test_without_acpi_pin_8_is_the_clocks(tmp_path: Path) -> None:
    async with machine(tmp_path, STUBBORN, acpi=False) as vm:
        await ready(vm)
        with pytest.raises(avmm.AvmmError, match="the guest listens to no power button"):
            vm.powerdown()


@pytest.mark.lab
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("source", "status"), [(ACPI, 5), (KEYBOARD, 6)], ids=["acpi", "keys"])
async def test_a_button_that_was_pressed_during_a_pause_goes_with_the_guest(
    tmp_path: Path, source: str, status: int
) -> None:
    async with machine(tmp_path, source) as vm:
        await ready(vm)
        async with vm.paused():
            vm.powerdown()
            state = vm.save()
    async with machine(tmp_path, source, state=state) as vm:
        with trio.fail_after(30):
            assert (await vm.wait()).status == status


# -- the command --------------------------------------------------------------------------

Run = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """`avmm run` of a guest that says when it is ready: `run(source, *options)`."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(source: str, *options: str) -> subprocess.Popen[bytes]:
        image = tmp_path / "guest"
        image.write_bytes(assemble(source, 64, ORIGIN))
        command = [*AVMM, "run", str(image), "--flat", f"long@{ORIGIN:#x}", *options]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        processes.append(process)
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1) == b"!"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


ASKED = b"avmm: the guest was asked to shut down; a second SIGTERM ends it at once\n"


def told(process: subprocess.Popen[bytes]) -> bytes:
    return process.communicate(timeout=30)[1]


def test_sigterm_once(run: Run) -> None:
    process = run(ACPI)
    process.send_signal(signal.SIGTERM)
    assert told(process) == ASKED
    assert process.returncode == 5, "the guest's own"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_another_signal(run: Run, second: signal.Signals) -> None:
    process = run(STUBBORN)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert process.stderr.readline() == ASKED
    process.send_signal(second)
    assert told(process) == b""
    assert process.returncode == 128 + second


def test_sigterm_to_one_that_does_not_shut_down(run: Run) -> None:
    process = run(STUBBORN, "--grace", "0.2")
    process.send_signal(signal.SIGTERM)
    assert told(process) == ASKED + b"avmm: the guest has not shut down within 0.2 s\n"
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("source", "options"), [(DEAF, []), (STUBBORN, ["--grace", "0"])], ids=["deaf", "no grace"]
)
def test_sigterm_that_nobody_could_hear(run: Run, source: str, options: list[str]) -> None:
    process = run(source, *options)
    process.send_signal(signal.SIGTERM)
    assert told(process) == b""
    assert process.returncode == 128 + signal.SIGTERM


def test_ctl_powerdown(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "control"
    process = run(ACPI, "--control", f"unix:{path}")
    ctl(path, "pause")
    done = ctl(path, "powerdown")
    assert (done.returncode, done.stdout) == (125, "")
    assert "is paused by control (1): let it run on first" in done.stderr
    ctl(path, "resume")
    done = ctl(path, "powerdown")
    assert (done.returncode, done.stdout, done.stderr) == (0, "the guest has ended\n", "")
    assert process.wait(30) == 5


def test_ctl_powerdown_of_guests_that_do_not_react(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "control"
    run(DEAF, "--control", f"unix:{path}")
    done = ctl(path, "powerdown")
    assert (done.returncode, "listens to no power button" in done.stderr) == (125, True)
    other = tmp_path / "other"
    process = run(STUBBORN, "--control", f"unix:{other}")
    done = ctl(other, "powerdown", "--deadline", "0.2")
    assert done.returncode == 125
    assert "the guest has not ended within 0.2 s, and runs on" in done.stderr
    assert process.poll() is None
