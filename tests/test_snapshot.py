"""Snapshots as files: damaged ones, hostile ones, and ones that could not be written."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import stat
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import xxhash
from support.previous import previous_description, previous_state

import avmm
from avmm import snapshot
from avmm.errors import AvmmError, ConfigError, DeviceError, SnapshotError, StateError
from avmm.memory.pages import PAGE
from avmm.plain import encode
from avmm.snapshot import CHUNK, HEADER_BYTES, Header

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("kvm", "nothing_left"),
]


@pytest.fixture
async def snap(tmp_path: Path) -> Path:
    path = tmp_path / "guest.snap"
    async with avmm.Machine(memory="8M") as vm:
        await vm.console.receive_some()
        await vm.snapshot(path)
    return path


def header_of(path: Path) -> Header:
    with path.open("rb") as file:
        return Header.unpack(file.read(HEADER_BYTES), path.stat().st_size, path.name)


def change(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << at % 8]))


def refused(path: Path, why: str, *, verify: bool = False) -> None:
    with pytest.raises(SnapshotError, match=f"^snapshot {path}: .*{why}"):
        snapshot.read(path, verify=verify)


async def runs(path: Path, **settings: Any) -> None:
    async with avmm.restore(path, **settings) as vm:
        await vm.console.send_all(b"exit 9\r")
        assert (await vm.wait()).status == 9


async def test_it_goes_on_however_often(snap: Path) -> None:
    before = snap.read_bytes()
    for verify in (False, True):
        await runs(snap, verify=verify)
    assert snap.read_bytes() == before


async def test_its_length_is_told(snap: Path) -> None:
    header = header_of(snap)
    assert header.file_bytes == snap.stat().st_size
    for length in (0, 5):
        os.truncate(snap, length)
        refused(snap, "this is not a snapshot")


async def test_cut_off_anywhere(snap: Path) -> None:
    header = header_of(snap)
    edges = (HEADER_BYTES, header.sums_offset, header.body_offset, header.file_bytes)
    lengths = {8, 100, HEADER_BYTES - 1, *edges, *(edge - 1 for edge in edges)}
    for length in sorted(lengths - {header.file_bytes}, reverse=True):
        os.truncate(snap, length)
        refused(snap, "it (is|was) cut off")


async def test_something_after_its_end(snap: Path) -> None:
    with snap.open("ab") as file:
        file.write(b"x")
    refused(snap, "bytes long, expected")


async def test_every_flipped_byte_of_header_and_body(snap: Path) -> None:
    header = header_of(snap)
    moments = random.Random(1)
    body = range(header.body_offset, header.file_bytes)
    places = [*range(96), *moments.sample(body, 300), body[0], body[-1]]
    for at in places:
        flip(snap, at)
        refused(snap, "")
        flip(snap, at)
    await runs(snap)


async def test_flipped_bytes_of_ram_and_its_sums_are_found_by_verify(snap: Path) -> None:
    header = header_of(snap)
    moments = random.Random(2)
    for _ in range(20):
        at = moments.randrange(header.memory_bytes)
        flip(snap, header.memory_offset + at)
        chunk = at // CHUNK * CHUNK
        refused(snap, f"its RAM is damaged, at {chunk:#x} to {chunk + CHUNK:#x}", verify=True)
        flip(snap, header.memory_offset + at)
    for at in range(header.sums_offset, header.sums_offset + header.sums_bytes):
        flip(snap, at)
        refused(snap, "a checksum is wrong", verify=True)
        flip(snap, at)
    await runs(snap, verify=True)


@pytest.mark.parametrize("how", ["--sparse=never", "--sparse=always"])
async def test_a_copy_is_as_good(snap: Path, tmp_path: Path, how: str) -> None:
    """Holes become zeros, or zeros holes."""
    copy = tmp_path / "copy"
    await trio.run_process(["cp", how, snap, copy])
    await runs(copy, verify=True)


@pytest.mark.parametrize("version", [0, 2, 0xFFFF_FFFF])
async def test_other_versions(snap: Path, version: int) -> None:
    change(snap, 8, struct.pack("<I", version))
    refused(snap, f"format version {version}; this avmm reads 1")


HUGE = (1 << 64) - PAGE
LIES: dict[str, Callable[[Header], Header]] = {
    "memory too long": lambda h: replace(h, memory_bytes=HUGE),
    "memory and sums too long": lambda h: replace(
        h, memory_bytes=1 << 50, sums_bytes=8 * ((1 << 50) // CHUNK)
    ),
    "memory far away": lambda h: replace(h, memory_offset=HUGE),
    "memory in the header": lambda h: replace(h, memory_offset=0),
    "memory between pages": lambda h: replace(h, memory_offset=h.memory_offset + 1),
    "half a page": lambda h: replace(h, memory_bytes=h.memory_bytes - 1),
    "body too long": lambda h: replace(h, body_bytes=HUGE),
    "body after the end": lambda h: replace(h, body_offset=h.file_bytes),
    "no body": lambda h: replace(h, body_bytes=0),
    "too few sums": lambda h: replace(h, sums_bytes=h.sums_bytes - 8),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
async def test_a_header_that_lies(snap: Path, lie: Callable[[Header], Header]) -> None:
    """With a right checksum. Nothing is made of what it says."""
    change(snap, 0, lie(header_of(snap)).pack())
    tracemalloc.start()
    try:
        refused(snap, "parts that cannot be")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1 << 20


async def test_a_long_body_of_holes_takes_no_memory(snap: Path) -> None:
    """The file is as long as it says, and takes no room."""
    header, length = header_of(snap), 256 << 20
    end = header.body_offset + length
    os.truncate(snap, header.body_offset)
    os.truncate(snap, end)
    change(snap, 0, replace(header, body_bytes=length, file_bytes=end).pack())
    tracemalloc.start()
    try:
        refused(snap, "a checksum is wrong")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1 << 20


def rewrite(path: Path, content: object) -> None:
    """With this body, and all checksums right."""
    header, body = header_of(path), encode(content)
    os.truncate(path, header.body_offset)
    change(path, header.body_offset, body)
    header = replace(
        header,
        body_bytes=len(body),
        file_bytes=header.body_offset + len(body),
        body_sum=xxhash.xxh3_64_intdigest(body),
    )
    change(path, 0, header.pack())


async def test_bodies_that_hold_something_else(snap: Path) -> None:
    opened = snapshot.read(snap)
    opened.close()
    content: object
    for content, why in (
        ([], "its body is a list of 0, expected a mapping"),
        ({}, "its body lacks description, state, expected the keys description, state"),
        ({"state": 1}, "its body lacks description, expected the keys description, state"),
        (
            {"description": {}, "state": {}, "more": 1},
            "its body has 'more', expected the keys description, state",
        ),
        (
            {"description": opened.description, "state": None},
            "its body: state is None, expected a mapping",
        ),
    ):
        rewrite(snap, content)
        refused(snap, why)
    told = opened.description
    for description in (
        None,
        {},
        told | {"version": 3},
        told | {"more": 1},
        told | {"disks": [{"name": "/etc/passwd"}]},
        told | {"settings": told["settings"] | {"memory": -1}},
        told | {"settings": told["settings"] | {"memory": 16 << 20}},
        told | {"settings": told["settings"] | {"cpus": "1"}},
        told | {"settings": told["settings"] | {"kernel": "/etc/passwd"}},
        told | {"devices": []},
        told | {"devices": [5]},
        told | {"roms": [[5, b"x"]]},
        told | {"roms": [[-4096, b"x"]]},
    ):
        rewrite(snap, {"description": description, "state": opened.state})
        with pytest.raises((StateError, ConfigError)):
            async with avmm.restore(snap):
                pytest.fail(f"{description} was taken")
    for state in ({}, opened.state | {"version": 3}, opened.state | {"vcpus": []}):
        rewrite(snap, {"description": told, "state": state})
        with pytest.raises(StateError):
            async with avmm.restore(snap):
                pytest.fail(f"{state} was taken")
    rewrite(snap, {"description": told, "state": opened.state})
    await runs(snap)


async def test_one_of_the_previous_version_is_refused_before_anything_is_opened(
    tmp_path: Path,
) -> None:
    disk, snap = tmp_path / "disk", tmp_path / "snap"
    disk.write_bytes(bytes(4096))
    devices: dict[str, Any] = {"disks": [f"{disk},overlay"], "vsock": "cid=3"}
    async with avmm.Machine(memory="8M", rng=True, **devices) as vm:
        await vm.snapshot(snap)
    opened = snapshot.read(snap)
    opened.close()
    state = previous_state(opened.state)
    rewrite(snap, {"description": previous_description(opened.description), "state": state})
    disk.unlink()
    with pytest.raises(StateError, match=r"^the machine's description has version 1, expected 2$"):
        async with avmm.restore(snap, **devices):
            pytest.fail("it was taken")
    disk.write_bytes(bytes(4096))
    rewrite(snap, {"description": opened.description, "state": state})
    with pytest.raises(StateError, match=r"^the machine's state has version 1, expected 2$"):
        async with avmm.restore(snap, **devices):
            pytest.fail("it was taken")
    for number, (name, device) in enumerate(state["devices"]):
        if device != opened.state["devices"][number][1]:
            devices_of_old = list(opened.state["devices"])
            devices_of_old[number] = [name, device]
            body = opened.state | {"devices": devices_of_old}
            rewrite(snap, {"description": opened.description, "state": body})
            with pytest.raises(DeviceError, match=r"'s state has no version, expected \d$"):
                async with avmm.restore(snap, **devices):
                    pytest.fail(f"{name}'s was taken")
    rewrite(snap, {"description": opened.description, "state": opened.state})
    await runs(snap, **devices)


async def test_what_is_missing_is_asked_for_and_nothing_is_left_open(tmp_path: Path) -> None:
    disk, snap = tmp_path / "disk", tmp_path / "snap"
    disk.write_bytes(bytes(4096))
    settings: dict[str, Any] = {"disks": [str(disk)], "vsock": "cid=3"}
    async with avmm.Machine(memory="8M", **settings) as vm:
        await vm.snapshot(snap)
    for given, why in (
        ({}, f"the guest has 1 disk .*{disk.name}.* got 0"),
        ({"disks": [str(disk)]}, "socket device, with CID 3: expected vsock"),
        ({"disks": [f"{disk},ro"], "vsock": "cid=3"}, "is writable"),
        ({"disks": [f"{disk},overlay"], "vsock": "cid=3"}, "is no overlay"),
        (settings | {"net": ["tap=x"]}, "0 network devices"),
    ):
        machine = avmm.restore(snap, **given)
        with pytest.raises(ConfigError, match=why):
            async with machine:
                pytest.fail(f"{given} was taken")
        assert machine.state is avmm.Runstate.FAILED
    with pytest.raises(ConfigError, match="cpus: the guest has seen it"):
        avmm.restore(snap, **settings | {"cpus": 2})
    await runs(snap, **settings)


async def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    disk = tmp_path / "disk\udcff"
    disk.write_bytes(bytes(4096))
    async with avmm.Machine(memory="8M", disks=[avmm.DiskOptions(disk)]) as vm:
        await vm.snapshot(tmp_path / "snap")
    await runs(tmp_path / "snap", disks=[avmm.DiskOptions(disk)])


# -- writing -------------------------------------------------------------------------------


async def test_a_full_file_system_leaves_the_snapshot_that_was_there(
    snap: Path, full_up_to: Callable[[int], Path]
) -> None:
    mine = full_up_to(4 * snap.stat().st_blocks * 512) / "snap"
    async with avmm.Machine(memory="8M") as vm:
        await vm.console.receive_some()
        await vm.snapshot(mine)
        before, size = mine.read_bytes(), mine.stat().st_blocks * 512
        for room in (PAGE, size // 2, size - PAGE):
            full_up_to(room)
            with pytest.raises(SnapshotError, match=f"snapshot {mine}: No space left on device"):
                await vm.snapshot(mine)
            assert mine.read_bytes() == before
            assert {path.name for path in mine.parent.iterdir()} == {"snap", "filler"}
        full_up_to(2 * size)
        await vm.snapshot(mine)
        await vm.console.send_all(b"exit 4\r")
        assert (await vm.wait()).status == 4
    await runs(mine, verify=True)


@pytest.fixture
def most_file_bytes() -> Iterator[Callable[[int], None]]:
    """Sets a limit for files: what a full file system does, at any byte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_full_disk_leaves_the_snapshot_that_was_there(
    snap: Path, tmp_path: Path, most_file_bytes: Callable[[int], None]
) -> None:
    before, size = snap.read_bytes(), snap.stat().st_size
    body = header_of(snap).body_offset
    async with avmm.Machine(memory="8M") as vm:
        await vm.console.receive_some()
        for most in (0, HEADER_BYTES, body - 1, body, body + 100, size // 2):
            most_file_bytes(most)
            with pytest.raises(SnapshotError, match=f"snapshot {snap}: File too large"):
                await vm.snapshot(snap)
            most_file_bytes(resource.RLIM_INFINITY)
            assert snap.read_bytes() == before
            assert list(tmp_path.iterdir()) == [snap]
        await vm.snapshot(snap)
        await vm.console.send_all(b"exit 4\r")
        assert (await vm.wait()).status == 4
    await runs(snap, verify=True)


async def test_cancelled_at_each_checkpoint(snap: Path, tmp_path: Path) -> None:
    """The old one is there, or the new one, and the guest runs on."""
    number, cancelled, is_over = 0, 0, False
    async with avmm.Machine(memory="8M") as vm:
        await vm.console.receive_some()
        while not is_over:
            number += 1
            passed = 0

            class Count(trio.abc.Instrument):
                def before_task_step(self, task: trio.lowlevel.Task) -> None:
                    nonlocal passed
                    passed += task is mine  # noqa: B023 - used within its round
                    if passed == number:  # noqa: B023
                        scope.cancel()

            mine, count = trio.lowlevel.current_task(), Count()
            with trio.CancelScope() as scope:
                trio.lowlevel.add_instrument(count)
                try:
                    await vm.snapshot(snap)
                finally:
                    trio.lowlevel.remove_instrument(count)
            is_over = passed < number
            cancelled += scope.cancelled_caught
            assert list(tmp_path.iterdir()) == [snap]
            snapshot.read(snap, verify=True).close()
            await vm.console.send_all(b"echo on\r")
            said = b""
            while not said.endswith(b"on\r\navmm> "):
                said += await vm.console.receive_some()
    assert cancelled > 5
    await runs(snap)


WRITER = """
import sys, trio, avmm

async def main():
    async with avmm.Machine(memory="8M") as vm:
        await vm.console.receive_some()
        print("begins", flush=True)
        while True:
            await vm.snapshot(sys.argv[1])

trio.run(main)
"""


@pytest.mark.lab(long=True)
async def test_killed_while_it_writes(snap: Path, tmp_path: Path) -> None:
    """Whenever that is, the file is a whole snapshot; what is left besides may be deleted."""
    moments, partials = random.Random(1), 0
    for number in range(12):
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", WRITER, str(snap)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        async with process.stdout:
            assert await process.stdout.receive_some()
            if number % 3 == 0:  # while there is such a file, for certain but for its last moment
                while not list(tmp_path.glob(".avmm-*.partial")):
                    await trio.lowlevel.checkpoint()
            else:
                await trio.sleep(moments.random() * 0.05)
            process.kill()
            await process.wait()
        snapshot.read(snap, verify=True).close()
        for path in tmp_path.glob(".avmm-*.partial"):
            path.unlink()
            partials += 1
        assert list(tmp_path.iterdir()) == [snap]
    assert partials, "none was killed in the midst of writing"
    await runs(snap)


async def test_a_link_leads_to_the_file_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    there = tmp_path / "folder" / "there"
    for link, to in (("link", there), ("second", tmp_path / "link"), ("relative", "folder/there")):
        (tmp_path / link).symlink_to(to)
        async with avmm.Machine(memory="8M") as vm:
            await vm.snapshot(tmp_path / link)
        assert (tmp_path / link).is_symlink()
        await runs(there)
        there.unlink()


async def test_a_name_may_be_as_long_as_names_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    async with avmm.Machine(memory="8M") as vm:
        await vm.snapshot(path)
    assert list(tmp_path.iterdir()) == [path]


async def test_a_folder_that_cannot_be_flushed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a file system that refuses that, or in a folder that may be written and not read."""
    fsync = os.fsync

    def refuse(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    async with avmm.Machine(memory="8M") as vm:
        await vm.snapshot(tmp_path / "snap")
    assert "its folder cannot be flushed: Invalid argument" in caplog.text
    await runs(tmp_path / "snap")


async def test_a_file_that_somebody_has_locked_is_named(snap: Path) -> None:
    with snap.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(snap, "another program has locked it")


async def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    async with avmm.Machine(memory="8M") as vm:
        for name, why in (
            ("/", "expected the name of a file"),
            ("pipe", "expected a regular file or nothing there, not a device, pipe or socket"),
            ("link", "expected a regular file or nothing there, not a device, pipe or socket"),
            ("missing/snap", "No such file"),
            ("folder", "Is a directory"),
            ("x" * 256, "File name too long"),
        ):
            with pytest.raises(SnapshotError, match=why):
                await vm.snapshot(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "pipe", "link"}
    assert (tmp_path / "pipe").is_fifo()
    for name, why in (("missing", "No such file"), ("folder", "Is a directory")):
        refused(tmp_path / name, why)


async def test_a_file_that_is_cut_off_under_a_restored_guest_is_the_hosts_failure(
    snap: Path,
) -> None:
    with pytest.raises(AvmmError, match=r"host (could not|cannot) provide"), trio.fail_after(60):
        async with avmm.restore(snap) as vm:
            async with vm.paused():
                os.truncate(snap, 3 * PAGE)
            await vm.console.send_all(b"echo hi\r")
            await vm.wait()
