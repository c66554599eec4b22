"""Linux on virtio disks: file systems and raw bytes that both sides agree on."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from lab.cache import LabError
from linux import kernel, userspace
from linux.kernel import CMDLINE
from support.ext2 import ext2, from_ext2
from support.required import not_here

import avmm

pytestmark = [pytest.mark.usefixtures("kvm", "fitting_engine"), pytest.mark.timeout(900)]

AVMM = [sys.executable, "-m", "avmm", "run"]


@pytest.fixture(scope="module")
def vmlinux() -> Path:
    try:
        return kernel.vmlinux()
    except LabError as error:
        not_here(str(error))


def run(vmlinux: Path, folder: Path, script: str, *disks: str) -> str:
    initrd = userspace.initrd(folder / "initrd", f"{script}\nreboot")
    options = [option for disk in disks for option in ("--disk", disk)]
    command = [*AVMM, str(vmlinux), "--initrd", str(initrd), "--memory", "32M", "--no-acpi"]
    done = subprocess.run(
        [*command, *options, "--cmdline", CMDLINE + " quiet"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 134, done.stderr
    return done.stdout


def test_a_file_system_of_both_sides(vmlinux: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "hello").write_text("WRITTEN BY THE HOST\n")
    big = os.urandom(300_000)
    (root / "big").write_bytes(big)
    image = tmp_path / "image"
    ext2(image, root)
    script = """
        mount -t ext2 /dev/vda /mnt
        cat /mnt/hello /sys/block/vda/serial
        dd if=/mnt/big of=/mnt/copy bs=64k
        echo written by the guest > /mnt/reply
        umount /mnt
    """
    out = run(vmlinux, tmp_path, script, f"{image},serial=both-sides")
    assert "WRITTEN BY THE HOST" in out
    assert "both-sides" in out
    checked = subprocess.run(["e2fsck", "-fn", image], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert from_ext2(image, "reply") == b"written by the guest\n"
    assert hashlib.sha1(from_ext2(image, "copy")).digest() == hashlib.sha1(big).digest()


@pytest.mark.slow
def test_raw_bytes_and_the_order_of_disks(vmlinux: Path, tmp_path: Path) -> None:
    """vda is read-only, vdb takes its bytes, vdc's are thrown away."""
    data = os.urandom(1 << 20)
    files = [tmp_path / name for name in ("a", "b", "c")]
    for path, content in zip(files, (data, bytes(1 << 20), b"c" * (1 << 20)), strict=True):
        path.write_bytes(content)
    script = """
        dd if=/dev/vda of=/dev/vdb bs=32k
        dd if=/dev/vdb of=/dev/vdc bs=128k
        cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdc/serial
        sync
    """
    disks = (f"{files[0]},ro", f"{files[1]}", f"{files[2]},overlay")
    out = run(vmlinux, tmp_path, script, *disks)
    assert "1\n0\ndisk2" in out.replace("\r", "")
    assert hashlib.sha1(files[1].read_bytes()).digest() == hashlib.sha1(data).digest()
    assert files[0].read_bytes() == data
    assert files[2].read_bytes() == b"c" * (1 << 20)


class Remote(avmm.Disk):
    """An embedder's disk: each answer comes from afar."""

    name, size, contents_stay = "remote", 1 << 20, True

    def __init__(self) -> None:
        self.data = bytearray(os.urandom(self.size))
        self.asked = 0
        self.next_answer = trio.Event()

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.asked += 1
        await trio.sleep(0.01)
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)
        self.next_answer.set()
        self.next_answer = trio.Event()

    async def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.asked += 1
        await trio.sleep(0.01)
        data = b"".join(buffers)
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        await trio.sleep(0.01)


@pytest.mark.slow
async def test_pauses_while_linux_copies(vmlinux: Path, tmp_path: Path) -> None:
    """Between two disks of an embedder's: paused after each answer of the first one, saved,
    loaded."""
    initrd = userspace.initrd(
        tmp_path / "initrd", "dd if=/dev/vda of=/dev/vdb bs=16k\nsync\nreboot"
    )
    disks = Remote(), Remote()
    state = None
    outcome = None
    pauses = 0
    while outcome is None:
        async with (
            avmm.Machine(
                kernel=vmlinux,
                initrd=initrd,
                memory="32M",
                acpi=False,
                cmdline=CMDLINE + " quiet",
                devices=[avmm.virtio(avmm.VirtioBlock(disk)) for disk in disks],
                state=state,
            ) as vm,
            trio.open_nursery() as nursery,
        ):

            @nursery.start_soon
            async def drain() -> None:
                async for _ in vm.console:
                    pass

            for _ in range(4):
                answer = disks[0].next_answer
                async with trio.open_nursery() as first:

                    @first.start_soon
                    async def end(first: trio.Nursery = first) -> None:
                        nonlocal outcome
                        outcome = await vm.wait()
                        first.cancel_scope.cancel()

                    await answer.wait()
                    first.cancel_scope.cancel()
                if outcome is not None:
                    break
                async with vm.paused(deadline=20):
                    pauses += 1
            if outcome is None:
                async with vm.paused(deadline=20):
                    state = vm.save()
            nursery.cancel_scope.cancel()
    assert pauses > 3
    assert disks[1].data == disks[0].data


async def test_a_disk_that_does_not_answer_is_named(vmlinux: Path, tmp_path: Path) -> None:
    class Stuck(Remote):
        release = trio.Event()

        async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
            self.asked += 1
            with trio.CancelScope(shield=True):
                await self.release.wait()
            await super().read(offset, buffers)

    initrd = userspace.initrd(
        tmp_path / "initrd", "dd if=/dev/vda of=/tmp/one count=1\nsleep 1000"
    )
    disk = Stuck()
    async with avmm.Machine(
        kernel=vmlinux,
        initrd=initrd,
        memory="32M",
        acpi=False,
        cmdline=CMDLINE + " quiet",
        devices=[avmm.virtio(avmm.VirtioBlock(disk, serial="slow"))],
    ) as vm:
        with trio.fail_after(60):
            while not disk.asked:  # noqa: ASYNC110 - the guest sets no event
                await trio.sleep(0.05)
        with pytest.raises(avmm.PauseTimeout, match="disk slow"):
            async with vm.paused(deadline=0.2):
                pass
        disk.release.set()
        async with vm.paused(deadline=20):
            pass
