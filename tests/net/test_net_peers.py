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
