"""The socket device: connections, credit, half-close, limits, hostile packets."""

from __future__ import annotations

import errno

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from support.virtio_driver import Bench, settle
from support.vsock_guest import (
    ASK,
    FEATURES,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    UPDATE,
    Guest,
    guest_of,
    packets,
)

from avmm.devices.virtio.vsock import BACKLOG, MOST, Vsock
from avmm.devices.virtio.vsock_stream import BUFFER
from avmm.errors import ConfigError


async def test_the_host_connects() -> None:
    vsock = Vsock()
    async with guest_of(vsock) as guest:
        stream = await guest.stream(vsock)
        await stream.send_all(b"to the guest")
        await settle()
        assert guest.got() == [(RW, 1024, stream.host_port, 0, b"to the guest")]
        assert guest.credit == (BUFFER, 0)
        await guest.send(RW, 1024, stream.host_port, b"to the host")
        assert await stream.receive_some(6) == b"to the"
        assert await stream.receive_some() == b" host"
        await stream.aclose()
        await settle()
        assert guest.got() == [(SHUTDOWN, 1024, stream.host_port, 3, b"")]
        await guest.send(RST, 1024, stream.host_port)
        assert vsock._streams == {}
        assert vsock._held == 0


async def test_the_guest_connects() -> None:
    vsock = Vsock()
    async with guest_of(vsock) as guest, vsock.listen(5000) as listener:
        await guest.send(REQUEST, 99, 5000)
        assert guest.got() == [(RESPONSE, 99, 5000, 0, b"")]
        await guest.send(RW, 99, 5000, b"hello")
        await guest.send(SHUTDOWN, 99, 5000, flags=2)
        stream = await listener.accept()
        assert b"".join([part async for part in stream]) == b"hello"
        await stream.send_all(b"bye")
        await stream.aclose()
        await settle()
        assert guest.got() == [(RW, 99, 5000, 0, b"bye"), (SHUTDOWN, 99, 5000, 3, b"")]
        await guest.send(SHUTDOWN, 99, 5000, flags=3)
        assert guest.got() == [(RST, 99, 5000, 0, b"")]
        assert vsock._held == 0
        with pytest.raises(OSError, match="listens") as caught:
            vsock.listen(5000)
        assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_what_nobody_listens_to_is_refused() -> None:
    vsock = Vsock()
    async with guest_of(vsock) as guest:
        await guest.send(REQUEST, 99, 5000)
        assert guest.got() == [(RST, 99, 5000, 0, b"")]
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def connect() -> None:
                with pytest.raises(ConnectionRefusedError, match="port 7"):
                    await vsock.connect(7)

            await settle()
            ((_, _, port, _, _),) = guest.got()
            await guest.send(RST, 7, port)
        assert vsock._held == 0


async def test_a_connect_that_is_cancelled_is_none() -> None:
    vsock = Vsock()
    with trio.move_on_after(0.01):
        await vsock.connect(7)
    assert vsock._streams == {}
    async with guest_of(vsock) as guest:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vsock.connect, 7)
            await settle()
            nursery.cancel_scope.cancel()
        await settle()
        assert [packet[0] for packet in guest.got()] == [REQUEST, RST]
        assert vsock._held == 0


async def test_a_connect_waits_for_the_driver() -> None:
    vsock = Vsock()
    stream = vsock.request(80)
    async with guest_of(vsock) as guest:
        assert guest.got() == []
        await settle()
        assert guest.got() == [(REQUEST, 80, stream.host_port, 0, b"")]


async def test_no_more_is_sent_than_the_guest_has_room_for() -> None:
    vsock = Vsock()
    async with guest_of(vsock) as guest:
        guest.room = 10
        stream = await guest.stream(vsock)
        await stream.send_all(bytes(range(25)))
        await settle()
        port = stream.host_port
        assert guest.got() == [
            (RW, 1024, port, 0, bytes(range(10))),
            (ASK, 1024, port, 0, b""),
        ]
        await guest.send(UPDATE, 1024, port, taken=0)
        assert guest.got() == []
        await guest.send(UPDATE, 1024, port, taken=10)
        got = guest.got()
        assert got[0] == (RW, 1024, port, 0, bytes(range(10, 20)))
        await guest.send(UPDATE, 1024, port, taken=4)  # one that was overtaken
        await guest.send(UPDATE, 1024, port, room=0, taken=20)
        await guest.send(UPDATE, 1024, port, room=1 << 31, taken=20)
        assert [p for p in guest.got() if p[0] == RW] == [
            (RW, 1024, port, 0, bytes(range(20, 25)))
        ]
        await guest.send(UPDATE, 1024, port, taken=26)  # more than there was
        assert guest.got() == [(RST, 1024, port, 0, b"")]
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
        await stream.aclose()
        assert vsock._held == 0


async def test_sending_waits_while_its_buffer_is_full() -> None:
    vsock = Vsock()
    async with guest_of(vsock) as guest:
        guest.room = 0
        stream = await guest.stream(vsock)
        with trio.move_on_after(0.05) as scope:
            await stream.send_all(bytes(1 << 20))
        assert scope.cancelled_caught
        assert len(stream._output) == 64 * 1024
        with trio.move_on_after(0.05) as scope:
            await stream.wait_send_all_might_not_block()
        assert scope.cancelled_caught


async def test_a_guest_that_sends_more_than_there_is_room_for_is_cut_off() -> None:
    vsock = Vsock()
    async with guest_of(vsock) as guest:
        stream = await guest.stream(vsock)
        for _ in range(BUFFER // 32768):
            await guest.send(RW, 1024, stream.host_port, bytes(32768))
        assert guest.got() == []
        assert len(stream._input) == BUFFER
        assert len(await stream.receive_some(BUFFER // 4)) == BUFFER // 4
        await settle()
        assert guest.got() == [(UPDATE, 1024, stream.host_port, 0, b"")]
        assert guest.credit == (BUFFER, BUFFER // 4)
        await guest.send(ASK, 1024, stream.host_port)
        assert guest.got() == [(UPDATE, 1024, stream.host_port, 0, b"")]
        for _ in range(3):
            await guest.send(RW, 1024, stream.host_port, bytes(32768))
        assert guest.got() == [(RST, 1024, stream.host_port, 0, b"")]
        assert len(await stream.receive_some()) == BUFFER
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


async def test_half_closes() -> None:
    vsock = Vsock()
    async with guest_of(vsock) as guest:
        stream = await guest.stream(vsock)
        port = stream.host_port
        await stream.send_all(b"last")
        await stream.send_eof()
        await settle()
        assert guest.got() == [(RW, 1024, port, 0, b"last"), (SHUTDOWN, 1024, port, 2, b"")]
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")
        await guest.send(RW, 1024, port, b"still")
        assert await stream.receive_some() == b"still"
        await guest.send(SHUTDOWN, 1024, port, flags=3)
        assert await stream.receive_some() == b""
        assert guest.got() == [(RST, 1024, port, 0, b"")]
        other = await guest.stream(vsock, 7)
        await guest.send(SHUTDOWN, 7, other.host_port, flags=1)
        with pytest.raises(trio.BrokenResourceError):
            await other.send_all(b"x")
        await guest.send(RW, 7, other.host_port, b"one way")
        assert await other.receive_some() == b"one way"
        await guest.send(SHUTDOWN, 7, other.host_port, flags=2)
        assert guest.got() == [(RST, 7, other.host_port, 0, b"")]
        assert await other.receive_some() == b""


async def test_a_guest_that_never_lets_go(autojump_clock: trio.testing.MockClock) -> None:
    vsock = Vsock()
    async with guest_of(vsock) as guest:
        stream = await guest.stream(vsock)
        await stream.aclose()
        await settle()
        await guest.send(RW, 1024, stream.host_port, b"too late")
        assert [packet[0] for packet in guest.got()] == [SHUTDOWN]
        await trio.sleep(9)
        assert guest.got() == [(RST, 1024, stream.host_port, 0, b"")]
        assert vsock._held == 0


async def test_connections_are_bounded_in_number() -> None:
    vsock = Vsock()
    async with guest_of(vsock) as guest, vsock.listen(1) as listener:
        for n in range(BACKLOG):
            await guest.send(REQUEST, n, 1)
        answers = await packets(guest, BACKLOG)
        assert {answer[0] for answer in answers} == {RESPONSE}
        await guest.send(REQUEST, BACKLOG, 1)
        assert guest.got() == [(RST, BACKLOG, 1, 0, b"")]
        streams = [await listener.accept() for _ in range(BACKLOG)]
        streams += [vsock.request(9) for _ in range(MOST - BACKLOG)]
        with pytest.raises(OSError, match=str(MOST)):
            vsock.request(9)
        for stream in streams:
            await stream.aclose()


async def test_a_guest_that_takes_no_replies_is_not_listened_to() -> None:
    vsock = Vsock()
    async with guest_of(vsock, buffers=0) as guest, vsock.listen(1):
        for n in range(256):
            await guest.send(RW, n, 77, b"?")
        assert len(guest.rings[1].take()) == 1
        await guest.send(RW, 999, 77, b"?")
        assert len(guest.rings[1].take()) == 0
        assert len(vsock._replies) == 256
        guest.give(guest.driver.end)
        await settle()
        assert len(guest.rings[1].take()) == 1


async def test_connections_that_come_and_go_unanswered_leave_nothing() -> None:
    vsock = Vsock()
    async with guest_of(vsock, buffers=0) as guest, vsock.listen(1) as listener:
        for n in range(300):
            await guest.send(REQUEST, n, 1)
            await guest.send(RST, n, 1)
        assert len(vsock._due) == 0
        assert len(vsock._streams) == 0
        assert len(listener._waiting) <= BACKLOG


async def test_a_reset_breaks_connections_and_keeps_listeners() -> None:
    vsock = Vsock()
    bench = Bench(vsock)
    async with bench.running() as driver, vsock.listen(1) as listener:
        await driver.start(FEATURES)
        guest = Guest(driver)
        stream = await guest.stream(vsock)
        await guest.send(RW, 1024, stream.host_port, b"before")
        await driver.start(FEATURES)
        assert await stream.receive_some() == b"before"
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        guest = Guest(driver)
        await guest.send(REQUEST, 5, 1)
        assert guest.got() == [(RESPONSE, 5, 1, 0, b"")]
        assert (await listener.accept()).guest_port == 5


async def test_after_a_load_the_guest_is_told_first() -> None:
    vsock = Vsock()
    bench = Bench(vsock)
    async with bench.running() as driver:
        await driver.start(FEATURES)
        guest = Guest(driver)
        await guest.stream(vsock)
        await bench.device.quiesce()
        state = bench.device.save()
    loaded = Vsock(77)
    other = Bench(loaded, bench.memory)
    other.device.load(state)
    stream = loaded.request(9)
    async with other.running():
        for ring in guest.rings.values():
            ring.bench = other
        await settle()
        assert guest.rings[0].take() == []
        bench.memory.write(0x8000, b"\xff" * 4)
        guest.rings[2].add([(0x8000, 4, True)])
        guest.rings[2].kick()
        await settle()
        assert guest.rings[2].take() == [(0, 4)]
        assert bench.memory.read(0x8000, 4) == bytes(4)
        assert len(guest.rings[0].take()) == 1
        assert other.read(0x100) == 77
        assert not stream.is_unanswered


async def test_the_end_of_the_guest() -> None:
    vsock = Vsock()
    async with guest_of(vsock) as guest:
        stream = await guest.stream(vsock)
        await guest.send(RW, 1024, stream.host_port, b"last words")
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def connect() -> None:
                with pytest.raises(ConnectionRefusedError):
                    await vsock.connect(7)

            await settle()
            vsock.finish()
    assert await stream.receive_some() == b"last words"
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    with pytest.raises(ConnectionRefusedError):
        await vsock.connect(7)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"cid": 4}, []),
        ({"to": 1}, []),
        ({"to": 3}, []),
        ({"kind": 2}, [RST]),
        ({"kind": 0}, [RST]),
        ({"length": 6}, [RST]),
        ({"length": 0xFFFF_FFFF}, [RST]),
        ({"op": 0}, [RST]),
        ({"op": 8}, [RST]),
        ({"op": 0xFFFF}, [RST]),
        ({"op": RESPONSE}, [RST]),
        ({"op": REQUEST}, [RST]),
        ({"taken": 1}, [RST]),
        ({"taken": 0x8000_0000}, []),
    ],
    ids=str,
)
async def test_packets_that_are_none(change: dict[str, int], answer: list[int]) -> None:
    vsock = Vsock()
    async with guest_of(vsock) as guest, vsock.listen(5):
        stream = await guest.stream(vsock)
        await guest.send(change.pop("op", RW), 1024, stream.host_port, b"12345", **change)
        assert [packet[0] for packet in guest.got()] == answer
        guest.raw(b"short")
        await settle()
        assert guest.got() == []
        assert not guest.driver.needs_reset


PORTS = st.sampled_from([0, 1, 2, 0xFFFF_FFFF, 1 << 30])
WORDS = st.one_of(st.integers(0, 50), st.integers(0, (1 << 32) - 1))
PACKETS = st.tuples(
    st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)),
    PORTS,
    PORTS,
    st.binary(max_size=60),
    st.fixed_dictionaries(
        {},
        optional={
            "cid": st.sampled_from([0, 2, 3]),
            "kind": st.integers(0, 2),
            "length": WORDS,
            "flags": WORDS,
            "room": WORDS,
            "taken": WORDS,
        },
    ),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(PACKETS, st.sampled_from(["take", "connect", "accept"])), max_size=30))
async def test_whatever_the_guest_sends(steps) -> None:
    vsock = Vsock()
    streams = []
    async with guest_of(vsock) as guest, vsock.listen(1) as listener:
        for step in steps:
            if step == "take":
                guest.got()
            elif step == "connect":
                streams.append(vsock.request(1))
            elif step == "accept":
                with trio.move_on_after(0):
                    streams.append(await listener.accept())
            else:
                op, ours, theirs, data, other = step
                await guest.send(op, ours, theirs, data, **other)
            for stream in streams:
                if stream._is_sendable:
                    with trio.move_on_after(0):
                        await stream.send_all(b"x" * 100)
        assert not guest.driver.needs_reset
        for stream in streams:
            assert len(stream._input) <= BUFFER
            await stream.aclose()
        listener.close()
        await guest.driver.start(FEATURES)
        assert vsock._held == 0
        assert vsock._streams == {}
        assert not vsock._due


def test_what_cannot_be() -> None:
    for cid in (2, -1, 0xFFFF_FFFF, "3", True):
        with pytest.raises(ConfigError, match="cid"):
            Vsock(cid)
    for port in (-1, 0xFFFF_FFFF, "1"):
        with pytest.raises(ValueError, match="port"):
            Vsock().request(port)
        with pytest.raises(ValueError, match="port"):
            Vsock().listen(port)
