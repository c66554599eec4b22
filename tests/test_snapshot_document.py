"""A snapshot is what docs/snapshot-format.md says: read here by a reader written from that alone,
which shares no code with avmm."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
import xxhash

import avmm
from avmm import snapshot
from avmm.memory.layout import RamLayout

pytestmark = [pytest.mark.usefixtures("kvm", "nothing_left"), pytest.mark.timeout(60)]

CHUNK = 2 << 20
MARK = 0x300000


class File:
    """The parts of a snapshot; asserts what the format says of it."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        assert data[:8] == b"AVMMSNAP"
        assert struct.unpack_from("<II", data, 8) == (1, 4096)
        at, size, sums_at, sums_size, body_at, body_size, whole, sums_sum, body_sum, own_sum = (
            struct.unpack_from("<10Q", data, 16)
        )
        assert own_sum == xxhash.xxh3_64_intdigest(data[:88])
        assert not any(data[96:4096])
        assert whole == len(data)
        assert (at, sums_at, body_at) == (4096, 4096 + size, sums_at + sums_size)
        assert (body_at + body_size, sums_size) == (whole, 8 * -(-size // CHUNK))
        self.ram = data[at : at + size]
        sums = data[sums_at : sums_at + sums_size]
        assert xxhash.xxh3_64_intdigest(sums) == sums_sum
        for number, (value,) in enumerate(struct.iter_unpack("<Q", sums)):
            chunk = self.ram[number * CHUNK : (number + 1) * CHUNK]
            assert value == (xxhash.xxh3_64_intdigest(chunk) if any(chunk) else 0), number
        body = data[body_at : body_at + body_size]
        assert xxhash.xxh3_64_intdigest(body) == body_sum
        self.body: dict[str, Any] = msgpack.unpackb(body)
        assert list(self.body) == ["description", "state"]


def with_body(path: Path, body: dict[str, Any]) -> None:
    """The same snapshot with another body, its sums right."""
    data = path.read_bytes()
    at, size, sums_at, sums_size, body_at, _, _, sums_sum, *_ = struct.unpack_from(
        "<10Q", data, 16
    )
    new = msgpack.packb(body)
    fields = (at, size, sums_at, sums_size, body_at, len(new), body_at + len(new), sums_sum)
    header = data[:16] + struct.pack("<9Q", *fields, xxhash.xxh3_64_intdigest(new))
    header += struct.pack("<Q", xxhash.xxh3_64_intdigest(header))
    path.write_bytes(header.ljust(4096, b"\0") + data[4096:body_at] + new)


async def taken(path: Path, memory: str = "5M") -> None:
    async with avmm.Machine(memory=memory, cpus=2, rng=True) as vm:
        await vm.console.send_all(b"echo ready\r")
        said = b""
        while b"\r\nready\r\n" not in said:
            said += await vm.console.receive_some()
        vm.memory.write(MARK, b"here it is")
        await vm.snapshot(path)


@pytest.mark.lab
async def test_a_snapshot_is_as_its_format_says(tmp_path: Path) -> None:
    """RAM that is no multiple of a chunk, two vCPUs, a virtio device."""
    path = tmp_path / "guest.snap"
    await taken(path)
    assert path.stat().st_blocks * 512 < path.stat().st_size, "zeros are holes"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    file = File(path)
    assert len(file.ram) == 5 << 20
    assert file.ram[MARK : MARK + 10] == b"here it is"
    description, state = file.body["description"], file.body["state"]
    assert (description["version"], description["state"], state["version"]) == (2, 2, 2)
    assert all(type(device["version"]) is int for _, device in state["devices"])
    assert description["settings"]["memory"] == state["memory_size"] == 5 << 20
    names = [entry[0] for entry in description["devices"]]
    assert [name for name, _ in state["devices"]] == list(dict.fromkeys(names))
    assert names[-1] == "virtio rng"
    assert len(state["vcpus"]) == 2


async def test_holes_may_be_made_and_filled(tmp_path: Path) -> None:
    """By programs that copy the file: zeros have one checksum, wherever they are."""
    path, filled, sparse = (tmp_path / name for name in ("guest.snap", "filled", "sparse"))
    await taken(path)
    filled.write_bytes(path.read_bytes())
    shutil.copyfile(filled, sparse)
    await trio.run_process(["fallocate", "--dig-holes", str(sparse)])
    assert filled.stat().st_blocks > path.stat().st_blocks
    for copy in (filled, sparse):
        snapshot.read(copy, verify=True).open_memory(RamLayout()).close()
        async with avmm.restore(copy, verify=True) as vm:
            await vm.console.send_all(b"exit 3\r")
            assert (await vm.wait()).status == 3


async def test_zeros_that_were_written_may_become_a_hole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no holes can be made, zeros are written over what there was before."""
    monkeypatch.setattr(snapshot, "_is_hole", lambda fd, offset, length: False)
    path = tmp_path / "guest.snap"
    await taken(path)
    monkeypatch.undo()
    File(path)
    snapshot.read(path, verify=True).open_memory(RamLayout()).close()


@pytest.mark.parametrize("size", [4 << 20, 6 << 20, 1 << 40])
async def test_a_description_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "guest.snap"
    await taken(path)
    body = File(path).body
    body["description"]["settings"]["memory"] = size
    with_body(path, body)
    with pytest.raises(avmm.StateError, match="bytes of RAM"):
        async with avmm.restore(path):
            pytest.fail("this is no machine")
