"""A real Linux: boots, prints, takes commands, brings up a second CPU, reboots.

The kernels are named by AVMM_GUEST_LINUX, a folder with vmlinux.gz, vmlinux-smp.gz,
rdkl.cpio (an init which prints HELLO FROM GUEST and reboots, and klibc's tools) and rdmin.cpio.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

pytestmark = [pytest.mark.usefixtures("kvm"), pytest.mark.timeout(120)]

CMDLINE = (
    "console=ttyS0 reboot=t panic=-1 lpj=1000000 noxsave clearcpuid=smap,smep,fsgsbase "
    "rodata=off random.trust_cpu=on"
)
AVMM = [sys.executable, "-m", "avmm", "run"]


@pytest.fixture
def linux() -> Path:
    folder = os.environ.get("AVMM_GUEST_LINUX")
    if not folder:
        pytest.skip("AVMM_GUEST_LINUX names no folder with kernels")
    return Path(folder)


def run(kernel: Path, initrd: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [*AVMM, str(kernel), "--initrd", str(initrd), "--memory", "32M", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_linux_says_hello_and_reboots(linux: Path) -> None:
    done = run(linux / "vmlinux.gz", linux / "rdkl.cpio", "--cmdline", CMDLINE + " quiet")
    assert "HELLO FROM GUEST" in done.stdout
    assert done.returncode == 0
    assert "triple fault" in done.stderr


def test_both_cpus_come_up(linux: Path) -> None:
    done = run(linux / "vmlinux-smp.gz", linux / "rdmin.cpio", "--cpus", "2", "--cmdline", CMDLINE)
    assert "Brought up 1 node, 2 CPUs" in done.stdout
    assert "HELLO FROM GUEST" in done.stdout


def test_a_shell_on_the_interrupt_driven_serial_port(linux: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd.cpio"
    init = b"#!/bin/sh\nmount -t proc proc /proc\nmount -t devtmpfs dev /dev\nexec sh\n"
    initrd.write_bytes(with_file((linux / "rdkl.cpio").read_bytes(), "shell", init))
    command = [*AVMM[1:], str(linux / "vmlinux.gz"), "--initrd", str(initrd), "--memory", "32M"]
    cmdline = f"{CMDLINE} quiet rdinit=/shell"
    child = pexpect.spawn(AVMM[0], [*command, "--cmdline", cmdline], timeout=60, encoding="utf-8")
    try:
        child.expect_exact("# ")
        child.send("echo $((6 * 7))\r")
        child.expect_exact("42\r\n")
        child.send("cat /proc/interrupts\r")
        child.expect(r"4:\s+(\d+).*ttyS0")
        assert int(child.match[1]) > 0
        child.expect_exact("# ")
        child.send("exit\r")  # init ends: Linux panics, and reboots at once (panic=-1)
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)
    assert child.exitstatus == 0


def test_bench_boot_compares_with_qemu(linux: Path) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed")
    files = [str(linux / "vmlinux.gz"), "--initrd", str(linux / "rdmin.cpio"), "--memory", "32M"]
    command = [*AVMM[:-1], "bench", "boot", *files, "--cmdline", CMDLINE + " quiet"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--json"], capture_output=True, timeout=100, check=False
    )
    (row,) = json.loads(done.stdout)
    assert row["ratio"] == pytest.approx(row["us"] / row["raw_us"])


def with_file(archive: bytes, name: str, content: bytes) -> bytes:
    """A newc archive and after it one more with an executable file (cpio(5))."""

    def entry(name: str, mode: int, content: bytes) -> bytes:
        fields = [1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        return _padded(head) + _padded(content)

    return _padded(archive) + entry(name, 0o100755, content) + entry("TRAILER!!!", 0, b"")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
