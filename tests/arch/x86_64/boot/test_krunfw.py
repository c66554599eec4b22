"""The kernel in a libkrunfw: found by its symbols, never by loading the object."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from avmm.arch.x86_64 import layout
from avmm.arch.x86_64.boot.load import load
from avmm.boot import Mode, Protocol
from avmm.errors import ImageError
from avmm.memory.ram import GuestMemory

Make = Callable[..., Path]
SOURCE = """
#include <stddef.h>
__attribute__((aligned(4096))) char KERNEL_BUNDLE[] = "{content}";
char *krunfw_get_kernel(size_t *load_addr, size_t *entry_addr, size_t *size)
{{
    *load_addr = {address};
    *entry_addr = {entry};
    *size = {size};
    return &KERNEL_BUNDLE[0];
}}
int krunfw_get_version() {{ return 5; }}
"""


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(
        *flags: str, address: str = "0x200000", entry: str = "0x200123", size: int = 0x1000,
        source: str = SOURCE,
    ) -> Path:  # fmt: skip
        text = source.format(content="K" * 0x1000, address=address, entry=entry, size=size)
        (tmp_path / "bundle.c").write_text(text)
        made = tmp_path / "libkrunfw.so.5"
        subprocess.run(
            ["gcc", "-fPIC", "-shared", *flags, "-o", made, tmp_path / "bundle.c"], check=True
        )
        return made

    return make


@pytest.mark.parametrize("flags", [["-O0"], ["-O2"], ["-Os", "-s"], ["-O2", "-mcmodel=large"]])
def test_the_kernel_is_found_and_entered(
    memory: GuestMemory, make: Make, flags: list[str]
) -> None:
    entry = load(memory, make(*flags), cmdline="quiet")
    assert (entry.mode, entry.ip) == (Mode.LONG, 0x200123)
    assert entry.registers["rsi"] == layout.ZERO_PAGE
    assert memory.read(0x200000, 0x1001) == b"K" * 0x1000 + b"\0"


def test_it_gets_what_such_a_kernel_needs(
    memory: GuestMemory, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no ACPI and no serial port."""
    devices = ["virtio_mmio.device=0x200@0xd0000000:5"]
    load(memory, make("-O2"), cmdline="quiet -- x", devices=devices, acpi=[])
    assert memory.read(layout.CMDLINE, 50).startswith(b"quiet " + devices[0].encode() + b" -- x\0")
    assert "this kernel has no serial console" in caplog.text
    caplog.clear()
    load(memory, make("-O2"), cmdline="console=hvc0")
    assert not caplog.text


def test_a_protocol_may_be_given_if_it_is_the_one_that_it_has(
    memory: GuestMemory, make: Make
) -> None:
    assert load(memory, make("-O2"), protocol=Protocol.LINUX64).ip == 0x200123
    with pytest.raises(ImageError, match="is a libkrunfw, which is entered by Linux's 64-bit"):
        load(memory, make("-O2"), protocol=Protocol.PVH)


def test_modules_stay_clear_of_what_follows_it(make: Make, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"i" * 100)
    memory = GuestMemory("64M")
    load(memory, make("-O2"), initrd=initrd)
    assert memory.read((64 << 20) - 4096, 100) == b"i" * 100
    memory.close()
    small = GuestMemory("4M")
    load(small, make("-O2"), initrd=initrd)
    assert small.read(0x1FF000, 100) == b"i" * 100, "below it, where nothing else is left"
    small.close()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"entry": "0x300000"}, "entered at 0x300000, in 4097 bytes of data"),
        ({"size": 0x2000}, "describes a kernel of 8192 bytes"),
        ({"size": 0}, "describes a kernel of 0 bytes"),
        ({"address": "*size"}, "does not store three constants"),
        ({"source": "char KERNEL_BUNDLE[] = {{1}};"}, "but not krunfw_get_kernel"),
        ({"address": "0x95000", "entry": "0x95000"}, "overlaps avmm's"),
        ({"source": "int other() {{ return 1; }}"}, "is a shared library"),
    ],
)
def test_what_is_wrong_is_said(
    memory: GuestMemory, make: Make, fields: dict[str, str], text: str
) -> None:
    image = make("-O2", **fields)
    with pytest.raises(ImageError, match=text) as caught:
        load(memory, image)
    assert str(caught.value).startswith(f"{image}: ")


def test_an_object_that_is_cut_off_is_refused_at_any_place(
    memory: GuestMemory, make: Make, tmp_path: Path
) -> None:
    whole = make("-O2").read_bytes()
    path = tmp_path / "cut"
    for size in range(4, len(whole), 331):
        path.write_bytes(whole[:size])
        with pytest.raises(ImageError):
            load(memory, path)
