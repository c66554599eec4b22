"""A guest by the multiboot 1 specification, as others write them, from the command."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("kvm")

# Entered flat in 32-bit mode with EBX = info. Prints its first module (an environment) and its
# command line on the serial port; starts all other CPUs by INIT/SIPI, waits until as many as the
# module's digit says have counted themselves, and ends through the debug exit with that number.
SOURCE = r"""
.intel_syntax noprefix
.section .multiboot, "a"
header: .long 0x1badb002, 3, -(0x1badb002 + 3)

.text
.code32
.globl _start
_start:
    cmp eax, 0x2badb002
    jne fail
    mov esp, 0x90000
    test dword ptr [ebx], 1 << 2 | 1 << 3 | 1 << 6
    jz fail
    mov esi, [ebx + 16]                 # command line
    call print
    cmp dword ptr [ebx + 20], 1         # one module
    jne fail
    mov edx, [ebx + 24]
    mov esi, [edx]
    mov edi, [edx + 4]
    sub edi, esi                        # its length: "CPUS=n\n"
    cmp edi, 7
    jne fail
    movzx ebp, byte ptr [esi + 5]
    sub ebp, '0'
    mov byte ptr [esi + 6], 0
    call print

    mov esi, offset ap
    mov edi, 0x8000
    mov ecx, offset ap_end - ap
    rep movsb
    mov dword ptr ds:0x7000, 1          # this CPU has counted itself
    mov eax, 0xfee00000
    mov dword ptr [eax + 0xf0], 0x1ff
    mov dword ptr [eax + 0x300], 0xc4500
    mov dword ptr [eax + 0x300], 0xc4608
1:  pause
    cmp ds:0x7000, ebp
    jne 1b
    mov eax, ebp
    out 0xf4, al
fail:
    mov al, 0x3f
    out 0xf4, al
    hlt

print:
    mov dx, 0x3fd
1:  in al, dx
    test al, 0x20
    jz 1b
    mov dx, 0x3f8
    lodsb
    out dx, al
    test al, al
    jnz print
    ret

.code16
ap: mov ax, 0x700
    mov ds, ax
    lock inc dword ptr ds:0
1:  hlt
    jmp 1b
ap_end:
"""


@pytest.fixture(scope="module")
def image() -> bytes:
    """A 32-bit ELF, as a multiboot 1 kernel is."""
    with tempfile.TemporaryDirectory() as folder:
        source, linked = Path(folder, "guest.S"), Path(folder, "guest.elf")
        source.write_text(SOURCE)
        (script := Path(folder, "guest.ld")).write_text(
            "ENTRY(_start) SECTIONS { . = 0x100000; .text : { *(.multiboot) *(.text) } }"
        )
        flags = ["-m32", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-n"]
        command = ["gcc", *flags, "-T", str(script), "-o", str(linked), str(source)]
        subprocess.run(command, check=True)
        return linked.read_bytes()


@pytest.mark.parametrize("cpus", [1, 2, 3, 4])
def test_a_multiboot_guest_with_its_environment_and_cpus(
    image: bytes, cpus: int, tmp_path: Path
) -> None:
    (tmp_path / "guest.elf").write_bytes(image)
    (tmp_path / "environment").write_text(f"CPUS={cpus}\n")
    command = [sys.executable, "-m", "avmm", "run", str(tmp_path / "guest.elf")]
    more = ["--initrd", str(tmp_path / "environment"), "--cpus", str(cpus), "--cmdline", "a b"]
    done = subprocess.run([*command, *more], capture_output=True, timeout=30, check=False)
    assert done.returncode == cpus << 1 | 1, done.stderr.decode()
    path, cpus_line, _ = done.stdout.split(b"\0")
    assert path.endswith(b"guest.elf a b")
    assert cpus_line == b"CPUS=%d" % cpus
