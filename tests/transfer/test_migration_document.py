"""The protocol is what docs/migration.md says: a destination written from that alone, which shares
no code with avmm, takes a guest and its source believes it."""

from __future__ import annotations

import socket
import struct
from enum import Enum
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
import xxhash

import avmm
from avmm.outcome import Cause
from avmm.transfer.states import DestinationState, SourceState

pytestmark = [pytest.mark.usefixtures("kvm", "nothing_left"), pytest.mark.timeout(60)]

HELLO, OFFER, ACCEPT, ABORT, PAGES, ROUND, STATE, STATE_END, READY, COMMIT, RUNNING = range(1, 12)
PAGE = 4096
MARK = 0x300000


class Peer:
    """A destination; `taken` is the kinds of the frames that have come."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.sent = 0
        self.taken: list[int] = []
        self.rounds: list[int] = []
        self.ram = bytearray()
        self.offer: dict[str, Any] = {}
        self.state: dict[str, Any] = {}

    async def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = await self.stream.receive_some(count - len(data))
            assert more, "the line was cut"
            data += more
        return data

    async def frame(self) -> tuple[int, bytes]:
        head = await self.exactly(24)
        kind, zero, zeros, length, number, checksum = struct.unpack("<BBHIQQ", head)
        payload = await self.exactly(length)
        assert (zero, zeros, number) == (0, 0, len(self.taken))
        assert checksum == xxhash.xxh3_64_intdigest(head[:16] + payload)
        self.taken.append(kind)
        return kind, payload

    async def say(self, kind: int, payload: bytes = b"") -> None:
        head = struct.pack("<BBHIQ", kind, 0, 0, len(payload), self.sent)
        checksum = xxhash.xxh3_64_intdigest(head + payload)
        self.sent += 1
        await self.stream.send_all(head + struct.pack("<Q", checksum) + payload)

    def put(self, payload: bytes) -> None:
        (count,) = struct.unpack_from("<I", payload)
        at = 4 + 16 * count
        for page, pages, kind in struct.iter_unpack("<QII", payload[4:at]):
            assert kind in (0, 1)
            length = PAGE * pages
            data = payload[at : at + length] if kind else bytes(length)
            at += length if kind else 0
            self.ram[PAGE * page : PAGE * page + length] = data
        assert at == len(payload)

    async def until_ready(self) -> bytes:
        """Up to READY; the migration's identity."""
        kind, payload = await self.frame()
        hello = msgpack.unpackb(payload)
        assert (kind, hello["versions"], len(hello["identity"])) == (HELLO, [1], 16)
        await self.say(HELLO, payload)
        kind, payload = await self.frame()
        assert kind == OFFER
        self.offer = msgpack.unpackb(payload)
        self.ram = bytearray(self.offer["description"]["settings"]["memory"])
        await self.say(ACCEPT)
        state = b""
        while (frame := await self.frame())[0] != STATE_END:
            kind, payload = frame
            if kind == PAGES:
                assert not state
                self.put(payload)
            elif kind == ROUND:
                self.rounds.append(msgpack.unpackb(payload)["number"])
            else:
                assert kind == STATE
                assert 0 < len(payload) <= 1 << 20
                state += payload
        assert msgpack.unpackb(frame[1]) == {"bytes": len(state)}
        self.state = msgpack.unpackb(state)
        await self.say(READY)
        identity: bytes = hello["identity"]
        return identity


def lines() -> list[trio.SocketStream]:
    return [trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in socket.socketpair()]


async def started(vm: avmm.Machine) -> None:
    said = b""
    while not said.endswith(b"avmm> "):
        said += await vm.console.receive_some()
    vm.memory.write(MARK, b"here it is")


async def test_a_guest_is_taken_by_who_knows_the_document_alone() -> None:
    here, there = lines()
    peer = Peer(there)
    async with (
        here,
        there,
        avmm.Machine(memory="8M", cpus=2) as vm,
        trio.open_nursery() as nursery,
    ):
        await started(vm)
        nursery.start_soon(vm.migrate, here)
        identity = await peer.until_ready()
        kind, payload = await peer.frame()
        assert (kind, msgpack.unpackb(payload)) == (COMMIT, {"identity": identity})
        assert peer.ram == bytes(vm.memory.whole), "the guest stands still, and all of it is here"
        await peer.say(RUNNING)
        assert (await vm.wait()).cause is Cause.MOVED
    assert peer.ram[MARK : MARK + 10] == b"here it is"
    assert peer.rounds == list(range(1, len(peer.rounds) + 1))
    assert len(peer.rounds) >= 2, "one while it ran, one at the standstill"
    assert [cpu["version"] for cpu in peer.offer["cpus"]] == [1, 1]
    assert set(peer.offer["cpus"][0]) == {"version", "cpuid", "msrs", "xsave", "tsc_khz"}
    description = peer.offer["description"]
    assert (description["version"], description["state"], peer.state["version"]) == (2, 2, 2)
    assert peer.state["memory_size"] == 8 << 20
    assert "memory" not in peer.state
    assert peer.taken[:2] == [HELLO, OFFER]


@pytest.mark.parametrize("after", [HELLO, OFFER])
async def test_who_gives_up_says_why_and_the_guest_runs_on(after: int) -> None:
    here, there = lines()
    peer = Peer(there)
    async with here, there, avmm.Machine(memory="8M") as vm, trio.open_nursery() as nursery:
        await started(vm)

        async def migrate() -> None:
            with pytest.raises(avmm.MigrationError, match="gave up: not on a Wednesday"):
                await vm.migrate(here)

        nursery.start_soon(migrate)
        kind, payload = await peer.frame()
        if after != kind:
            await peer.say(HELLO, payload)
            kind, _ = await peer.frame()
        assert kind == after
        await peer.say(ABORT, msgpack.packb({"why": "not on a Wednesday"}))
        await vm.console.send_all(b"exit 3\r")
        assert (await vm.wait()).status == 3


async def test_who_gives_up_when_it_has_got_commit_will_never_run_it() -> None:
    here, there = lines()
    peer = Peer(there)
    async with here, there, avmm.Machine(memory="8M") as vm, trio.open_nursery() as nursery:
        await started(vm)

        async def migrate() -> None:
            with pytest.raises(avmm.MigrationError, match="gave up: not on a Wednesday") as caught:
                await vm.migrate(here)
            assert not isinstance(caught.value, avmm.HandOverUnknownError)

        nursery.start_soon(migrate)
        await peer.until_ready()
        assert (await peer.frame())[0] == COMMIT
        await peer.say(ABORT, msgpack.packb({"why": "not on a Wednesday"}))
        await vm.console.send_all(b"exit 3\r")
        assert (await vm.wait()).status == 3


async def test_a_guest_waits_stopped_for_who_has_got_commit_and_says_nothing() -> None:
    here, there = lines()
    peer = Peer(there)
    async with here, there, avmm.Machine(memory="8M") as vm, trio.open_nursery() as nursery:
        await started(vm)
        is_told = trio.Event()

        async def migrate() -> None:
            with pytest.raises(avmm.HandOverUnknownError, match="settle"):
                await vm.migrate(here, answer_seconds=0.3)
            is_told.set()

        nursery.start_soon(migrate)
        await peer.until_ready()
        assert (await peer.frame())[0] == COMMIT
        await is_told.wait()
        assert peer.ram == bytes(vm.memory.whole), "it does not run"
        await vm.settle(runs_here=True)
        await vm.console.send_all(b"exit 3\r")
        assert (await vm.wait()).status == 3


@pytest.mark.parametrize("states", [SourceState, DestinationState])
def test_each_state_of_a_side_has_a_row_of_its_table(states: type[Enum]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    table = text[text.index(f"`{states.__name__}`") :].split("\n\n")[1]
    named = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert named == [state.name for state in states]
