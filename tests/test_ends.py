"""Ends of consoles: replay for who comes late, many clients, slow ones, files, terminals."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
import trio
import trio.testing
from support.scarcity import no_more_descriptors

from avmm.ends import Scrollback, serve_pty, serve_unix, write_file
from avmm.errors import AvmmError, ConfigError


def cable() -> tuple[trio.abc.Stream, trio.abc.Stream]:
    return trio.testing.memory_stream_pair()


async def test_the_newest_is_kept_and_replayed() -> None:
    guest, host = cable()
    log = Scrollback(host, 10)
    seen = bytearray()

    async def keep(data: bytes) -> None:
        seen.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        await guest.send_all(b"0123456789abc")
        await trio.testing.wait_all_tasks_blocked()
        assert log.contents == b"3456789abc"

        async def follow() -> None:
            await log.follow(keep)

        nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == b"3456789abc"
        await guest.send_all(b"def")
        await guest.aclose()
    assert seen == b"3456789abcdef"
    assert log.contents == b"6789abcdef"


async def test_clients_come_and_go(tmp_path: Path) -> None:
    guest, host = cable()
    log = Scrollback(host, 100)
    path = tmp_path / "socket"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        await nursery.start(serve_unix, log, path)
        await guest.send_all(b"boot\n")
        await trio.testing.wait_all_tasks_blocked()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for _ in range(2):
            async with await trio.open_unix_socket(path) as client:
                assert await client.receive_some() == b"boot\n"
                await client.send_all(b"root\n")
                assert await guest.receive_some() == b"root\n"
        first, second = [await trio.open_unix_socket(path) for _ in range(2)]
        assert await first.receive_some() == await second.receive_some() == b"boot\n"
        await guest.send_all(b"bye\n")
        await guest.aclose()
        for client in (first, second):
            assert await client.receive_some() == b"bye\n"
            assert await client.receive_some() == b""
            await client.aclose()
    assert not path.exists()


async def test_a_client_that_reads_nothing_holds_up_nobody(tmp_path: Path, autojump_clock) -> None:
    guest, host = cable()
    log = Scrollback(host, 1000)
    path = tmp_path / "socket"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        await nursery.start(serve_unix, log, path)
        await trio.sleep(0.1)
        async with await trio.open_unix_socket(path):
            for _ in range(4000):
                await guest.send_all(b"x" * 1000)
            await guest.aclose()
            with trio.fail_after(5):
                await log.ended()
    assert log.contents == b"x" * 1000


async def test_a_terminal() -> None:
    guest, host = cable()
    log = Scrollback(host)
    names: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        nursery.start_soon(serve_pty, log, names.append)
        await guest.send_all(b"login: ")
        await trio.testing.wait_all_tasks_blocked()
        fd = os.open(names[0], os.O_RDWR | os.O_NOCTTY)
        try:
            assert await trio.to_thread.run_sync(os.read, fd, 100) == b"login: "
            os.write(fd, b"\x03root\r")
            assert await guest.receive_some() == b"\x03root\r"
            await guest.aclose()
        finally:
            os.close(fd)


async def test_a_file(tmp_path: Path) -> None:
    guest, host = cable()
    log = Scrollback(host)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        nursery.start_soon(write_file, log, tmp_path / "log")
        await guest.send_all(b"one\n")
        await guest.send_all(b"two\n")
        await guest.aclose()
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"
    with pytest.raises(AvmmError, match="no/such"):
        await write_file(log, tmp_path / "no/such/file")


def test_a_size_that_is_none() -> None:
    with pytest.raises(ConfigError, match="scrollback"):
        Scrollback(cable()[0], 0)


async def test_a_client_that_ends_its_side_still_reads(tmp_path: Path) -> None:
    guest, host = cable()
    log = Scrollback(host)
    path = tmp_path / "socket"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        await nursery.start(serve_unix, log, path)
        async with await trio.open_unix_socket(path) as client:
            await client.send_all(b"command\n")
            await client.send_eof()
            assert await guest.receive_some() == b"command\n"
            await guest.send_all(b"answer\n")
            assert await client.receive_some() == b"answer\n"
            await guest.aclose()
            assert await client.receive_some() == b""


async def test_a_client_that_reads_no_more_still_sends(tmp_path: Path) -> None:
    guest, host = cable()
    log = Scrollback(host)
    path = tmp_path / "socket"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        await nursery.start(serve_unix, log, path)
        async with await trio.open_unix_socket(path) as client:
            client.socket.shutdown(socket.SHUT_RD)
            await guest.send_all(b"nobody reads this")
            await trio.testing.wait_all_tasks_blocked()
            await client.send_all(b"command\n")
            with trio.fail_after(20):
                assert await guest.receive_some() == b"command\n"
        await guest.aclose()


async def test_input_of_clients_that_have_gone_and_that_send_at_the_same_time(
    tmp_path: Path,
) -> None:
    guest, host = trio.testing.lockstep_stream_pair()
    log = Scrollback(host)
    path = tmp_path / "socket"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        await nursery.start(serve_unix, log, path)
        for _ in range(10):
            async with await trio.open_unix_socket(path) as client:
                await client.send_all(b"0123456789" * 1000)
        got = b""
        with trio.fail_after(20):
            while len(got) < 100_000:
                got += await guest.receive_some()
        assert got == b"0123456789" * 10_000
        await guest.aclose()


async def test_one_client_more_than_there_are_descriptors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guest, host = cable()
    log = Scrollback(host)
    path = tmp_path / "socket"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        await nursery.start(serve_unix, log, path)
        with socket.socket(socket.AF_UNIX) as client:
            with no_more_descriptors(), trio.fail_after(20):
                client.connect(str(path))
                while "a client waits" not in caplog.text:  # noqa: ASYNC110
                    await trio.sleep(0.001)
            client.send(b"command\n")
            with trio.fail_after(20):
                assert await guest.receive_some() == b"command\n"
        await guest.aclose()


async def test_asking_whether_a_path_is_served_makes_no_client(tmp_path: Path) -> None:
    guest, host = cable()
    log = Scrollback(host)
    path = tmp_path / "socket"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            server.setblocking(False)
            with pytest.raises(ConfigError, match="Address already in use"):
                await serve_unix(log, path)
            with pytest.raises(BlockingIOError):
                server.accept()
        await guest.aclose()
        await serve_unix(log, path)  # nobody serves the path now
