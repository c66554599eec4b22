"""A guest's sockets as unix sockets: who closes what, who gives up, who is one too many."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio
from support.scarcity import no_more_descriptors
from support.virtio_driver import settle
from support.vsock_guest import (
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    Guest,
    guest_of,
    packets,
)

from avmm.devices.virtio.vsock import Vsock
from avmm.errors import ConfigError


async def client_of(path: Path) -> trio.SocketStream:
    with trio.fail_after(20):
        while True:
            try:
                return await trio.open_unix_socket(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                await trio.sleep(0.001)  # it is being bound: a thread does that


async def test_a_client_connects_to_the_guest(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    vsock = Vsock(unix=path)
    async with guest_of(vsock) as guest:
        async with await client_of(path) as client:
            assert path.stat().st_mode & 0o777 == 0o600
            await client.send_all(b"CONNECT 1024\nhello")
            ((op, ours, port, _, _),) = await packets(guest, 1)
            assert (op, ours) == (REQUEST, 1024)
            await guest.send(RESPONSE, 1024, port)
            assert await client.receive_some() == b"OK %d\n" % port
            assert await packets(guest, 1) == [(RW, 1024, port, 0, b"hello")]
            await client.send_eof()
            assert await packets(guest, 1) == [(SHUTDOWN, 1024, port, 2, b"")]
            await guest.send(RW, 1024, port, b"answer")
            await guest.send(SHUTDOWN, 1024, port, flags=3)
            assert b"".join([part async for part in client]) == b"answer"
        assert await packets(guest, 1) == [(RST, 1024, port, 0, b"")]
        while vsock._held:  # noqa: ASYNC110
            await trio.sleep(0.001)
    assert not path.exists()


@pytest.mark.parametrize("line", [b"CONNECT x\n", b"\n", b"x" * 100, b"CONNECT 4294967295\n", b""])
async def test_a_client_that_asks_for_nothing_sensible(tmp_path: Path, line: bytes) -> None:
    vsock = Vsock(unix=tmp_path / "vsock")
    async with guest_of(vsock) as guest, await client_of(tmp_path / "vsock") as client:
        await client.send_all(line)
        await client.send_eof()
        with trio.fail_after(20):
            assert await client.receive_some() == b""
        assert guest.got() == []


async def test_a_client_that_the_guest_refuses(tmp_path: Path) -> None:
    vsock = Vsock(unix=tmp_path / "vsock")
    async with guest_of(vsock) as guest, await client_of(tmp_path / "vsock") as client:
        await client.send_all(b"CONNECT 7\n")
        ((_, _, port, _, _),) = await packets(guest, 1)
        await guest.send(RST, 7, port)
        with trio.fail_after(20):
            assert await client.receive_some() == b""


async def test_the_guest_reaches_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    vsock = Vsock(unix=path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}_52")
        server.listen()
        server.setblocking(False)
        async with guest_of(vsock) as guest:
            (await client_of(path)).socket.close()
            await guest.send(REQUEST, 9, 52)
            assert await packets(guest, 1) == [(RESPONSE, 9, 52, 0, b"")]
            connection, _ = await trio.socket.from_stdlib_socket(server).accept()
            async with trio.SocketStream(connection) as host:
                await guest.send(RW, 9, 52, b"hello")
                assert await host.receive_some() == b"hello"
                await host.send_all(b"there")
                assert await packets(guest, 1) == [(RW, 9, 52, 0, b"there")]
            assert await packets(guest, 1) == [(SHUTDOWN, 9, 52, 3, b"")]
            await guest.send(REQUEST, 9, 53)
            assert await packets(guest, 1) == [(RST, 9, 53, 0, b"")]


async def test_who_takes_over_listens_at_once_or_says_that_it_cannot(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    standby = Vsock(unix=path, held=False)
    async with guest_of(Vsock(unix=path)) as guest:
        device = guest.driver.bench.device
        (await client_of(path)).socket.close()
        with pytest.raises(ConfigError, match="vsock socket"):
            await standby.acquire()
        await device.release()
        assert not path.exists()
        await standby.acquire()
        assert path.exists()
        with pytest.raises(ConfigError, match="vsock socket"):
            await device.acquire()
        with trio.fail_after(20):
            await standby.release()  # which has not run, and so serves nobody
        assert not path.exists()
        with trio.fail_after(20):
            await device.acquire()
            await device.release()  # before it could serve anybody
            await settle()
            assert not path.exists()
            await device.acquire()
        async with await client_of(path) as client:
            await client.send_all(b"CONNECT 7\n")
            await packets(guest, 1)
    await standby.acquire()
    standby.close()
    standby.close()
    assert not path.exists()


async def opened(tmp_path: Path, guest: Guest) -> tuple[trio.SocketStream, int]:
    """A client, connected to the guest's port 1024 from the host's port that is returned."""
    client = await client_of(tmp_path / "vsock")
    await client.send_all(b"CONNECT 1024\n")
    ((_, _, port, _, _),) = await packets(guest, 1)
    await guest.send(RESPONSE, 1024, port)
    assert await client.receive_some() == b"OK %d\n" % port
    return client, port


async def until_nothing_is_held(vsock: Vsock) -> None:
    with trio.fail_after(20):
        while vsock._held:  # noqa: ASYNC110
            await trio.sleep(0.001)


async def test_a_guest_that_closes_while_the_host_says_one_more_word(tmp_path: Path) -> None:
    vsock = Vsock(unix=tmp_path / "vsock")
    async with guest_of(vsock) as guest:
        client, port = await opened(tmp_path, guest)
        async with client:
            for number in range(50):
                await guest.send(RW, 1024, port, bytes([number]) * 4000)
            await guest.send(SHUTDOWN, 1024, port, flags=3)
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(20):
                while True:
                    await client.send_all(b"one more word")
                    await trio.sleep(0.001)
            with trio.fail_after(20):
                said = b"".join([bytes(part) async for part in client])
        assert said == b"".join(bytes([number]) * 4000 for number in range(50))
        await until_nothing_is_held(vsock)


async def test_a_program_that_reads_no_more_still_sends(tmp_path: Path) -> None:
    vsock = Vsock(unix=tmp_path / "vsock")
    async with guest_of(vsock) as guest:
        client, port = await opened(tmp_path, guest)
        async with client:
            client.socket.shutdown(socket.SHUT_RD)
            await guest.send(RW, 1024, port, b"nobody reads this")
            assert await packets(guest, 1) == [(SHUTDOWN, 1024, port, 1, b"")]
            await guest.send(RW, 1024, port, b"nor this")
            await client.send_all(b"but I go on")
            assert await packets(guest, 1) == [(RW, 1024, port, 0, b"but I go on")]
        assert await packets(guest, 1) == [(SHUTDOWN, 1024, port, 3, b"")]


async def test_a_guest_that_reads_no_more_still_sends(tmp_path: Path) -> None:
    vsock = Vsock(unix=tmp_path / "vsock")
    async with guest_of(vsock) as guest:
        client, port = await opened(tmp_path, guest)
        async with client:
            await guest.send(SHUTDOWN, 1024, port, flags=1)
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(20):
                while True:
                    await client.send_all(b"does anybody read this?")
                    await trio.sleep(0.001)
            await guest.send(RW, 1024, port, b"but I go on")
            assert await client.receive_some() == b"but I go on"
            await guest.send(SHUTDOWN, 1024, port, flags=3)
            assert await client.receive_some() == b""


async def test_a_guest_that_resets_the_connection_ends_it(tmp_path: Path) -> None:
    vsock = Vsock(unix=tmp_path / "vsock")
    async with guest_of(vsock) as guest:
        client, port = await opened(tmp_path, guest)
        async with client:
            await guest.send(RW, 1024, port, b"last words")
            await guest.send(RST, 1024, port)
            assert await client.receive_some() == b"last words"
            assert await client.receive_some() == b""
            with pytest.raises(trio.BrokenResourceError):
                await client.send_all(b"hello?")
        await until_nothing_is_held(vsock)


@pytest.mark.parametrize("closes", ["before", "after"])
async def test_what_came_with_the_request_of_a_program_that_has_closed(
    tmp_path: Path, closes: str
) -> None:
    """It is delivered, whether the program closes before or after the guest has answered."""
    vsock = Vsock(unix=tmp_path / "vsock")
    async with guest_of(vsock) as guest:
        client = await client_of(tmp_path / "vsock")
        await client.send_all(b"CONNECT 1024\nhello")
        if closes == "before":
            await client.aclose()
        ((_, _, port, _, _),) = await packets(guest, 1)
        await client.aclose()
        await guest.send(RESPONSE, 1024, port)
        found = await packets(guest, 1)
        while found[-1][3] != 3:  # the end of what it sends may be told before the end of all
            found += await packets(guest, 1)
        assert found[0] == (RW, 1024, port, 0, b"hello")
        assert {packet[0] for packet in found[1:]} == {SHUTDOWN}


async def test_programs_that_give_up_before_the_driver_is_there(tmp_path: Path) -> None:
    """They free their places: the one who comes after 300 of them is served."""
    vsock = Vsock(unix=tmp_path / "vsock")
    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vsock.run)
            for _ in range(300):
                client = await client_of(tmp_path / "vsock")
                await client.send_all(b"CONNECT 1024\n")
                await client.aclose()
            patient = await client_of(tmp_path / "vsock")
            await patient.send_all(b"CONNECT 1024\n")
            await patient.send_eof()  # this alone does not give it up
            while vsock._held != 1:  # noqa: ASYNC110
                await trio.sleep(0.001)
            await trio.sleep(0.2)
            assert vsock._held == 1
            nursery.cancel_scope.cancel()
    await patient.aclose()


async def test_a_program_that_accepts_nobody(tmp_path: Path) -> None:
    """The guest is told that it is refused, and never that it is connected."""
    path = tmp_path / "vsock"
    vsock = Vsock(unix=path)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(f"{path}_52")
        server.listen(0)
        first.connect(f"{path}_52")  # fills its queue
        async with guest_of(vsock) as guest:
            (await client_of(path)).socket.close()
            await guest.send(REQUEST, 9, 52)
            assert await packets(guest, 1) == [(RST, 9, 52, 0, b"")]


async def test_a_busy_program_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avmm.devices.virtio.vsock_unix._HOST_SECONDS", 30.0)
    path = tmp_path / "vsock"
    vsock = Vsock(unix=path)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(f"{path}_52")
        server.listen(0)
        first.connect(f"{path}_52")
        async with guest_of(vsock) as guest:
            (await client_of(path)).socket.close()
            await guest.send(REQUEST, 9, 52)
            await trio.sleep(0.1)
            assert guest.got() == []
            server.accept()[0].close()
            assert await packets(guest, 1) == [(RESPONSE, 9, 52, 0, b"")]


async def test_one_client_more_than_there_are_descriptors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vsock = Vsock(unix=tmp_path / "vsock")
    async with guest_of(vsock) as guest:
        (await client_of(tmp_path / "vsock")).socket.close()
        with socket.socket(socket.AF_UNIX) as client:
            with no_more_descriptors(), trio.fail_after(20):
                client.connect(str(tmp_path / "vsock"))
                client.send(b"CONNECT 7\n")
                while "waits" not in caplog.text:  # noqa: ASYNC110
                    await trio.sleep(0.001)
                await settle()
            assert caplog.text.count("a client waits") == 1
            assert "Too many open files" in caplog.text
            ((op, ours, _, _, _),) = await packets(guest, 1)
            assert (op, ours) == (REQUEST, 7)


async def test_where_no_socket_can_be(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "vsock", tmp_path / ("x" * 108)):
        with pytest.raises(BaseExceptionGroup) as caught:
            async with guest_of(Vsock(unix=path)):
                await trio.sleep_forever()
        assert caught.group_contains(ConfigError, match="vsock socket")
