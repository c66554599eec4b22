"""Makes the devices that a machine's settings ask for, together with their backends on the host.

`avmm.options` reads what people write. Here it becomes an open disk, a socket device, or a network
device with its backend.
"""

from __future__ import annotations

from contextlib import ExitStack

from avmm.config import MachineConfig
from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.block import VirtioBlock
from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.frame import Backend
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.rng import Rng
from avmm.devices.virtio.vsock import Vsock
from avmm.disks import open_disk
from avmm.net.tap import Tap
from avmm.net.unix import UnixStream
from avmm.options import NetOptions
from avmm.parts.placing import Unplaced, virtio


def configured(config: MachineConfig, stack: ExitStack, *, held: bool) -> list[Unplaced]:
    """The virtio devices that the settings ask for, always in the same order.

    `stack` closes their backends. With `held` False they do not hold anything yet that another
    machine may hold. Raises `ConfigError` if a file, interface or socket cannot be opened.
    """
    models: list[VirtioDevice] = []
    for number, disk in enumerate(config.disks):
        disk_backend = stack.enter_context(open_disk(disk, held=held))
        models.append(VirtioBlock(disk_backend, serial=disk.serial or f"disk{number}"))
    if config.rng:
        models.append(Rng())
    if config.balloon:
        models.append(Balloon())
    if config.vsock is not None:
        vsock = Vsock(config.vsock.cid, unix=config.vsock.unix, held=held)
        stack.callback(vsock.close)
        models.append(vsock)
    for net in config.net:
        net_backend = _open_net(net, held)
        stack.callback(net_backend.close)
        models.append(Net(net_backend, mac=net.mac, mtu=net.mtu))
    return [virtio(model) for model in models]


def _open_net(options: NetOptions, held: bool) -> Backend:
    """With `held` False the backend holds nothing on the host before `acquire`."""
    if options.tap is not None:
        return Tap(options.tap, held=held, mtu=options.mtu)
    if options.listen is not None:
        return UnixStream.listen(options.listen, held=held)
    assert options.unix is not None
    return UnixStream.connect(options.unix, held=held)
