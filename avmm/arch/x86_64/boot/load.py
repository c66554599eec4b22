"""Loads a guest: turns a file and a command line into memory that is ready to run.

`load` looks at the file and takes the first of these that fits:

1. *Flat*, only if the caller says so, because nothing in the file could tell.
2. *Multiboot with address fields* (`multiboot`): a loader must use them whatever else the file is,
   even an ELF (multiboot 3.1.3). 64-bit kernels boot this way, and their ELF headers may not be
   meant for a loader.
3. *PVH* (`pvh`): an ELF with Xen's note. It comes before multiboot's plain header because it
   serves both 32- and 64-bit images. It comes before plain ELF because whoever writes the note
   wants it used; besides its own boot protocol, Linux's vmlinux has no other entry.
4. *Multiboot* (`multiboot`): a 32-bit ELF with the header.
5. *ELF* (`elf`): a 64-bit ELF, entered in long mode by our own contract (`longmode`), of which
   Linux's 64-bit boot protocol is a part. ELFs of 2 to 5 may be static PIEs (`pie`).
6. *bzImage* (`bzimage`): the vmlinux inside it, or a program without a payload (memtest86+),
   entered in the same way.
7. *libkrunfw* (`krunfw`): a shared object with a kernel in it, entered in the same way.

Files are taken compressed as well (`compressed`). Any other file is refused, with an error that
says what it looks like. With `Protocol` a caller chooses the 64-bit protocol for a vmlinux that
has a PVH note, or insists on PVH.

If `load` fails, guest memory is partly written. Do not use it any further.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Final

from avmm.arch import contract
from avmm.arch.x86_64 import acpi as acpi_tables
from avmm.arch.x86_64.acpi import AcpiDevice
from avmm.arch.x86_64.boot import bzimage, elf, flat, krunfw, lowmem, multiboot, pie, pvh, zeropage
from avmm.arch.x86_64.boot.assembly import Assembly
from avmm.boot.describe import HEAD, describe
from avmm.boot.elf_headers import MAGIC, is_linux, parse
from avmm.boot.entry import Entry, FlatOptions, Protocol
from avmm.boot.image import SLACK, Image, open_image
from avmm.bus.space import Placement
from avmm.devices.virtio.mmio import VirtioMmio
from avmm.memory.ram import GuestMemory

StrPath = str | os.PathLike[str]

_MOST_UNPACKED: Final = 1 << 30
"""The most bytes of a kernel that is unpacked for others."""


def load_image(
    memory: GuestMemory, asked: contract.GuestImage, devices: Sequence[Placement]
) -> Entry:
    """Call `load` for a machine with these devices; see `avmm.arch.contract.Architecture`."""
    return load(
        memory,
        asked.kernel,
        cmdline=asked.cmdline,
        devices=named(devices),
        reads_acpi=not asked.is_bundled,
        initrd=asked.initrd,
        modules=asked.modules,
        cpus=asked.cpus,
        flat=asked.flat,
        protocol=asked.protocol,
        acpi=acpi_tables.devices(devices) if asked.acpi else None,
        levels={place.irq for place in devices if place.level and place.irq is not None},
    )


def named(devices: Sequence[Placement]) -> list[str]:
    """Kernel parameters that tell Linux where the virtio devices are (for boots without ACPI)."""
    return [
        f"virtio_mmio.device={place.size:#x}@{place.base:#x}:{place.irq}"
        for place in devices
        if isinstance(place.device, VirtioMmio)
    ]


def load(
    memory: GuestMemory,
    image: StrPath,
    *,
    cmdline: str = "",
    devices: Sequence[str] = (),
    reads_acpi: bool = True,
    initrd: StrPath | None = None,
    modules: Sequence[StrPath] = (),
    cpus: int = 1,
    flat: FlatOptions | None = None,
    protocol: Protocol = Protocol.AUTO,
    acpi: Sequence[AcpiDevice] | None = None,
    levels: Collection[int] = (),
) -> Entry:
    """Load `image` into fresh guest memory. Returns where the boot processor starts.

    A guest without ACPI, or one that does not read it, gets `devices` as kernel parameters.

    The guest gets `cmdline`, the memory map and the `modules` (`initrd` is the first of them) in
    the way that its format defines. An MP table describes its `cpus`, and which interrupts are
    level-triggered (`levels`). Unless `acpi` is None, ACPI
    tables describe the CPUs and these devices. A compressed image is decompressed, unless it is
    flat. The initrd and the modules are not decompressed: that is left to the guest.

    Blocks while it reads the files. Raises `ImageError` if a file cannot be loaded, and
    `ConfigError` if the command line, the number of CPUs or `flat` is not possible.
    """
    files = [os.fspath(path) for path in ([] if initrd is None else [initrd])]
    files += [os.fspath(path) for path in modules]
    assembly = Assembly(memory, os.fspath(image), cmdline, files, devices)
    assembly.write_mp_table(cpus, levels)
    assembly.write_reset_vector()
    if acpi is not None:
        assembly.write_acpi(cpus, acpi)
    if acpi is None or not reads_acpi:
        assembly.name_devices()
    limit = None if flat is not None else memory.size + SLACK
    with open_image(image, unpack_limit=limit) as content:
        entry = _load_image(assembly, content, flat, protocol)
    lowmem.write(assembly)
    return entry


def unpacked(kernel: StrPath) -> bytes:
    """A vmlinux without any compression around it, or the file as it is. Raises `ImageError`."""
    with open_image(kernel, unpack_limit=_MOST_UNPACKED) as image:
        if bzimage.is_bzimage(image) and (setup := bzimage.parse(image)).payload_size:
            with bzimage.unpack(image, setup, _MOST_UNPACKED) as vmlinux:
                return vmlinux.read(0, vmlinux.size, "its content")
        return image.read(0, image.size, "its content")


def _load_image(
    assembly: Assembly, image: Image, options: FlatOptions | None, protocol: Protocol
) -> Entry:
    if options is not None:
        return flat.load(assembly, image, options)
    if (bundle := krunfw.find(image)) is not None:
        return _kernel(krunfw.load(assembly, image, bundle, protocol))
    if protocol is not Protocol.AUTO:
        return _kernel(_load_linux(assembly, image, protocol))
    header = multiboot.find(image)
    if header is not None and header.addresses is not None:
        return multiboot.load(assembly, image, header)
    if image.head(4) == MAGIC:
        executable = pie.placed(parse(image), assembly.memory)
        if is_linux(executable):
            assembly.longest_cmdline = zeropage.LINUX_CMDLINE_MAX
        ip = pvh.entry_point(executable)
        if ip is not None:
            entry = pvh.load(assembly, executable, ip)
            return _kernel(entry) if is_linux(executable) else entry
        if header is not None:
            return multiboot.load(assembly, image, header)
        entry = elf.load(assembly, executable)
        return _kernel(entry) if is_linux(executable) else entry
    if bzimage.is_bzimage(image):
        return _kernel(_load_linux(assembly, image, Protocol.LINUX64))
    looks = describe(image.head(HEAD))
    raise image.error(
        f"looks like {looks}. Expected an ELF (PVH, multiboot or 64-bit), a multiboot image or a "
        f"bzImage, compressed or not"
    )


def _kernel(entry: Entry) -> Entry:
    return entry._replace(is_kernel=True)


def _load_linux(assembly: Assembly, image: Image, protocol: Protocol) -> Entry:
    """Load a vmlinux, or the vmlinux in a bzImage, so that it is entered by `protocol`."""
    if bzimage.is_bzimage(image):
        setup = bzimage.parse(image)
        if not setup.payload_size:
            return bzimage.load_as_it_is(assembly, image, setup, protocol)
        limit = assembly.memory.size + SLACK
        with bzimage.unpack(image, setup, limit) as vmlinux:
            return _load_vmlinux(assembly, vmlinux, protocol, setup.raw)
    if image.head(4) != MAGIC:
        looks = describe(image.head(HEAD))
        raise image.error(
            f"looks like {looks}. Expected a vmlinux or bzImage, because the protocol is "
            f"{protocol.value!r}"
        )
    return _load_vmlinux(assembly, image, protocol, None)


def _load_vmlinux(
    assembly: Assembly, image: Image, protocol: Protocol, header: bytes | None
) -> Entry:
    executable = pie.placed(parse(image), assembly.memory)
    assembly.longest_cmdline = zeropage.LINUX_CMDLINE_MAX
    if protocol is Protocol.LINUX64:
        return elf.load(assembly, executable, header)
    ip = pvh.entry_point(executable)
    if ip is None:
        raise image.error("has no PVH note, which the protocol 'pvh' needs")
    return pvh.load(assembly, executable, ip)
