"""Streams by unix sockets, TCP, TLS and descriptors: `avmm.connect` and `avmm.listen`."""

from __future__ import annotations

import datetime
import os
import re
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme
from support.scarcity import no_more_descriptors
from trio.testing import wait_all_tasks_blocked

import avmm
from avmm.transfer import tls as security
from avmm.transfer import transports
from avmm.transfer.connection import Connection
from avmm.transfer.protocol import Source

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def proof(
    folder: Path, signer: trustme.CA, trusts: trustme.CA, host: str, *, expired: bool = False
) -> avmm.Tls:
    """Files of a certificate for `host`, and of who is trusted."""
    past = datetime.datetime(2001, 1, 2, tzinfo=datetime.UTC) if expired else None
    certificate = signer.issue_cert(host, not_after=past)
    where = folder / os.urandom(4).hex()
    where.mkdir()
    certificate.cert_chain_pems[0].write_to_path(where / "cert")
    certificate.private_key_pem.write_to_path(where / "key")
    trusts.cert_pem.write_to_path(where / "ca")
    return avmm.Tls(where / "cert", str(where / "key"), where / "ca")


async def exchange(calling: trio.abc.Stream, called: trio.abc.Stream) -> None:
    """A few bytes each way, and the end."""
    for one, other in ((calling, called), (called, calling)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send_all, b"hello")
            assert await other.receive_some() == b"hello"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(calling.aclose)
        assert await called.receive_some() == b""
    await called.aclose()


@asynccontextmanager
async def joined(
    listener: avmm.Listener, tls: avmm.Tls | None = None
) -> AsyncIterator[tuple[trio.abc.Stream, trio.abc.Stream]]:
    calling: list[trio.abc.Stream] = []

    async def call() -> None:
        calling.append(await avmm.connect(listener.target, tls=tls))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        called = await listener.accept()
    async with calling[0], called:
        yield calling[0], called


async def test_a_unix_socket_is_its_users_alone_and_goes_with_its_listener(
    tmp_path: Path,
) -> None:
    path = tmp_path / "line"
    async with await avmm.listen(f"unix:{path}") as listener:
        assert listener.target == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for _ in range(2):
            async with joined(listener) as both:
                await exchange(*both)
        with pytest.raises(avmm.ConfigError, match=r"line: Address already in use"):
            await avmm.listen(f"unix:{path}")
    assert not path.exists()
    with pytest.raises(avmm.MigrationError, match=f"^unix:{path}: No such file"):
        await avmm.connect(f"unix:{path}")
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_a_socket_that_nobody_serves_any_more_is_taken_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "line"))
    async with (
        await avmm.listen(f"unix:{tmp_path / 'line'}") as listener,
        joined(listener) as both,
    ):
        await exchange(*both)


async def test_who_calls_waits_where_as_many_wait_as_may(tmp_path: Path) -> None:
    """Linux says EAGAIN then, and trio takes the socket for connected."""
    path = str(tmp_path / "line")
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as first:
        full.bind(path)
        full.listen(0)
        first.connect(path)
        with pytest.raises(avmm.ConfigError, match="in use"):  # it is served, if slowly
            await avmm.listen(f"unix:{path}")
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                async with await avmm.connect(f"unix:{path}") as stream:
                    assert await stream.receive_some() == b"at last"

            nursery.start_soon(call)
            await wait_all_tasks_blocked()
            full.accept()[0].close()
            full.settimeout(10)
            second = await trio.to_thread.run_sync(lambda: full.accept()[0])
            with second:
                second.sendall(b"at last")


@pytest.mark.parametrize("target", ["unix:{}/line", "tcp:127.0.0.1:0"])
async def test_one_caller_more_than_there_are_descriptors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, target: str
) -> None:
    async with await avmm.listen(target.format(tmp_path)) as listener:
        kind, _, rest = listener.target.partition(":")
        family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        with socket.socket(family) as client:
            address = rest if kind == "unix" else ("127.0.0.1", int(rest.rpartition(":")[2]))

            async def call() -> None:
                with no_more_descriptors():
                    client.connect(address)
                    while "a client waits" not in caplog.text:  # noqa: ASYNC110
                        await trio.sleep(0.001)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                async with await listener.accept() as stream:
                    client.send(b"hello")
                    assert await stream.receive_some() == b"hello"


async def test_a_program_that_accepts_nobody_is_named(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "line"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(str(path))
        server.listen(0)
        first.connect(str(path))
        with pytest.raises(avmm.MigrationError, match=f"{path}: the program that listens there"):
            await avmm.connect(f"unix:{path}")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_tcp_tells_the_port_that_was_free(host: str) -> None:
    async with await avmm.listen(f"tcp:{host}:0") as listener:
        assert listener.target.startswith(f"tcp:{host}:")
        assert not listener.target.endswith(":0")
        async with joined(listener) as both:
            await exchange(*both)
    with pytest.raises(avmm.MigrationError, match=f"^{listener.target}: "):
        await avmm.connect(listener.target)


async def test_a_host_with_several_addresses_is_waited_at_by_several_tasks() -> None:
    """Who calls at the same moment, at two addresses, is lost for none of them."""
    found: list[trio.abc.Stream] = []
    sockets = [await trio.open_tcp_listeners(0, host="127.0.0.1") for _ in range(2)]
    both = [listener for (listener,) in sockets]
    async with avmm.Listener(transports.Target("tcp", host="x", port=1), both, None) as listener:

        async def take() -> None:
            found.append(await listener.accept())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            nursery.start_soon(take)
            await trio.testing.wait_all_tasks_blocked()
            callers = []
            for one in both:
                caller = socket.socket()
                caller.connect(one.socket.getsockname())
                callers.append(caller)
        assert len(found) == 2
        with trio.move_on_after(0.01):
            await listener.accept()
        for caller, stream in zip(callers, found, strict=True):
            caller.close()
            await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_tls_shows_both_sides_who_the_other_is(
    tmp_path: Path, authority: trustme.CA
) -> None:
    there = proof(tmp_path, authority, authority, "127.0.0.1")
    here = proof(tmp_path, authority, authority, "whoever.example")
    async with (
        await avmm.listen("tcp:127.0.0.1:0", tls=there) as listener,
        joined(listener, here) as both,
    ):
        assert isinstance(both[0], trio.SSLStream)
        await exchange(*both)


async def logged(caplog: pytest.LogCaptureFixture) -> None:
    with trio.fail_after(5):
        while not caplog.text:
            await trio.lowlevel.checkpoint()


async def refused(
    there: avmm.Tls, here: avmm.Tls | None, caplog: pytest.LogCaptureFixture
) -> tuple[str, str]:
    """What a source is told that calls, and what the receiver logs."""
    caplog.clear()
    async with (
        await avmm.listen("tcp:127.0.0.1:0", tls=there) as listener,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(listener.accept)
        source = Source(bytes(16))
        with pytest.raises(avmm.MigrationError) as caught:
            async with await avmm.connect(listener.target, tls=here) as stream:
                # TLS 1.3: who calls is done before it hears what the other side makes of it.
                connection = Connection(stream, source, 5)
                await connection.say(source.hello())
                while not source.next():
                    await connection.hear()
        await logged(caplog)
        nursery.cancel_scope.cancel()
    return str(caught.value), caplog.text


HOST = "127.0.0.1"


async def test_both_sides_are_told_why_they_do_not_come_together(
    tmp_path: Path, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    other = trustme.CA()
    good = proof(tmp_path, authority, authority, HOST)
    cases = {
        "the receiver is another's": (
            proof(tmp_path, other, authority, HOST),
            good,
            rf"unable to get local issuer certificate; it is not signed by {good.ca} \(--tls-ca\)",
            r"does not accept this side's certificate \(.*/cert\): its --tls-ca has not signed it",
        ),
        "the source is another's": (
            good,
            proof(tmp_path, other, authority, HOST),
            r"does not accept this side's certificate: its --tls-ca has not signed it",
            rf"unable to get local issuer certificate; it is not signed by {good.ca} \(--tls-ca\)",
        ),
        "the receiver has another name": (
            proof(tmp_path, authority, authority, "another.example"),
            good,
            r"IP address mismatch, certificate is not valid for '127\.0\.0\.1'",
            r"it may be for another name than the other side's HOST or --tls-peer",
        ),
        "the receiver has expired": (
            proof(tmp_path, authority, authority, HOST, expired=True),
            good,
            r"certificate has expired",
            r"does not accept this side's certificate \(.*/cert\): it has expired",
        ),
        "the source has expired": (
            good,
            proof(tmp_path, authority, authority, HOST, expired=True),
            r"does not accept this side's certificate: it has expired",
            r"certificate has expired",
        ),
        "the source speaks no TLS": (
            good,
            None,
            r"this side wants TLS: give the source --tls-cert, --tls-key and --tls-ca",
            r"it does not speak TLS; expected --tls-cert, --tls-key and --tls-ca",
        ),
        "the source is not who was expected": (
            replace(good, peer="source.example"),
            good,
            r"not whom this side expects: its certificate is not for 'source.example' \(--tls-pe",
            r"its certificate is not for 'source.example' \(--tls-peer\)",
        ),
    }
    for name, (there, here, told, logged) in cases.items():
        found = await refused(there, here, caplog)
        assert re.search(told, found[0]), (name, found[0])
        assert re.search(logged, found[1]), (name, found[1])


async def test_a_program_without_a_certificate(
    tmp_path: Path, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    there = proof(tmp_path, authority, authority, HOST)
    context = ssl.create_default_context(cafile=there.ca)
    async with (
        await avmm.listen(f"tcp:{HOST}:0", tls=there) as listener,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(listener.accept)
        port = int(listener.target.rpartition(":")[2])
        stream = await trio.open_ssl_over_tcp_stream(HOST, port, ssl_context=context)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        assert "CERTIFICATE_REQUIRED" in str(caught.value.__cause__)
        await trio.aclose_forcefully(stream)
        await logged(caplog)
        nursery.cancel_scope.cancel()
    assert "the other side has shown no certificate (--tls-cert)" in caplog.text


async def test_a_source_that_speaks_tls_to_a_receiver_that_does_not(
    tmp_path: Path, authority: trustme.CA
) -> None:
    here = proof(tmp_path, authority, authority, HOST)
    async with await avmm.listen(f"tcp:{HOST}:0") as listener:
        whys: list[str] = []

        async def look() -> None:
            whys.append(await transports.why_no_source(await listener.accept()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            with pytest.raises(avmm.MigrationError, match="it may not have been given --tls-cert"):
                await avmm.connect(listener.target, tls=here)
    assert whys == ["it speaks TLS, and this side was given no --tls-cert, --tls-key and --tls-ca"]


@pytest.mark.parametrize("peer", ["", ".x", "x\0y", "a b", "-x", "*.example"])
def test_what_is_no_name(peer: str) -> None:
    with pytest.raises(avmm.ConfigError, match=r"peer .*: expected a DNS name or an IP address"):
        avmm.Tls("cert", "key", "ca", peer)


@pytest.mark.parametrize("name", ["source.example", "SOURCE.example", "10.0.0.7", "2001:db8::1"])
async def test_the_names_that_are_expected(
    tmp_path: Path, authority: trustme.CA, name: str
) -> None:
    here = replace(proof(tmp_path, authority, authority, name.lower()), peer="there.example")
    there = replace(proof(tmp_path, authority, authority, "there.example"), peer=name)
    async with (
        await avmm.listen(f"tcp:{HOST}:0", tls=there) as listener,
        joined(listener, here) as both,
    ):
        await exchange(*both)


async def test_who_never_shakes_hands_is_waited_for_in_vain(
    tmp_path: Path, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then it is the next one's turn."""
    monkeypatch.setattr(security, "CALLED_SECONDS", 0.2)
    tls = proof(tmp_path, authority, authority, "127.0.0.1")
    async with await avmm.listen("tcp:127.0.0.1:0", tls=tls) as listener:
        port = int(listener.target.rpartition(":")[2])
        async with await trio.open_tcp_stream("127.0.0.1", port), joined(listener, tls) as both:
            await exchange(*both)
    monkeypatch.setattr(security, "CALLING_SECONDS", 0.1)
    async with await avmm.listen("tcp:127.0.0.1:0") as listener:
        with pytest.raises(avmm.MigrationError, match=r"no handshake within 0.1 s"):
            await avmm.connect(listener.target, tls=tls)


@pytest.mark.parametrize("which", ["cert", "key", "ca"])
async def test_files_that_are_none(tmp_path: Path, authority: trustme.CA, which: str) -> None:
    tls = proof(tmp_path, authority, authority, "127.0.0.1")
    Path(getattr(tls, which)).write_text("nonsense")
    for way in (avmm.connect, avmm.listen):
        with pytest.raises(avmm.ConfigError, match=f"^TLS: .*{getattr(tls, which)}"):
            await way("tcp:127.0.0.1:1", tls=tls)
        with pytest.raises(avmm.ConfigError, match=r"^target unix:/x: TLS is for tcp"):
            await way("unix:/x", tls=tls)


async def test_reading_files_does_not_stall_the_loop(
    tmp_path: Path, authority: trustme.CA
) -> None:
    """The certificate is a pipe: it is there when the loop has gone on meanwhile."""
    tls = proof(tmp_path, authority, authority, "127.0.0.1")
    content = Path(tls.cert).read_bytes()
    Path(tls.cert).unlink()
    os.mkfifo(tls.cert)
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            await wait_all_tasks_blocked()
            await trio.to_thread.run_sync(Path(tls.cert).write_bytes, content)

        nursery.start_soon(write)
        async with await avmm.listen("tcp:127.0.0.1:0", tls=tls):
            pass


async def test_descriptors_are_taken_over() -> None:
    ours, theirs = socket.socketpair()
    here = await avmm.connect(f"fd:{ours.detach()}")
    there = await avmm.connect(f"fd:{theirs.detach()}")
    await exchange(here, there)
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    number = server.detach()
    async with await avmm.listen(f"fd:{number}") as listener:
        assert listener.target == f"fd:{number}"
        async with await avmm.connect(f"tcp:127.0.0.1:{port}") as caller:
            await exchange(caller, await listener.accept())
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)


Opened = Callable[[], socket.socket]


@pytest.mark.parametrize(
    "opened",
    [
        partial(socket.socket, socket.AF_UNIX),
        partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM),
        lambda: socket.create_server(("127.0.0.1", 0)),
    ],
    ids=["unconnected", "datagrams", "listening"],
)
async def test_descriptors_that_are_something_else_stay_as_they_are(opened: Opened) -> None:
    with opened() as something:
        target = f"fd:{something.fileno()}"
        with pytest.raises(avmm.ConfigError, match="expected a connected stream socket"):
            await avmm.connect(target)
        os.fstat(something.fileno())
    with socket.socket(socket.AF_UNIX) as something:
        with pytest.raises(avmm.ConfigError, match="expected a listening stream socket"):
            await avmm.listen(f"fd:{something.fileno()}")
        os.fstat(something.fileno())
    with pytest.raises(avmm.ConfigError, match="fd:987654: Bad file descriptor"):
        await avmm.connect("fd:987654")


@pytest.mark.parametrize(
    "target",
    [
        *("", "unix:", "unix:a\0b", "udp:host:1"),
        *("tcp:host", "tcp:host:70000", "tcp::1", "tcp:a..b:5", "tcp:host:²"),
        *("fd:", "fd:-1", "fd:x", "fd:99999999999"),
    ],
)
async def test_targets_that_are_none(target: str) -> None:
    for way in (avmm.connect, avmm.listen):
        with pytest.raises(avmm.ConfigError, match="expected unix:PATH, tcp:HOST:PORT or fd:N"):
            await way(target)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_cancelling_leaves_nothing_open(tmp_path: Path) -> None:
    before = descriptors()
    with trio.CancelScope() as scope:
        scope.cancel()
        await avmm.listen(f"unix:{tmp_path / 'line'}")
    assert scope.cancelled_caught
    assert not (tmp_path / "line").exists()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with trio.CancelScope() as scope:
            scope.cancel()
            await avmm.connect(f"fd:{ours.fileno()}")
        assert scope.cancelled_caught
        os.fstat(ours.fileno())
    async with await avmm.listen(f"unix:{tmp_path / 'line'}") as listener:
        with trio.move_on_after(0.01) as scope:
            await listener.accept()
        assert scope.cancelled_caught
    assert descriptors() == before


@pytest.mark.usefixtures("kvm", "nothing_left")
async def test_a_guest_moves_over_them(tmp_path: Path) -> None:
    async with (
        await avmm.listen(f"unix:{tmp_path / 'line'}") as listener,
        avmm.Machine(memory="16M") as vm,
        trio.open_nursery() as nursery,
    ):

        async def leave() -> None:
            async with await avmm.connect(listener.target) as stream:
                await vm.migrate(stream)

        nursery.start_soon(leave)
        async with await listener.accept() as stream, avmm.receive(stream) as moved:
            await moved.console.send_all(b"exit 3\r")
            assert (await moved.wait()).status == 3
