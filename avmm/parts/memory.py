"""A machine's RAM, either empty or with what the guest had, and the read-only regions beside
it.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from avmm.config import MachineConfig
from avmm.errors import ImageError, StateError
from avmm.memory.layout import RamLayout
from avmm.memory.ram import GuestMemory

if TYPE_CHECKING:
    from avmm.parts.builder import Origin


def open_memory(
    stack: ExitStack, layout: RamLayout, config: MachineConfig, origin: Origin
) -> GuestMemory:
    """RAM before anything is loaded into it. Blocks, because it reads the files of `roms`.

    Raises `StateError` if the guest's RAM and the config have different sizes, `ConfigError` if
    the host cannot provide the RAM, and `ImageError` if a ROM cannot be read.
    """
    if origin.open_memory is None:
        memory = GuestMemory(config.memory, layout=layout)
    else:
        memory = origin.open_memory(layout)
    stack.callback(memory.close)
    if memory.size != config.memory:
        raise StateError(
            f"the guest has {config.memory} bytes of RAM, but {memory.size} bytes are here"
        )
    if origin.described is not None:
        roms = list(origin.described.roms)
    else:
        roms = [(gpa, _read_rom(path, memory.size)) for gpa, path in config.roms]
    for gpa, data in roms:
        memory.add_readonly(gpa, data)
    return memory


def _read_rom(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from None
    if not data or len(data) > most:
        raise ImageError(f"{path}: expected a ROM of 1 to {most} bytes")
    return data
