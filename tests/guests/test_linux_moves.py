"""A Linux that writes to its disk while it goes from machine to machine, and is restored."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio
from lab.cache import LabError
from linux import kernel, userspace
from linux.kernel import CMDLINE
from support.ext2 import ext2, from_ext2
from support.required import not_here

import avmm

pytestmark = [pytest.mark.usefixtures("kvm", "nothing_left"), pytest.mark.timeout(900)]

FILES = 24
SCRIPT = f"""
exec > /dev/console 2>&1
mount -t ext2 /dev/vda /mnt
i=1
while [ $i -le {FILES} ]; do
    echo number $i > /mnt/file$i
    sync
    echo line $i up $(cat /proc/uptime)
    i=$((i+1))
done
umount /mnt
dmesg | grep -e stall -e hung -e "clocksource.*unstable" && echo COMPLAINED
echo FINISHED
reboot
"""


@pytest.fixture(scope="module")
def vmlinux() -> Path:
    try:
        return kernel.vmlinux()
    except LabError as error:
        not_here(str(error))


class Reader:
    """The console of one guest, in whichever machine it is."""

    def __init__(self) -> None:
        self.text = ""

    async def until(self, vm: avmm.Machine, what: str) -> None:
        with trio.fail_after(120):
            while what not in self.text:
                data = await vm.console.receive_some()
                assert data, self.text
                self.text += data.decode()

    def check(self) -> None:
        """Every line once, in order, and time never went back."""
        words = [line.split() for line in self.text.splitlines() if line.startswith("line ")]
        assert [int(word[1]) for word in words] == list(range(1, FILES + 1))
        ups = [float(word[3]) for word in words]
        assert ups == sorted(ups)
        assert "COMPLAINED" not in self.text


def check_disk(image: Path) -> None:
    checked = subprocess.run(["e2fsck", "-fn", image], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout
    for number in range(1, FILES + 1):
        assert from_ext2(image, f"file{number}") == b"number %d\n" % number


@pytest.mark.slow
async def test_a_linux_that_moves_and_is_restored(vmlinux: Path, tmp_path: Path) -> None:
    """Its disk is locked by whoever runs it: the lock goes over, too."""
    empty = tmp_path / "empty"
    empty.mkdir()
    image, saved = tmp_path / "image", tmp_path / "saved"
    ext2(image, empty)
    reader = Reader()
    machine = avmm.Machine(
        kernel=vmlinux,
        initrd=userspace.initrd(tmp_path / "initrd", SCRIPT),
        memory="32M",
        acpi=False,
        cmdline=f"{CMDLINE} quiet",
        disks=[str(image)],
    )
    hops = [6, 9, 12, 15, 18]

    async def from_here(vm: avmm.Machine) -> None:
        if not hops:
            await reader.until(vm, "FINISHED")
            assert (await vm.wait()).cause is avmm.Cause.TRIPLE_FAULT
            return
        await reader.until(vm, f"line {hops.pop(0)} ")
        near, far = (trio.SocketStream(end) for end in trio.socket.socketpair())
        async with near, far, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def arrive() -> None:
                async with avmm.receive(far, disks=[str(image)]) as twin:
                    await moved.wait()
                    await from_here(twin)

            moved = trio.Event()
            await vm.migrate(near)
            assert (await vm.wait()).cause is avmm.Cause.MOVED
            moved.set()

    for line in (2, 3, 4):
        async with machine as vm:
            await reader.until(vm, f"line {line} ")
            async with vm.paused(deadline=20):
                await vm.snapshot(saved)  # in the place of the one that it came from
                vm.stop()
        machine = avmm.restore(saved, disks=[str(image)])
    async with machine as vm:
        await from_here(vm)
    reader.check()
    check_disk(image)
