"""Disks under a guest of avmm's own: run to the end, paused and moved in the midst of requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import avmm
from avmm import guests

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("kvm", "nothing_left"),
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"i" * (1 << 20))
    return path


def config(op: str, count: int, *disks: str, depth: int = 8) -> dict[str, Any]:
    cmdline = f"kind=block op={op} bytes=4096 depth={depth} count={count}"
    kernel = guests.path("rings")
    return {"kernel": kernel, "cmdline": cmdline, "disks": list(disks), "acpi": False}


def served(output: str, count: int) -> bool:
    return f"rings count={count} " in output and " errors=0 " in output


async def said(vm: avmm.Machine) -> str:
    output = b""
    async for data in vm.console:
        output += data
    return output.decode()


@pytest.mark.parametrize("options", ["", ",overlay"])
@pytest.mark.parametrize("op", ["read", "write"])
async def test_a_guest_on_a_disk(image: Path, op: str, options: str) -> None:
    with trio.fail_after(300):
        async with avmm.Machine(**config(op, 300, f"{image}{options}")) as vm:
            assert served(await said(vm), 300), await vm.wait()
    changed = op == "write" and not options
    assert (image.read_bytes() != b"i" * (1 << 20)) is changed


async def test_a_read_only_disk_refuses_the_guest(image: Path) -> None:
    with trio.fail_after(300):
        async with avmm.Machine(**config("write", 10, f"{image},ro")) as vm:
            assert "count=10 bytes=10 errors=10 " in await said(vm)
    assert image.read_bytes() == b"i" * (1 << 20)


class Requests:
    """Counts the writes that begin on any disk, and says when there were enough."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left = 0
        self._enough = trio.Event()
        for kind in (avmm.RawDisk, avmm.OverlayDisk):
            monkeypatch.setattr(kind, "begin_write", self._counted(kind.begin_write))

    def _counted(self, begin_write: Callable[..., bool]) -> Callable[..., bool]:
        def begin(*args: Any) -> bool:
            self._left -= 1
            if self._left == 0:
                self._enough.set()
            return begin_write(*args)

        return begin

    async def begun(self, count: int) -> None:
        """Return when `count` more have begun."""
        self._left, self._enough = count, trio.Event()
        await self._enough.wait()


async def test_pauses_in_the_midst_of_requests(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = Requests(monkeypatch)
    with trio.fail_after(400):
        async with avmm.Machine(**config("write", 3000, str(image))) as vm:
            for _ in range(30):
                await requests.begun(60)
                async with vm.paused(deadline=10):
                    frozen = vm.memory.read(0, vm.memory.size), image.read_bytes()
                    await trio.sleep(0.002)
                    assert (vm.memory.read(0, vm.memory.size), image.read_bytes()) == frozen
            assert served(await said(vm), 3000), await vm.wait()


@pytest.mark.parametrize("options", ["", ",overlay"])
async def test_moved_in_the_midst_of_requests(
    image: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever loads opens the file after it was closed: it is locked as long as it is in use."""
    requests = Requests(monkeypatch)
    settings = config("write", 8000, f"{image}{options}")
    state = None
    with trio.fail_after(400):
        for _ in range(5):
            async with avmm.Machine(**settings, state=state) as vm:
                await requests.begun(300)
                async with vm.paused(deadline=10):
                    with pytest.raises(avmm.ConfigError, match="in use"):
                        avmm.RawDisk(image)
                    state = vm.save()
        async with avmm.Machine(**settings, state=state) as vm:
            assert served(await said(vm), 8000), await vm.wait()
