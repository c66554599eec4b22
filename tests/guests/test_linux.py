"""A real Linux: boots, prints, takes commands, brings up a second CPU, reboots."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
import trio
from lab.cache import LabError
from linux import kernel, userspace
from linux.kernel import CMDLINE
from support.required import not_here

import avmm

pytestmark = [pytest.mark.usefixtures("kvm"), pytest.mark.timeout(120)]

AVMM = [sys.executable, "-m", "avmm", "run"]
HELLO = "echo HELLO FROM GUEST\nreboot"
SHELL = "exec sh"


@pytest.fixture(scope="module")
def vmlinux() -> Path:
    try:
        return kernel.vmlinux()
    except LabError as error:
        not_here(str(error))


@pytest.fixture(scope="module")
def smp_vmlinux() -> Path:
    try:
        return kernel.vmlinux(smp=True)
    except LabError as error:
        not_here(str(error))


def run(kernel: Path, initrd: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [*AVMM, str(kernel), "--initrd", str(initrd), "--memory", "32M", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.timeout(900)  # the kernel may have to be built
def test_linux_says_hello_and_reboots(vmlinux: Path, tmp_path: Path) -> None:
    initrd = userspace.initrd(tmp_path / "initrd", HELLO)
    done = run(vmlinux, initrd, "--cmdline", CMDLINE + " quiet")
    assert "HELLO FROM GUEST" in done.stdout
    assert done.returncode == 134
    assert "triple fault" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_cpus_come_up(smp_vmlinux: Path, tmp_path: Path) -> None:
    initrd = userspace.initrd(tmp_path / "initrd", HELLO)
    done = run(smp_vmlinux, initrd, "--cpus", "2", "--cmdline", CMDLINE)
    assert "Brought up 1 node, 2 CPUs" in done.stdout
    assert "HELLO FROM GUEST" in done.stdout


def test_a_shell_on_the_interrupt_driven_serial_port(vmlinux: Path, tmp_path: Path) -> None:
    initrd = userspace.initrd(tmp_path / "initrd", SHELL)
    command = [*AVMM[1:], str(vmlinux), "--initrd", str(initrd), "--memory", "32M"]
    cmdline = f"{CMDLINE} quiet"
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
    assert child.exitstatus == 134


SHELL_ON_CONSOLE = "exec sh < /dev/console > /dev/console 2>&1"


@pytest.mark.usefixtures("fitting_engine")
def test_a_shell_on_the_virtio_console(vmlinux: Path, tmp_path: Path) -> None:
    initrd = userspace.initrd(tmp_path / "initrd", SHELL_ON_CONSOLE)
    command = [*AVMM[1:], str(vmlinux), "--initrd", str(initrd), "--memory", "32M"]
    options = ["--no-acpi", "--rng", "--console", "virtio", "--cmdline", f"{CMDLINE} quiet"]
    child = pexpect.spawn(
        AVMM[0], [*command, *options], timeout=60, encoding="utf-8", dimensions=(33, 77)
    )
    try:
        child.expect_exact("# ")
        child.send("echo $((6 * 7))\r")
        child.expect_exact("42\r\n")
        child.send("cat /sys/bus/virtio/devices/*/device\r")
        child.expect(r"0x0003\s+0x0004")
        child.expect_exact("# ")
        child.send("cat /proc/interrupts\r")
        child.expect(r"5:\s+(\d+).*virtio0")
        assert int(child.match[1]) > 0
        child.expect_exact("# ")
        child.send("cat /proc/cmdline\r")
        child.expect(r"virtio_mmio.device=0x200@0xc0000000:5 ")
        child.expect_exact("# ")
        child.send("exit\r")
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)
    assert child.exitstatus == 134


@pytest.mark.slow
async def test_saved_and_loaded_in_the_midst_of_console_output(
    vmlinux: Path, tmp_path: Path
) -> None:
    """Each state is taken while output is under way, in rings and buffers: no line is lost or
    comes twice, and what is typed goes on to arrive."""
    script = (
        "exec < /dev/hvc0 > /dev/hvc0 2>&1\n"
        "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done\n"
        "echo ready; read word; echo got $word"
    )
    initrd = userspace.initrd(tmp_path / "initrd", script)
    settings = {"memory": "32M", "acpi": False, "initrd": initrd, "kernel": vmlinux}
    cmdline, output, state = f"{CMDLINE} quiet", b"", None
    for rounds in range(5):
        places = [avmm.virtio(avmm.Console())]
        machine = avmm.Machine(devices=places, state=state, cmdline=cmdline, **settings)
        async with machine as vm:
            await vm.console.aclose()
            port = vm.ports["hvc0"]
            if rounds < 4:
                end = len(output) + 2000
                while len(output) < end:
                    output += await port.receive_some(500)
                await trio.sleep(0.05)
                async with vm.paused(deadline=10):
                    state = vm.save()
                continue
            while b"ready" not in output:
                output += await port.receive_some()
            await port.send_all(b"word\n")
            while b"got word" not in output:
                output += await port.receive_some()
    lines = output.replace(b"\r", b"").split(b"\n")
    assert [line for line in lines if line.startswith(b"line")] == [
        b"line %d" % n for n in range(2000)
    ]


@pytest.mark.slow
async def test_a_megabyte_each_way_by_a_second_port(vmlinux: Path, tmp_path: Path) -> None:
    script = (
        "while [ ! -c /dev/vport0p1 ]; do sleep 1; done\n"
        "cat 0<>/dev/vport0p1 1>&0\n"  # a port can be opened once
        "reboot"
    )
    initrd = userspace.initrd(tmp_path / "initrd", script)
    data = random.Random(1).randbytes(1 << 20)
    received = bytearray()
    async with avmm.Machine(
        kernel=vmlinux,
        initrd=initrd,
        memory="32M",
        acpi=False,
        cmdline=f"{CMDLINE} quiet",
        devices=[avmm.virtio(avmm.Console(avmm.Port("hvc0", console=True), avmm.Port("data")))],
    ) as vm:
        port = vm.ports["data"]
        await port.opened()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.send_all, data)
            while len(received) < len(data):
                received += await port.receive_some()
        await port.aclose()  # the guest's cat ends
        assert (await vm.wait()).cause is avmm.Cause.TRIPLE_FAULT
    assert bytes(received) == data


@pytest.mark.slow
def test_bench_boot_compares_with_qemu(vmlinux: Path, tmp_path: Path) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed")
    initrd = userspace.initrd(tmp_path / "initrd", HELLO)
    files = [str(vmlinux), "--initrd", str(initrd), "--memory", "32M"]
    command = [*AVMM[:-1], "bench", "boot", *files, "--cmdline", CMDLINE + " quiet"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--json"], capture_output=True, timeout=100, check=False
    )
    (row,) = json.loads(done.stdout)
    assert row["ratio"] == pytest.approx(row["us"] / row["raw_us"])
