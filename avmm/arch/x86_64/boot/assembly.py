"""Puts one guest together in memory: everything that a boot format needs besides its image.

The order is the same in all formats. First avmm claims what it needs at fixed addresses, so that
an error names the image if the image is in the way. Then the image claims its ranges and is
copied. Then the modules get the room that is left. After that the memory map is final, and is
written for the guest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from avmm.arch.x86_64 import acpi, generation, layout, mptable
from avmm.arch.x86_64.acpi import AcpiDevice
from avmm.boot.claims import Claims, Rules
from avmm.boot.cmdline import inserted
from avmm.boot.image import Image, open_image
from avmm.errors import ConfigError, ImageError
from avmm.memory.ram import GuestMemory
from avmm.options import meant_by

_RESET_CODE: Final = bytes.fromhex("b0fe e664 f4 ebfd")
"""`mov al, 0xfe; out 0x64, al; 1: hlt; jmp 1b`. It means the same in every mode."""


PC: Final = Rules(
    reserved=(
        (layout.EBDA, layout.EBDA_END),
        (layout.BIOS, layout.BIOS_END),
        (layout.KVM_IDENTITY_MAP, layout.KVM_PAGES_END),
    ),
    # This range is backed by RAM too. But on a PC it is not RAM, and some guests rely on that.
    never_ram=(layout.BASE_MEMORY_END, layout.HIMEM),
    lowest=layout.HIMEM,
    limit=layout.INITRD_LIMIT,
)


@dataclass(frozen=True, slots=True)
class Module:
    """A file that lies in guest memory as it is: an initrd, or a multiboot module."""

    gpa: int
    size: int
    name: str

    @property
    def end(self) -> int:
        return self.gpa + self.size


@dataclass(slots=True)
class Assembly:
    """The guest's memory, the record of who claims which range, and what the guest will be
    told.
    """

    memory: GuestMemory
    name: str
    """The image's path as the user gave it."""
    cmdline: str = ""
    files: Sequence[str] = ()
    """The initrd, if any, and the modules: paths, in the order the guest sees them."""
    devices: Sequence[str] = ()
    """Kernel parameters that name the virtio devices, for a guest that does not read ACPI."""
    rsdp: int = 0
    """The address of ACPI's tables; 0 if there are none."""
    longest_cmdline: int = layout.CMDLINE_MAX
    """How many bytes of command line the guest takes. Linux cuts off the rest in silence."""
    claims: Claims = field(init=False)

    def __post_init__(self) -> None:
        self.claims = Claims(self.memory.ram, PC)

    def name_devices(self) -> None:
        """Name the devices on the command line. Does nothing the second time."""
        self.cmdline = inserted(self.cmdline, self.devices)
        self.devices = ()

    def load(self, image: Image, offset: int, size: int, gpa: int) -> None:
        """Copy a part of a file to `gpa`, which must have been claimed.

        Guest memory behind it is not touched, because RAM is fresh and therefore zero.
        """
        if size:
            with self.memory.view(gpa, size) as view:
                image.read_into(offset, view)

    def load_modules(self, limit: int = layout.INITRD_LIMIT) -> list[Module]:
        """Find room for each file, at the top of RAM below `limit`, and copy it there."""
        modules = []
        for path in self.files:
            with open_image(path) as image:
                gpa = self.claims.place(image.size, image.name, limit=limit)
                self.load(image, 0, image.size, gpa)
                modules.append(Module(gpa, image.size, image.name))
        return modules

    def claim_own(self, gpa: int, size: int, what: str) -> None:
        """Claim a fixed range for one of avmm's own structures. The guest is told that the range
        is reserved.

        Raises `ImageError` if guest RAM is too small for what the image's format needs.
        """
        ram_end = self.memory.ram[0].end
        if gpa + size > ram_end:
            raise ImageError(
                f"{self.name}: guest RAM ends at {ram_end:#x}, before avmm's {what} at "
                f"{gpa:#x}-{gpa + size:#x}: expected at least 1 MiB for this image"
                f"{meant_by(self.memory.size)}"
            )
        self.claims.claim(gpa, size, f"avmm's {what}", reserved=True)

    def claim_boot_info(self) -> None:
        """Claim the ranges of the boot information, the zero page and the command line."""
        self.claim_own(layout.BOOT_INFO, layout.BOOT_INFO_SIZE, "boot information")
        self.claim_own(layout.ZERO_PAGE, layout.ZERO_PAGE_SIZE, "zero page")
        self.claim_own(layout.CMDLINE, layout.CMDLINE_SIZE, "command line")

    def write_cmdline(self, text: str) -> None:
        """Write the command line, with its NUL, to `layout.CMDLINE`.

        Raises `ConfigError` if it is longer than `longest_cmdline`, or contains a NUL, or cannot
        be encoded.
        """
        data = _encode_cmdline(text)
        if len(data) > self.longest_cmdline:
            raise ConfigError(
                f"command line {text[:40]!r}... is {len(data)} bytes with what avmm adds to it; "
                f"expected at most {self.longest_cmdline}, because {self.name} takes "
                "no more"
            )
        self.memory.write(layout.CMDLINE, data + b"\0")

    def write_mp_table(self, cpus: int, levels: Collection[int] = ()) -> None:
        """Claim room for the MP table in the BIOS area and write it. The interrupts `levels` are
        level-triggered.

        With a single CPU, the table is left out if RAM ends below that area. Raises `ConfigError`
        if a table cannot describe that many CPUs.
        """
        table = mptable.mp_table(cpus, levels=levels)
        if cpus == 1 and self.memory.ram[0].end < layout.BIOS_END:
            return
        self.claim_own(layout.MP_FLOATING_POINTER, len(table), "MP table")
        self.memory.write(layout.MP_FLOATING_POINTER, table)

    def write_reset_vector(self) -> None:
        """Write code where a PC's firmware begins. It resets the machine through the keyboard
        controller.

        Linux jumps there on hardware-reduced ACPI machines: it first tries EFI, which is missing
        here, and then the BIOS (arch/x86/kernel/reboot.c). The code is left out if RAM ends below
        that address.
        """
        if self.memory.ram[0].end >= layout.BIOS_END:
            self.claim_own(layout.RESET_VECTOR, len(_RESET_CODE), "reset vector")
            self.memory.write(layout.RESET_VECTOR, _RESET_CODE)

    def write_acpi(self, cpus: int, devices: Sequence[AcpiDevice]) -> None:
        """Claim room for ACPI's tables in the BIOS area and write them.

        The tables are left out if RAM ends below that area. Raises `ConfigError` if the tables for
        that many devices do not fit.
        """
        if self.memory.ram[0].end < layout.BIOS_END:
            return
        tables = acpi.tables(cpus, devices, layout.POWER_PORT, layout.ACPI)
        if len(tables) > layout.ACPI_SIZE:
            raise ConfigError(
                f"ACPI tables of {len(devices)} devices are {len(tables)} bytes: expected at "
                f"most {layout.ACPI_SIZE}, or acpi = false"
            )
        self.claim_own(layout.ACPI, len(tables), "ACPI tables")
        self.memory.write(layout.ACPI, tables)
        self.claim_own(layout.GENERATION, generation.SIZE, "generation id")
        generation.first(self.memory)
        self.rsdp = layout.ACPI


def _encode_cmdline(text: str) -> bytes:
    """The bytes of a command line without its NUL. Raises `ConfigError` if `text` cannot be a
    command line.
    """
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ConfigError(f"command line {text!r}: cannot be encoded: {error.reason}") from error
    if b"\0" in data:
        raise ConfigError(f"command line {text!r}: contains a NUL at byte {data.index(0)}")
    return data
