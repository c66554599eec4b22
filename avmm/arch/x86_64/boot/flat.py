"""A flat binary: bytes that go to one address and are entered there, as the user says.

Nothing in such a file says what it is, so it is never guessed: `load` takes a file for flat
only where `FlatOptions` are given. It is then loaded as it is, not even decompressed.
"""

from __future__ import annotations

from avmm.arch.x86_64.boot import longmode
from avmm.arch.x86_64.boot.assembly import Assembly
from avmm.arch.x86_64.layout import HOLE_END
from avmm.boot.entry import Entry, FlatOptions, Mode
from avmm.boot.image import Image
from avmm.errors import ConfigError

_REACH = {Mode.REAL: 0x10_0000, Mode.PROTECTED: HOLE_END, Mode.LONG: HOLE_END}
"""Below which address each mode can be entered: CS holds 16 bits and `Entry` has CS:IP split
at a 64 KiB boundary; the page tables for long mode map 4 GiB."""


def load(assembly: Assembly, image: Image, options: FlatOptions) -> Entry:
    """Load the whole file at the address and enter it there.

    In long mode the guest finds what `longmode` promises. In the other modes it finds nothing
    but itself, so a command line, initrd or modules are refused (`ConfigError`).
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
            f"mode; expected none, or long mode"
        )
    if options.mode is Mode.LONG:
        longmode.claim(assembly)
    assembly.claims.claim(options.address, image.size, image.name)
    assembly.load(image, 0, image.size, options.address)
    if options.mode is Mode.LONG:
        return longmode.enter(assembly, options.address)
    return Entry(options.mode, options.address)
