"""Debian's own kernels as guests, and libkrun's: what people boot, on a KVM that can run it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from support import stock
from support.stock import GUEST, KRUNFW, NEWER, NEWEST, OTHER_KRUNFW, OTHERS

pytestmark = [
    pytest.mark.lab(also="stock"),
    pytest.mark.usefixtures("kvm", "fitting_engine"),
    pytest.mark.timeout(240),
]

CMDLINE = "console=ttyS0 quiet panic=-1"
PROMPT = "avmm:/root# "
LONG = pytest.mark.lab(also="stock", long=True)
"""In the lab only if all of it is asked for: here it runs on the software engine."""
Start = Callable[..., pexpect.spawn]


@pytest.fixture
def start() -> Iterator[Start]:
    """A guest with its console: `start(image, *options)`."""
    children: list[pexpect.spawn] = []

    def start(image: str | Path, *options: str, guest: str = GUEST) -> pexpect.spawn:
        files = stock.folder(guest)
        command = ["-m", "avmm", "run", str(files / image), "--initrd"]
        command += [str(files / "initrd.cpio.gz"), "--memory", "256M", "--cmdline", CMDLINE]
        child = pexpect.spawn(sys.executable, [*command, *options], timeout=200, encoding="utf-8")
        children.append(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


def ends(child: pexpect.spawn) -> int | None:
    child.expect(pexpect.EOF)
    child.close()
    status: int | None = child.exitstatus
    return status


def alarming(child: pexpect.spawn) -> list[str]:
    """What a guest's kernel has said of the machine that sounds as if something were wrong. What
    it says of the processor is the host's matter."""
    child.send("dmesg; echo the $((1 + 1))nd END\r")
    child.expect_exact("the 2nd END")
    assert "Linux version" in child.before
    return re.findall(
        r"(?im)^.*(?:fatal|\bpci\b.*\bno\b|fail|virtio.*error|i8042.*error|did not).*$",
        child.before,
    )


# Without ACPI this kernel knows a single CPU: it is built without CONFIG_X86_MPPARSE.
BZIMAGE, PVH, LINUX64 = ["vmlinuz"], ["vmlinux"], ["vmlinux", "--protocol", "linux64"]


@pytest.mark.parametrize(
    ("image", "cpus", "acpi"),
    [
        (BZIMAGE, "2", "--acpi"),
        pytest.param(PVH, "1", "--no-acpi", marks=LONG),
        pytest.param(LINUX64, "1", "--acpi", marks=LONG),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (BZIMAGE, "1", "--acpi"),
                (BZIMAGE, "1", "--no-acpi"),
                (PVH, "1", "--acpi"),
                (PVH, "2", "--acpi"),
                (LINUX64, "2", "--acpi"),
                (LINUX64, "1", "--no-acpi"),
            )
        ),
    ],
)
def test_a_shell_on_the_serial_console(
    start: Start, image: list[str], cpus: str, acpi: str
) -> None:
    child = start(*image, "--cpus", cpus, acpi)
    child.expect_exact(PROMPT)
    child.send("echo $(nproc) CPUs, $((6 * 7))\r")
    child.expect_exact(f"{cpus} CPUs, 42\r\n")
    child.expect_exact(PROMPT)
    child.send("exit 7\r")
    assert ends(child) == 7


@pytest.mark.parametrize("image", ["vmlinuz", pytest.param("vmlinux", marks=pytest.mark.slow)])
def test_a_newer_kernel(start: Start, image: str) -> None:
    child = start(image, "--cpus", "2", guest=NEWER)
    child.expect_exact(PROMPT)
    child.send("echo $(nproc) CPUs, Linux $(uname -r)\r")
    child.expect_exact("2 CPUs, Linux 6.12.")
    child.expect_exact(PROMPT)
    child.send("exit 7\r")
    assert ends(child) == 7


@pytest.mark.parametrize("image", ["vmlinuz", pytest.param("vmlinux", marks=pytest.mark.slow)])
def test_the_newest_kernel(start: Start, image: str) -> None:
    """It comes in several packages, its entry lies in its data, and it finds a host bridge."""
    child = start(image, guest=NEWEST)
    child.expect_exact(PROMPT)
    child.send("uname -r\r")
    child.expect(r"[7-9]\.\d+\.\d+")
    child.expect_exact(PROMPT)
    assert alarming(child) == []
    child.send("exit 7\r")
    assert ends(child) == 7


@pytest.mark.parametrize(
    ("guest", "acpi"),
    [
        pytest.param(GUEST, "--no-acpi", marks=LONG),
        pytest.param(NEWER, "--acpi", marks=pytest.mark.slow),
        pytest.param(GUEST, "--acpi", marks=pytest.mark.slow),
        pytest.param(NEWER, "--no-acpi", marks=pytest.mark.slow),
    ],
)
def test_a_clean_boot_says_nothing_alarming(start: Start, guest: str, acpi: str) -> None:
    child = start("vmlinuz", acpi, "--cmdline", "console=ttyS0 panic=-1", guest=guest)
    child.expect_exact(PROMPT)
    assert alarming(child) == []
    child.send("exit\r")
    assert ends(child) == 0


@pytest.mark.parametrize("mode", [pytest.param("no-real-mode", marks=LONG), ""])
def test_xen_prints_its_banner(start: Start, mode: str) -> None:
    """It finds its trampoline's place in the BIOS data area, and calls the BIOS in real mode."""
    options = ["--memory", "512M", "--cmdline", f"console=com1 {mode}", *stock.engine_option()]
    child = start(stock.folder(OTHERS) / "xen.gz", *options)
    child.expect_exact("(XEN) Xen version 4.17.")
    child.expect_exact("(XEN) Bootloader: avmm")


@LONG
def test_memtest_shows_its_screen_on_the_serial_port(start: Start) -> None:
    child = start(stock.folder(OTHERS) / "memtest86+", "--cmdline", "console=ttyS0,115200")
    child.expect_exact("Memtest86+ v6.10")
    child.expect_exact("Pass")


@pytest.mark.parametrize(
    ("guest", "acpi", "ended"),
    [
        pytest.param(GUEST, "--acpi", "shutdown", marks=LONG),
        pytest.param(NEWER, "--no-acpi", "reset", marks=LONG),
        pytest.param(NEWER, "--acpi", "shutdown", marks=pytest.mark.slow),
        pytest.param(GUEST, "--no-acpi", "reset", marks=pytest.mark.slow),
    ],
)
def test_sigterm_shuts_the_guest_down(start: Start, guest: str, acpi: str, ended: str) -> None:
    """By ACPI's button, or else by Ctrl-Alt-Del."""
    child = start("vmlinuz", acpi, guest=guest)
    child.expect_exact(PROMPT)
    child.kill(signal.SIGTERM)
    child.expect_exact("the guest was asked to shut down")
    child.expect_exact(f"the guest ended: {ended}")
    assert ends(child) == 0


@LONG
def test_powering_off_without_acpi_ends_the_run(start: Start) -> None:
    child = start("vmlinuz", "--no-acpi")
    child.expect_exact(PROMPT)
    child.send("busybox poweroff -f\r")
    child.expect_exact("the guest has halted all of its CPUs, with interrupts off")
    assert ends(child) == 133


def test_a_shell_on_the_virtio_console_that_acpi_tells_of(start: Start) -> None:
    options = ["--console", "virtio", "--rng", "--cmdline", "quiet panic=-1", "--cpus", "2"]
    child = start("vmlinuz", *options)
    child.expect_exact(PROMPT)
    child.send("cat /proc/interrupts; ls /sys/bus/virtio/devices | tr '\\n' ' '; tty\r")
    child.expect(r"(\d+)\s+(\d+)\s+IO-APIC\s+5-edge\s+virtio0")
    assert int(child.match[1]) + int(child.match[2]) > 0
    child.expect(r"virtio0 virtio1 .*/dev/hvc0")
    child.expect_exact(PROMPT)
    child.send("exit 7\r")
    assert ends(child) == 7


@LONG
def test_the_kernel_of_a_libkrunfw(start: Start) -> None:
    # It has virtio devices only, named on the command line, and cannot switch itself off.
    cmdline = ["--no-acpi", "--cmdline", "quiet panic=-1"]
    options = [*cmdline, "--console", "virtio", "--rng", "--cpus", "2"]
    child = start(stock.folder(KRUNFW) / "libkrunfw.so", *options)
    child.expect_exact(PROMPT)
    child.send("echo $(nproc) CPUs; od -An -N64 -x /dev/hwrng | wc -l\r")
    child.expect_exact("2 CPUs\r\n4\r\n")
    child.expect_exact(PROMPT)
    child.send("exit 7\r")
    child.expect_exact("the guest ended: reset")
    assert ends(child) == 0


@LONG
def test_the_kernel_of_another_libkrunfw() -> None:
    """It takes no initrd, but a root disk."""
    folder = stock.folder(OTHER_KRUNFW)
    command = ["-m", "avmm", "run", str(folder / "libkrunfw.so"), "--no-acpi", "--memory", "256M"]
    command += ["--console", "virtio", "--disk", f"{folder / 'root.img'},overlay"]
    command += ["--cmdline", "root=/dev/vda rw init=/init quiet panic=-1"]
    child = pexpect.spawn(sys.executable, command, timeout=200, encoding="utf-8")
    try:
        child.expect(r"ROOT OF 6\.12\.\d+")
        child.expect_exact("the guest ended: reset")
        assert ends(child) == 0
    finally:
        child.close(force=True)


def test_what_the_guest_finds_by_acpi(start: Start) -> None:
    child = start("vmlinuz", "--cpus", "2")
    child.expect_exact(PROMPT)
    child.send("dmesg | grep -c 'ACPI: Using ACPI (MADT) for SMP'; cat /proc/interrupts\r")
    child.expect_exact("1\r\n")
    child.expect(r"(\d+)\s+(\d+)\s+IO-APIC\s+4-edge\s+ttyS0")
    assert int(child.match[1]) + int(child.match[2]) > 0
    child.expect_exact(PROMPT)
    child.send("ls /sys/bus/acpi/devices | tr '\\n' ' '; date +%Y\r")
    child.expect(r"ACPI0007:00 ACPI0007:01.*PNP0501:00.*PNP0B00:00.*20\d\d")
    child.expect_exact(PROMPT)
    child.send("exit\r")
    assert ends(child) == 0


@pytest.mark.parametrize(
    ("command", "text"),
    [
        pytest.param("poweroff", "shutdown", marks=LONG),
        pytest.param("reboot", "reset", marks=LONG),
        pytest.param("reboot -f", "reset", marks=LONG),
    ],
)
def test_powering_off_and_rebooting_end_the_run_as_such(
    start: Start, command: str, text: str
) -> None:
    child = start("vmlinuz", "--cmdline", CMDLINE)
    child.expect_exact(PROMPT)
    child.send(f"{command}\r")
    child.expect_exact(f"the guest ended: {text}")
    assert ends(child) == 0


@LONG
def test_a_kernel_panic_ends_the_run(start: Start) -> None:
    child = start("vmlinuz", "--cmdline", CMDLINE + " rdinit=/nothing")
    child.expect_exact("Kernel panic")
    assert ends(child) == 0


@LONG
def test_a_script_instead_of_a_shell() -> None:
    settings = stock.folder(GUEST) / "script/guest.toml"
    command = [sys.executable, "-m", "avmm", "run", "--config", settings]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 9, done.stderr
    assert "\nSCRIPT RAN\n" in done.stdout.replace("\r", "")
    assert PROMPT not in done.stdout


@LONG
def test_commands_from_a_pipe(tmp_path: Path) -> None:
    """The last output is there, although the shell ends right after it."""
    command = [sys.executable, "-m", "avmm", "run", "--config", stock.folder(GUEST) / "guest.toml"]
    done = subprocess.run(
        command,
        input="uname -s\nseq -s , 200; exit 5\n",
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 5
    assert ",199,200" in done.stdout  # the kernel may say something right behind it
    assert "\nLinux\n" in done.stdout.replace("\r", "")
