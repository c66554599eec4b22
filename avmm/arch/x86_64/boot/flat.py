"""A flat binary: bytes that are loaded at one address and entered there. The user names the
address.

Nothing in such a file says what it is, so avmm does not guess: a file is only taken as a flat
binary if `FlatOptions` are given. It is then loaded as it is, and not even decompressed.
"""

from __future__ import annotations

from avmm.arch.x86_64.boot import longmode
from avmm.arch.x86_64.boot.assembly import Assembly
from avmm.arch.x86_64.layout import HOLE_END
from avmm.boot.entry import Entry, FlatOptions, Mode
from avmm.boot.image import Image
from avmm.errors import ConfigError

_REACH = {Mode.REAL: 0x10_0000, Mode.PROTECTED: HOLE_END, Mode.LONG: HOLE_END}
"""The address below which each mode can be entered. In real mode CS has 16 bits, and `Entry`
splits CS:IP at a 64 KiB boundary. In long mode the page tables map 4 GiB.
"""


def load(assembly: Assembly, image: Image, options: FlatOptions) -> Entry:
    """Load the whole file at the address and enter it there.

    In long mode the guest finds what `longmode` promises. In the other modes the guest finds
    nothing but itself, so a command line, an initrd or modules are refused (`ConfigError`).
    """
    reach = _REACH[options.mode]
    if not 0 <= options.address < reach:
        raise ConfigError(
            f"{image.name}: cannot be entered at {options.address:#x} in {options.mode.value} "
            f"mode; expected an address below {reach:#x}"
        )
    if options.mode is not Mode.LONG and (assembly.cmdline or assembly.files):
        given = "a command line" if assembly.cmdline else "an initrd or modules"
        raise ConfigError(
            f"{image.name}: {given} cannot be passed to a flat binary in {options.mode.value} "
            "mode; expected none of these, or long mode"
        )
    if options.mode is Mode.LONG:
        longmode.claim(assembly)
    assembly.claims.claim(options.address, image.size, image.name)
    assembly.load(image, 0, image.size, options.address)
    if options.mode is Mode.LONG:
        return longmode.enter(assembly, options.address)
    return Entry(options.mode, options.address)
