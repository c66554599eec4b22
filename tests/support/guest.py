"""Machines for tests: a few instructions in, a Machine out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import avmm
from support.assembler import assemble

ORIGIN = 0x10_0000
EXIT = "mov dx, 0xf8; mov eax, {}; out dx, eax; hlt"
"""Ends the run with a status: `EXIT.format(3)`; the status may be a register, too."""


def machine(folder: Path, source: str, *, mode: str = "long", **settings: Any) -> avmm.Machine:
    """A machine that runs `source` from `ORIGIN` on (real mode: from 0x8000 on)."""
    bits, origin = {"long": (64, ORIGIN), "protected": (32, ORIGIN), "real": (16, 0x8000)}[mode]
    image = folder / "guest.bin"
    image.write_bytes(assemble(source, bits, origin))
    settings.setdefault("memory", "4M")
    return avmm.Machine(kernel=image, flat=f"{mode}@{origin:#x}", **settings)
