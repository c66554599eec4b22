"""Unix sockets as others speak them: passt, and QEMU's `-netdev stream`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import trio
from support.passt_guest import reach

import avmm
from avmm.devices import sockets
from avmm.devices.virtio.frame import Frame
from avmm.net.unix import UnixStream


def test_a_guest_behind_passt() -> None:
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed (Debian: apt-get install passt)")
    done = subprocess.run(
        [sys.executable, "-m", "support.passt_guest"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


async def test_qemu_between_two_of_ours(tmp_path: Path) -> None:
    """A hub in QEMU: to its one side we connect, at the other it connects to us."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("QEMU is not installed (Debian: apt-get install qemu-system-x86)")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    command = [qemu, "-M", "none", "-nodefaults", "-display", "none"]
    for name, path, server in (("a", theirs, "on"), ("b", ours, "off")):
        address = f"addr.type=unix,addr.path={path}"
        command += ["-netdev", f"stream,id={name},server={server},{address}"]
        command += ["-netdev", f"hubport,id=port-{name},hubid=0,netdev={name}"]
    with closing(UnixStream.listen(ours)) as right:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.run_process, command))
            with trio.fail_after(30):
                await right.connected()
                with closing(await reach(theirs)) as left:
                    # What comes to a hub is lost for a port that it has not finished connecting.
                    got, probe = b"", b"is anybody there?"
                    while not got:
                        await left.send(Frame(probe))
                        with trio.move_on_after(0.1):
                            got = (await right.receive()).data
                    for near, far in ((left, right), (right, left)):
                        for size in (14, 60, 1514, 9000, 65535):
                            data = bytes([size % 251]) * size
                            await near.send(Frame(data))
                            while (got := (await far.receive()).data) == probe:
                                pass
                            assert got == data
            nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("kvm", "nothing_left")
class TestAPeerThatStaysToTheEnd:
    """A machine's backends are closed in a thread, where trio's sockets cannot be closed."""

    async def test_we_have_connected_to_it(self, tmp_path: Path) -> None:
        with closing(sockets.listen(tmp_path / "net", "net")) as listener:
            async with avmm.Machine(memory="64M", net=[f"unix={tmp_path / 'net'}"]):
                peer, _ = listener.accept()
            with peer:
                assert peer.recv(1) == b""

    async def test_it_has_connected_to_us(self, tmp_path: Path) -> None:
        async with avmm.Machine(memory="64M", net=[f"listen={tmp_path / 'net'}"]) as vm:
            peer = await sockets.connect(tmp_path / "net")
            with trio.fail_after(30):
                await vm.nets[0].backend.connected()
        async with peer:
            assert await peer.receive_some() == b""

    async def test_the_machine_cannot_be_entered(self, tmp_path: Path) -> None:
        (tmp_path / "kernel").write_bytes(b"nothing")
        with closing(sockets.listen(tmp_path / "net", "net")):
            vm = avmm.Machine(kernel=tmp_path / "kernel", net=[f"unix={tmp_path / 'net'}"])
            with pytest.raises(avmm.AvmmError, match="kernel"):
                async with vm:
                    pass
