"""The network device and the networks of the host: frames, checksums, links, hostile packets."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scarcity import no_more_descriptors
from support.tap_guest import summed
from support.virtio_driver import EVENT_IDX, VERSION_1, Bench, Driver, settle

from avmm.devices.virtio.frame import MOST_BYTES, Backend, Frame
from avmm.devices.virtio.mmio import CONFIG_GENERATION, STATUS
from avmm.devices.virtio.net import Net
from avmm.errors import ConfigError, DeviceError
from avmm.net.pair import End, pair
from avmm.net.tap import Tap
from avmm.net.unix import UnixStream

CSUM, GUEST_CSUM, MRG = 1, 2, 1 << 15
BASE = VERSION_1 | EVENT_IDX | 1 << 3 | 1 << 5 | 1 << 16
HEADER = struct.Struct("<BBHHHHH")


class Guest:
    def __init__(self, driver: Driver) -> None:
        self.driver, self.memory, self.rings = driver, driver.bench.memory, driver.rings
        self.slots: dict[int, int] = {}
        self.at = driver.end

    def give(self, size: int = 2048, count: int = 1) -> None:
        for _ in range(count):
            self.slots[self.rings[0].add([(self.at, size, True)])] = self.at
            self.at += size
        self.rings[0].kick()

    def send(self, frame: bytes, *header: int) -> None:
        data = HEADER.pack(*header, *[0] * (7 - len(header))) + frame
        self.raw(data)

    def raw(self, data: bytes) -> None:
        self.memory.write(0xC0000, data)
        self.rings[1].take()
        self.rings[1].add([(0xC0000, len(data), False)])
        self.rings[1].kick()

    def got(self) -> list[bytes]:
        """What came back, a buffer each."""
        return [
            self.memory.read(self.slots.pop(head), written)
            for head, written in self.rings[0].take()
        ]


@asynccontextmanager
async def guest_of(net: Net, features: int = 0, size: int = 16) -> AsyncIterator[Guest]:
    bench = Bench(net)
    async with bench.running() as driver:
        await driver.start(BASE | features, size=size)
        yield Guest(driver)


@pytest.fixture
def cable() -> tuple[Net, End]:
    near, far = pair()
    return Net(near, mac="52:54:00:12:34:56", mtu=9000), far


FRAME = bytes(range(100))


async def test_frames_both_ways(cable: tuple[Net, End]) -> None:
    net, far = cable
    async with guest_of(net) as guest:
        bench = guest.driver.bench
        config = bytes(bench.read(0x100 + at, 1) for at in range(12))
        assert config == bytes.fromhex("525400123456") + struct.pack("<HHH", 1, 1, 9000)
        guest.send(FRAME)
        assert await far.receive() == Frame(FRAME)
        guest.give(count=2)
        await far.send(Frame(FRAME))
        await settle()
        assert guest.got() == [HEADER.pack(0, 0, 0, 0, 0, 0, 1) + FRAME]


async def test_a_frame_over_several_buffers_is_seen_at_once(cable: tuple[Net, End]) -> None:
    net, far = cable
    async with guest_of(net, MRG) as guest:
        await far.send(Frame(bytes(1500)))
        guest.give(600, count=2)
        await settle()
        assert guest.got() == []
        guest.give(600)
        await settle()
        parts = guest.got()
        assert [len(part) for part in parts] == [600, 600, 312]
        assert b"".join(parts) == HEADER.pack(0, 0, 0, 0, 0, 0, 3) + bytes(1500)


async def test_frames_that_do_not_fit_are_dropped(cable: tuple[Net, End]) -> None:
    net, far = cable
    async with guest_of(net) as guest:
        guest.give(100)
        await far.send(Frame(bytes(200)))
        await far.send(Frame(bytes(88)))
        await settle()
        assert [len(part) for part in guest.got()] == [100]
        assert net.dropped == 1
    async with guest_of(net, MRG, size=128) as guest:
        guest.give(20, count=100)
        await far.send(Frame(bytes(2000)))
        await far.send(Frame(bytes(1000)))
        await settle()
        assert len(guest.got()) == 51
        assert net.dropped == 2


async def test_a_short_frame_after_a_dropped_long_one(cable: tuple[Net, End]) -> None:
    """The long one has gathered buffers. The short one fills as many as it needs, and says so; the
    others are there for the next one."""
    net, far = cable
    async with guest_of(net, MRG, size=128) as guest:
        guest.give(100, count=66)
        await far.send(Frame(bytes(9000)))
        await far.send(Frame(bytes(60)))
        await far.send(Frame(bytes(150)))
        await settle()
        assert guest.got() == [
            HEADER.pack(0, 0, 0, 0, 0, 0, 1) + bytes(60),
            HEADER.pack(0, 0, 0, 0, 0, 0, 2) + bytes(88),
            bytes(62),
        ]
        assert net.dropped == 1


async def test_a_guest_without_buffers_makes_the_sender_wait() -> None:
    near, far = pair(2)
    net = Net(near)
    async with guest_of(net) as guest:
        sent = []

        async def send() -> None:
            for n in range(9):
                await far.send(Frame(bytes([n]) * 20))
                sent.append(n)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await settle()
            assert sent == [0, 1, 2]
            nursery.cancel_scope.cancel()
        guest.give(count=9)
        await settle()
        assert [part[12] for part in guest.got()] == [0, 1, 2]


async def test_a_backend_that_takes_nothing_makes_the_guest_wait() -> None:
    near, far = pair(1)
    async with guest_of(Net(near)) as guest:
        for n in range(2):
            guest.send(bytes([n]) * 20)
            await settle()
        await guest.driver.bench.device.quiesce()
        await guest.driver.bench.device.resume()
        assert [(await far.receive()).data[0] for _ in range(2)] == [0, 1]
        await settle()
        assert far._into.statistics().current_buffer_used == 0


# -- checksums -----------------------------------------------------------------------------------


@given(st.binary(min_size=20, max_size=99), st.integers(0, 10), st.integers(0, 8))
def test_a_checksum_that_is_completed_adds_up(data: bytes, start: int, offset: int) -> None:
    offset &= ~1
    frame = Frame(data, start, offset)
    whole = frame.complete()
    assert len(whole) == len(data)
    at = start + offset
    assert whole[:at] + whole[at + 2 :] == data[:at] + data[at + 2 :]
    rest = summed(whole[start:])
    before = summed(data[start:at] + data[at + 2 :]) + summed(data[at : at + 2])
    assert rest == 0xFFFF or before == 0 or data[at : at + 2] != b"\0\0"
    value = int.from_bytes(whole[at : at + 2], "big")
    total = (summed(data[start:]) + value) % 0xFFFF
    assert total == 0
    assert value


async def test_a_guests_checksums_are_completed_where_the_backend_cannot() -> None:
    near, far = pair()
    near.completes = False
    async with guest_of(Net(near), CSUM) as guest:
        guest.send(FRAME, 1, 0, 0, 0, 34, 6)
        frame = await far.receive()
        assert frame == Frame(Frame(FRAME, 34, 6).complete())
        near.completes = True
        guest.send(FRAME, 1, 0, 0, 0, 34, 6)
        assert await far.receive() == Frame(FRAME, 34, 6)


async def test_checksums_for_a_guest_that_completes_them_or_not(cable: tuple[Net, End]) -> None:
    net, far = cable
    for features in (0, GUEST_CSUM):
        async with guest_of(net, features) as guest:
            guest.give(count=2)
            await far.send(Frame(FRAME, 34, 6))
            await far.send(Frame(FRAME, is_valid=True))
            await settle()
            first, second = guest.got()
            if features:
                assert first == HEADER.pack(1, 0, 0, 0, 34, 6, 1) + FRAME
                assert second == HEADER.pack(2, 0, 0, 0, 0, 0, 1) + FRAME
            else:
                assert first[12:] == Frame(FRAME, 34, 6).complete()
                assert first[0] == second[0] == 0


# -- the link ------------------------------------------------------------------------------------


async def test_the_link_goes_down_and_up(cable: tuple[Net, End]) -> None:
    net, far = cable
    async with guest_of(net) as guest:
        bench = guest.driver.bench
        guest.give(count=2)
        net.set_link(False)
        assert (bench.read(0x106, 2), bench.read(0x60) & 2) == (0, 2)
        bench.write(0x64, 2)
        await far.send(Frame(FRAME))
        guest.send(FRAME)
        await settle()
        assert guest.got() == []
        assert len(guest.rings[1].take()) == 1
        assert net.dropped == 2
        await bench.device.quiesce()
        state = bench.device.save()
        await bench.device.resume()
        net.set_link(True)
        assert (bench.read(0x106, 2), bench.read(0x60) & 2) == (1, 2)
        await far.send(Frame(FRAME))
        await settle()
        assert len(guest.got()) == 1
    chosen = Net(pair()[0], mac="52:54:00:00:00:01")
    chosen.load(net.save())
    assert chosen.mac == bytes.fromhex("525400000001")
    other = Net(pair()[0])
    Bench(other).device.load(state)
    assert (other.mac, other.mtu, other.link_up) == (net.mac, 9000, False)


async def test_a_network_that_goes_takes_the_link_down(cable: tuple[Net, End]) -> None:
    net, far = cable
    async with guest_of(net) as guest:
        assert net.link_up
        far.close()
        await settle()
        assert not net.link_up
        guest.send(FRAME)
        await settle()
        assert len(guest.rings[1].take()) == 1
        await guest.driver.start(BASE)
        assert not guest.driver.needs_reset


@pytest.mark.parametrize(
    "change",
    [{"mac": b"12345"}, {"mac": "123456"}, {"mtu": 1}, {"mtu": "x"}, {"link": 1}, {"x": 1}],
    ids=str,
)
def test_states_that_are_none(change: dict[str, object]) -> None:
    net = Net(pair()[0])
    with pytest.raises(DeviceError):
        net.load({**net.save(), **change})


# -- hostile packets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(11),
        HEADER.pack(0, 0, 0, 0, 0, 0, 0) + bytes(13),
        HEADER.pack(0, 1, 0, 0, 0, 0, 0) + FRAME,
        HEADER.pack(1, 0, 0, 0, 99, 0, 0) + FRAME,
        HEADER.pack(1, 0, 0, 0, 0xFFFF, 0xFFFF, 0) + FRAME,
        HEADER.pack(0, 0, 0, 0, 0, 0, 0) + bytes(MOST_BYTES + 1),
    ],
    ids=len,
)
async def test_packets_that_are_none(cable: tuple[Net, End], data: bytes) -> None:
    net, far = cable
    async with guest_of(net, CSUM) as guest:
        guest.raw(data)
        await settle()
        assert len(guest.rings[1].take()) == 1
        assert net.dropped == 1
        guest.send(FRAME)
        assert await far.receive() == Frame(FRAME)


async def test_checksums_of_a_guest_that_did_not_negotiate_them(cable: tuple[Net, End]) -> None:
    net, _ = cable
    async with guest_of(net) as guest:
        guest.send(FRAME, 1, 0, 0, 0, 34, 6)
        await settle()
        assert net.dropped == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=20), st.sampled_from([0, CSUM, MRG, CSUM | MRG]))
async def test_whatever_the_guest_sends(packets: list[bytes], features: int) -> None:
    class Sink(Backend):
        async def receive(self) -> Frame:
            await trio.sleep_forever()
            raise AssertionError

        async def send(self, frame: Frame) -> None:
            await trio.lowlevel.checkpoint()
            assert frame.start is None
            assert 14 <= len(frame.data) <= 188

    async with guest_of(Net(Sink()), features) as guest:
        for data in packets:
            guest.raw(data)
            await settle()
            assert len(guest.rings[1].take()) == 1
        assert not guest.driver.needs_reset


# -- unix sockets --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["connect", "listen"])
async def test_frames_over_a_unix_socket(tmp_path: Path, side: str) -> None:
    path = tmp_path / "net"
    if side == "connect":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            backend = UnixStream.connect(path)
            connection, _ = server.accept()
        peer = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
    else:
        backend = UnixStream.listen(path)
        assert path.stat().st_mode & 0o777 == 0o600
    net = Net(backend)
    async with guest_of(net) as guest:
        if side == "listen":
            assert not net.link_up
            guest.send(FRAME)
            await settle()
            assert net.dropped == 1
            peer = await trio.open_unix_socket(str(path))
        with trio.fail_after(20):
            while not net.link_up:  # noqa: ASYNC110
                await trio.sleep(0.001)
            guest.send(FRAME)
            assert await peer.receive_some() == b"\0\0\0\x64" + FRAME
            guest.give(count=4)
            for part in (b"\0\0", b"\0\x64" + FRAME[:50], FRAME[50:] + b"\0\0\0\x14" + bytes(20)):
                await peer.send_all(part)
                await trio.sleep(0.01)  # so that, nearly always, they come one by one
            got = guest.got()
            while len(got) < 2:
                await trio.sleep(0.001)
                got += guest.got()
            assert got == [HEADER.pack(0, 0, 0, 0, 0, 0, 1) + data for data in (FRAME, bytes(20))]
            await peer.aclose()
            while net.link_up:  # noqa: ASYNC110
                await trio.sleep(0.001)
    backend.close()
    assert path.exists() is (side == "connect")


async def test_a_peer_comes_again_after_a_hand_over_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "net"
    backend = UnixStream.listen(path)
    net = Net(backend)
    async with guest_of(net) as guest:
        device = guest.driver.bench.device
        for turn in range(3):
            async with await trio.open_unix_socket(str(path)) as peer:
                with trio.fail_after(20):
                    while not net.link_up:  # noqa: ASYNC110
                        await trio.sleep(0.001)
                    guest.send(FRAME)
                    assert await peer.receive_some() == b"\0\0\0\x64" + FRAME
                await device.quiesce()
                await device.release()
                assert await peer.receive_some() == b""
            assert not path.exists()
            generation = guest.driver.bench.read(CONFIG_GENERATION)
            await device.acquire()
            await device.resume()
            assert not net.link_up
            assert guest.driver.bench.read(CONFIG_GENERATION) == generation + 1, turn
    backend.close()


async def until(is_so: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not is_so():  # noqa: ASYNC110
            await trio.sleep(0.001)


async def test_a_peer_goes_after_the_driver_has_gone(tmp_path: Path) -> None:
    """The next one is accepted, although no driver receives."""
    path = tmp_path / "net"
    backend = UnixStream.listen(path)
    net = Net(backend)
    async with guest_of(net) as guest:
        peer = await trio.open_unix_socket(str(path))
        await until(lambda: net.link_up)
        await settle()  # the device serves its queues, and waits
        done = guest.driver.bench.device.write(STATUS, 4, 0)
        assert done is not None
        await done
        await settle()
        first = backend._peer
        await peer.aclose()
        async with await trio.open_unix_socket(str(path)):
            await until(lambda: backend._peer not in (first, None))
    backend.close()


@pytest.mark.parametrize("goes", ["closes", "in the midst of a frame", "reads no more"])
async def test_one_peer_after_the_other(tmp_path: Path, goes: str) -> None:
    """Whoever comes while there is a peer is taken when that one has gone."""
    path = tmp_path / "net"
    backend = UnixStream.listen(path)
    net = Net(backend)
    async with guest_of(net) as guest, await trio.open_unix_socket(str(path)) as peer:
        await until(lambda: net.link_up)
        first = backend._peer
        async with await trio.open_unix_socket(str(path)) as next_one:
            if goes == "reads no more":
                peer.socket.shutdown(socket.SHUT_RD)
                guest.send(FRAME)
            else:
                await peer.send_all(b"" if goes == "closes" else b"\0\0\0\x64half")
                await peer.aclose()
            await until(lambda: backend._peer not in (first, None) and net.link_up)
            guest.send(FRAME)
            with trio.fail_after(20):
                assert await next_one.receive_some() == b"\0\0\0\x64" + FRAME
            guest.give()
            await next_one.send_all(b"\0\0\0\x14" + bytes(20))
            got: list[bytes] = []
            await until(lambda: bool(got.extend(guest.got()) or got))
            assert got == [HEADER.pack(0, 0, 0, 0, 0, 0, 1) + bytes(20)]
        await until(lambda: not net.link_up)
    backend.close()


async def test_one_peer_more_than_there_are_descriptors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = UnixStream.listen(tmp_path / "net")
    net = Net(backend)
    async with guest_of(net):
        with socket.socket(socket.AF_UNIX) as client:
            with no_more_descriptors():
                client.connect(str(tmp_path / "net"))
                await until(lambda: "a client waits" in caplog.text)
            await until(lambda: net.link_up)
    backend.close()


async def test_a_stream_stays_whole_through_pauses(tmp_path: Path) -> None:
    """The peer does not read, so that a pause comes in the midst of a frame."""
    backend = UnixStream.listen(tmp_path / "net")
    net = Net(backend)
    async with guest_of(net) as guest:
        peer = await trio.open_unix_socket(str(tmp_path / "net"))
        with trio.fail_after(20):
            while not net.link_up:  # noqa: ASYNC110
                await trio.sleep(0.001)
        for part in range(14):
            if part and len(guest.rings[1].take()) == 0:
                break
            guest.memory.write(0x40000, HEADER.pack(*[0] * 7) + bytes([part]) * 60000)
            guest.rings[1].add([(0x40000, 60012, False)])
            guest.rings[1].kick()
            await trio.sleep(0.005)
        device = guest.driver.bench.device
        for _ in range(3):
            await device.quiesce()
            await device.resume()
            await settle()
        received = bytearray()
        with trio.fail_after(20):
            while len(received) < part * 60004:
                received += await peer.receive_some()
        with trio.move_on_after(0.05):
            received += await peer.receive_some()
        assert len(received) == part * 60004
        for n in range(part):
            assert received[n * 60004 : n * 60004 + 4] == (60000).to_bytes(4, "big")
        await peer.aclose()
    backend.close()


async def test_a_peer_that_sends_nonsense(tmp_path: Path) -> None:
    backend = UnixStream.listen(tmp_path / "net")
    net = Net(backend)
    async with guest_of(net), await trio.open_unix_socket(str(tmp_path / "net")) as peer:
        await peer.send_all(b"\xff" * 100)
        with trio.fail_after(20):
            await trio.sleep(0.05)
            while net.link_up:  # noqa: ASYNC110
                await trio.sleep(0.001)
    backend.close()


# -- the host ------------------------------------------------------------------------------------


def test_a_tap_of_the_hosts() -> None:
    command = [sys.executable, "-m", "support.tap_guest"]
    tests = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=50, check=False, cwd=tests
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_what_cannot_be(tmp_path: Path) -> None:
    near, _ = pair()
    for mac in ("", "52:54:00:12:34", "01:54:00:12:34:56", "00:00:00:00:00:00", 5):
        with pytest.raises(ConfigError, match="mac"):
            Net(near, mac=mac)
    for mtu in (0, 67, 65536, "1500", True):
        with pytest.raises(ConfigError, match="mtu"):
            Net(near, mtu=mtu)
    for name in ("", "x" * 16, "a/b"):
        with pytest.raises(ConfigError, match="tap"):
            Tap(name)
    with pytest.raises(ConfigError, match=r"net socket .*missing"):
        UnixStream.connect(tmp_path / "missing")
    with pytest.raises(ConfigError, match="net socket"):
        UnixStream.listen(tmp_path / "no" / "socket")
