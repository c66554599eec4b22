"""Small guests written in the tests themselves: assembly in, a flat binary out."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path


@cache
def assemble(source: str, bits: int = 64, origin: int = 0) -> bytes:
    """Machine code of Intel-syntax `source` for 16, 32 or 64-bit mode, linked at `origin`."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "code.s")
        text.write_text(f".intel_syntax noprefix\n.code{bits}\n.globl _start\n_start:\n{source}\n")
        linked, flat = Path(folder, "code.elf"), Path(folder, "code.bin")
        steps = (
            ["as", "--64", "-o", f"{folder}/code.o", str(text)],
            ["ld", f"-Ttext={origin:#x}", "-o", str(linked), f"{folder}/code.o"],
            ["objcopy", "-O", "binary", "-j", ".text", str(linked), str(flat)],
        )
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                raise AssertionError(f"{step[0]}: {done.stderr}\n{source}")
        return flat.read_bytes()
