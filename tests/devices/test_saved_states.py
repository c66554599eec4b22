"""Every device's saved state: it has a version, and what is no such state is refused by name and
changes nothing."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.states import mappings, with_other_keys, with_other_types, with_other_versions
from support.virtio_cases import CASES, Case
from support.virtio_driver import Bench, settle

import avmm.devices
import avmm.disks
from avmm.devices.base import Device
from avmm.devices.pc.cmos import Cmos
from avmm.devices.pc.exit import DebugExit, ExitStatus
from avmm.devices.pc.i8042 import I8042
from avmm.devices.pc.pci import PciConfig
from avmm.devices.pc.post import DebugConsole, PostCode
from avmm.devices.pc.power import Power
from avmm.devices.pc.pvpanic import Pvpanic
from avmm.devices.serial import Serial
from avmm.devices.state import Stateless
from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.mmio import VirtioMmio
from avmm.disks import OverlayDisk, RawDisk
from avmm.disks.base import Disk
from avmm.errors import DeviceError
from avmm.plain import decode, encode


def _nothing(*_: object) -> None:
    pass


PC: dict[str, Callable[[], Device]] = {
    "Cmos": lambda: Cmos(low_memory=1 << 20),
    "DebugConsole": DebugConsole,
    "DebugExit": lambda: DebugExit(_nothing),
    "ExitStatus": lambda: ExitStatus(_nothing),
    "I8042": lambda: I8042(_nothing),
    "PciConfig": PciConfig,
    "PostCode": PostCode,
    "Power": lambda: Power(_nothing, _nothing, off_type=5, reset_value=1),
    "Pvpanic": lambda: Pvpanic(_nothing),
    "Serial": lambda: Serial(output_size=8, input_size=32),
}


@contextmanager
def raw_disk(path: Path) -> Iterator[RawDisk]:
    with RawDisk(path) as disk:
        yield disk


@contextmanager
def overlay_disk(path: Path) -> Iterator[OverlayDisk]:
    with OverlayDisk(path) as disk:
        disk._write(512, [memoryview(b"x" * 1024)])
        disk._write(8192, [memoryview(b"y" * 512)])
        yield disk


DISKS = {"raw": raw_disk, "overlay": overlay_disk}
CONTRACTS = {Device, VirtioDevice, Disk, Stateless}
"""What others are made of."""


def test_every_device_there_is_is_tested_here() -> None:
    found = set()
    for package in (avmm.devices, avmm.disks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for _, kind in inspect.getmembers(
                importlib.import_module(module.name), inspect.isclass
            ):
                if issubclass(kind, Device | VirtioDevice | Disk) and kind.__name__[0] != "_":
                    found.add(kind)
    tested = {type(make()) for make in PC.values()} | {VirtioMmio, RawDisk, OverlayDisk}
    for case in CASES:
        tested.update(type(case.make()).__mro__)
    assert found - CONTRACTS <= tested
    assert len(found) > 15


def demand_refused(thing: Any, state: dict[str, Any]) -> None:
    """Whatever is wrong in `state`, it is refused by name, and `thing` is as it was."""
    before = copy.deepcopy(thing.save())
    number = 0
    spoilt = (*with_other_versions(state), *with_other_keys(state), *with_other_types(state))
    for said, wrong in spoilt:
        with pytest.raises(DeviceError) as caught:
            thing.load(wrong)
        assert said in str(caught.value)
        assert len(str(caught.value)) < 500
        assert thing.save() == before
        number += 1
    assert number >= 7
    for wrong in (None, [], 5, "state", b"state"):
        with pytest.raises(DeviceError, match="expected a mapping"):
            thing.load(wrong)
    assert thing.save() == before


def demand_versions(state: dict[str, Any]) -> None:
    for path in mappings(state):
        found: Any = state
        for key in path:
            found = found[key]
        assert type(found["version"]) is int, path
        assert next(iter(found)) == "version", path


@pytest.mark.parametrize("make", PC.values(), ids=PC.keys())
def test_of_a_device(cpu, make: Callable[[], Device]) -> None:
    port = cpu(make())
    for offset in range(8):
        with suppress(DeviceError):
            port.out(offset, 0x11)
    state = dict(port.device.save())
    demand_versions(state)
    other = cpu(make()).device
    version = state["version"]
    said = f"^{other.name}'s state has version {version + 1}, expected {version}$"
    with pytest.raises(DeviceError, match=said):
        other.load({**state, "version": version + 1})
    demand_refused(other, state)
    other.load(decode(encode(state), "it"))
    assert other.save() == state


@pytest.mark.parametrize("make", DISKS.values(), ids=DISKS.keys())
def test_of_a_disk(tmp_path: Path, make: Any) -> None:
    (tmp_path / "disk").write_bytes(bytes(16384))
    with make(tmp_path / "disk") as disk:
        state = dict(disk.save())
        demand_versions(state)
        with pytest.raises(DeviceError, match=r"disk's state has version 2, expected 1$"):
            disk.load({**state, "version": 2})
        demand_refused(disk, state)
        disk.load(decode(encode(state), "it"))
        assert disk.save() == state


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_of_a_virtio_device_at_work(case: Case) -> None:
    bench, other = Bench(case.make()), Bench(case.make())
    async with bench.running() as driver:
        await driver.start()
        if case.name == "console":
            bench.model._say(0, 1, 1)
        case.submit(driver)
        await settle()
        await bench.device.quiesce()
        state = dict(bench.device.save())
        assert case.listened is not None or state["queues"][case.queue]["in_flight"]
    demand_versions(state)
    name = other.device.name
    with pytest.raises(DeviceError, match=f"^{name}'s state has version 2, expected 1$"):
        other.device.load({**state, "version": 2})
    demand_refused(other.device, state)
    demand_refused(other.model, dict(bench.model.save()))
    other.device.load(decode(encode(state), "it"))
    assert other.device.save() == state
    for each in (bench, other):
        each.memory.close()
