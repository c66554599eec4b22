"""The control socket of an embedder's own machine, its client in Python, and their lines."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trio
from support.scarcity import no_more_descriptors

import avmm
import avmm.control
from avmm.control import holds, protocol, verbs
from avmm.control.protocol import Event, Failure, Lines, Result

embedded = pytest.mark.usefixtures("kvm", "nothing_left")


@asynccontextmanager
async def steered(
    path: Path, **settings: Any
) -> AsyncIterator[tuple[avmm.Machine, avmm.control.Client]]:
    """A machine, its socket at `path`, and a client of that."""
    async with avmm.Machine(memory="16M", **settings) as vm, trio.open_nursery() as nursery:
        await nursery.start(avmm.control.serve, vm, path)
        async with await avmm.control.connect(path) as client:
            yield vm, client
        vm.stop()


async def said(vm: avmm.Machine, text: bytes) -> None:
    heard = b""
    while text not in heard:
        heard += await vm.console.receive_some()


@embedded
async def test_a_machine_is_steered_by_another_program(tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    async with steered(path) as (vm, client):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        told = await client.status()
        assert (told["state"], told["memory"], told["pid"]) == ("running", 16 << 20, os.getpid())
        assert (await client.pause(deadline=10))["pauses"]["control"] == 1
        assert vm.is_paused
        assert (await client.status())["state"] == "paused"
        with pytest.raises(avmm.AvmmError, match=r"paused by control \(1\)"):
            await client.migrate(f"unix:{tmp_path / 'nobody'}")
        assert (await client.resume())["pauses"]["control"] == 0
        with pytest.raises(avmm.AvmmError, match="the control socket has not paused the guest"):
            await client.resume()
        assert not vm.is_paused
        rounds: list[Mapping[str, Any]] = []
        taken = await client.snapshot(tmp_path / "snap", on_progress=rounds.append)
        assert taken["seconds"] > 0
        assert {name.name for name in fields(avmm.SnapshotProgress)} == set(rounds[0])
        await client.stop()
        assert (await vm.wait()).cause is avmm.Cause.STOPPED
    assert not path.exists()
    async with avmm.restore(tmp_path / "snap") as again:
        await again.console.send_all(b"exit 4\r")
        assert (await again.wait()).status == 4


@embedded
async def test_who_has_a_machine_moved_is_answered_though_it_ends_here(tmp_path: Path) -> None:
    events: list[Mapping[str, Any]] = []
    moved: list[avmm.control.Moved] = []
    target = f"unix:{tmp_path / 'line'}"

    async def move(client: avmm.control.Client) -> None:
        moved.append(await client.migrate(target, on_progress=events.append))

    async with (
        await avmm.listen(target) as listener,
        steered(tmp_path / "ctl") as (vm, client),
        trio.open_nursery() as nursery,
    ):
        await said(vm, b"avmm> ")
        nursery.start_soon(move, client)
        async with await listener.accept() as stream, avmm.receive(stream) as there:
            assert (await vm.wait()).cause is avmm.Cause.MOVED
            await there.console.send_all(b"exit 3\r")
            assert (await there.wait()).status == 3
    assert moved[0]["target"] == target
    assert moved[0]["rounds"] == events[-1]["round"]
    names = {name.name for name in fields(avmm.MigrationProgress)}
    assert set(events[0]) == {*names, "seconds"}
    assert events[0]["expected_downtime"] is None, "infinite"


@embedded
async def test_what_is_given_up_says_what_has_become_of_it(tmp_path: Path) -> None:
    async with (
        await avmm.listen(f"unix:{tmp_path / 'line'}") as listener,
        steered(tmp_path / "ctl") as (vm, client),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(hold, listener)

        async def give_up() -> None:
            await until(one, "migrating")
            await client.give_up()

        async with await avmm.control.connect(tmp_path / "ctl") as one:
            nursery.start_soon(give_up)
            with pytest.raises(avmm.control.GivenUp):
                await client.migrate(listener.target)
            assert (await one.status())["state"] == "running"
        nursery.cancel_scope.cancel()
        assert not vm.is_paused


async def until(client: avmm.control.Client, state: str) -> None:
    with trio.fail_after(10):
        while True:
            if (await client.status())["state"] == state:
                return
            await trio.sleep(0.01)


async def hold(listener: avmm.Listener) -> None:
    async with await listener.accept():
        await trio.sleep_forever()


@embedded
async def test_a_cancelled_call_closes_its_connection_and_is_given_up(tmp_path: Path) -> None:
    async with (
        await avmm.listen(f"unix:{tmp_path / 'line'}") as listener,
        steered(tmp_path / "ctl") as (_, client),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(hold, listener)
        with trio.move_on_after(0.2) as scope:
            await client.migrate(listener.target)
        assert scope.cancelled_caught
        with pytest.raises(trio.ClosedResourceError):
            await client.status()
        async with await avmm.control.connect(tmp_path / "ctl") as other:
            await until(other, "running")
        nursery.cancel_scope.cancel()


@embedded
async def test_errors_come_over_as_what_they_are(tmp_path: Path) -> None:
    async with steered(tmp_path / "ctl") as (_, client):
        with pytest.raises(avmm.SnapshotError, match="expected the name of a file"):
            await client.snapshot("/")
        with pytest.raises(avmm.ConfigError, match=r"expected unix:PATH or tcp:HOST:PORT"):
            await client.migrate("fd:3")
        with pytest.raises(avmm.MigrationError, match="No such file"):
            await client.migrate(f"unix:{tmp_path / 'nobody'}")
        with pytest.raises(avmm.ConfigError, match=r"^TLS: /nowhere/cert"):
            tls = avmm.Tls("/nowhere/cert", "/nowhere/key", "/nowhere/ca")
            await client.migrate("tcp:127.0.0.1:1", tls=tls)
        with pytest.raises(avmm.RunstateError, match=r"^settle: this machine runs; expected one"):
            await client.settle(runs_here=True)
        with pytest.raises(avmm.control.RequestError, match="deadline: expected a number above 0"):
            await client.pause(deadline=-1)
        refused = []

        async def ask() -> None:
            try:
                await client.status()
            except trio.BusyResourceError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
        assert len(refused) == 1


@embedded
async def test_its_pauses_end_with_it(tmp_path: Path) -> None:
    async with avmm.Machine(memory="16M") as vm:
        async with trio.open_nursery() as nursery:
            await nursery.start(avmm.control.serve, vm, tmp_path / "ctl")
            async with await avmm.control.connect(tmp_path / "ctl") as client:
                await client.pause()
            assert vm.is_paused
            nursery.cancel_scope.cancel()
        assert not vm.is_paused
        assert not (tmp_path / "ctl").exists()


@embedded
async def test_a_guest_that_has_ended_is_told_as_such() -> None:
    async with avmm.Machine(memory="16M") as vm, holds.opened(vm) as held:
        vm.stop()
        await vm.wait()
        told = await verbs.GetStatus().run(verbs.Control(vm, held), lambda progress: None)
    assert told["state"] == "ended"


@embedded
async def test_one_client_more_than_there_are_descriptors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ctl"
    async with steered(path):
        with socket.socket(socket.AF_UNIX) as client, trio.fail_after(30):
            client.setblocking(False)
            with no_more_descriptors():
                client.connect(str(path))
                while "a client waits" not in caplog.text:  # noqa: ASYNC110
                    await trio.sleep(0.001)
            await trio.lowlevel.wait_readable(client)
            assert b"avmm" in client.recv(4096)


@embedded
async def test_a_socket_that_cannot_be(tmp_path: Path) -> None:
    async with avmm.Machine(memory="16M") as vm:
        with pytest.raises(avmm.ConfigError, match=r"control socket .*: No such file"):
            await avmm.control.serve(vm, tmp_path / "no" / "ctl")
    with pytest.raises(avmm.ConfigError, match=r"control socket .*: No such file"):
        await avmm.control.connect(tmp_path / "ctl")


@pytest.mark.parametrize(
    ("greeting", "why"),
    [
        (b"", "the connection was closed before the answer came"),
        (b"220 mail.example ESMTP\r\n", "does not speak the control protocol"),
        (b'{"control": [2]}\n', "does not speak version 1"),
        (b'{"control": 1}\n', "does not speak version 1"),
        (b"[]\n", "does not speak the control protocol"),
        (b"[" * 100_000 + b"\n", "does not speak the control protocol"),
        (b"x" * (1 << 20) + b"x", "the line is longer than 1048576 bytes"),
    ],
)
async def test_what_answers_and_is_no_control_socket(
    tmp_path: Path, greeting: bytes, why: str
) -> None:
    path = tmp_path / "ctl"

    async def greet(listener: avmm.Listener) -> None:
        async with await listener.accept() as stream:
            with suppress(trio.BrokenResourceError):  # who has had enough of it goes
                await stream.send_all(greeting)

    async with await avmm.listen(f"unix:{path}") as listener, trio.open_nursery() as nursery:
        nursery.start_soon(greet, listener)
        with pytest.raises(avmm.AvmmError, match=f"^{path}: .*{why}"):
            await avmm.control.connect(path)


# -- without a socket -----------------------------------------------------------------------------


def test_each_verb_is_told_of_by_one_class() -> None:
    for name, verb in verbs.VERBS.items():
        assert verb.name == name
        assert f'"command": "{name}"' in (protocol.__doc__ or "")
        assert verb.help().endswith(".")
        for argument in fields(verb):
            assert verb.help(argument.name).endswith(".")
            assert f'"{argument.name}": ' in (protocol.__doc__ or "")


def test_lines_come_in_whatever_pieces() -> None:
    lines = Lines(8)
    for byte in b"one\n\ntwo":
        lines.feed(bytes([byte]))
    assert [lines.next() for _ in range(3)] == [b"one", b"", None]
    lines.feed(b" more\nx")
    assert [lines.next() for _ in range(2)] == [b"two more", None]
    lines.feed(b"12345678")
    assert lines.is_full
    with pytest.raises(avmm.control.RequestError, match="longer than 8 bytes"):
        lines.next()


def test_what_is_asked_comes_over() -> None:
    line = protocol.request("migrate", {"target": "tcp:h:1", "bandwidth": 5000, "deadline": None})
    assert line.count(b"\n") == 1
    verb = protocol.parse_request(line)
    assert isinstance(verb, verbs.Migrate)
    assert (str(verb.target), verb.bandwidth, verb.deadline) == ("tcp:h:1", 5000.0, None)
    assert (verb.downtime, verb.tls) == (0.1, None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (avmm.PauseTimeout("late"), avmm.PauseTimeout),
        (avmm.control.PauseRefused("no"), avmm.control.PauseRefused),
        (avmm.control.GivenUp("as you wish"), avmm.control.GivenUp),
        (avmm.control.RequestError("what?"), avmm.control.RequestError),
        (avmm.KvmError("KVM_RUN", 5), avmm.AvmmError),
    ],
    ids=repr,
)
def test_how_it_has_failed_comes_over(error: avmm.AvmmError, kind: type) -> None:
    error.add_note("and so on")
    heard = protocol.parse_answer(protocol.failure(error))
    assert isinstance(heard, Failure)
    assert type(heard.error) is kind
    assert str(heard.error) == f"{error}\nand so on"


def test_answers_that_are_none() -> None:
    assert protocol.parse_answer(protocol.result({"runs": "here"})) == Result({"runs": "here"})
    assert protocol.parse_answer(protocol.event({"round": 1})) == Event({"round": 1})
    strange: list[object] = [{}, {"result": 3}, {"error": "why"}, {"error": 1, "kind": "x"}, None]
    for answer in strange:
        with pytest.raises(avmm.control.NoControlSocket):
            protocol.parse_answer(json.dumps(answer).encode())
