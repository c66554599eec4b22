"""From an image file to guest memory that is ready to run.

What every architecture needs is here: opening and unpacking image files, ELF headers, the book of
who lies where in memory, and the words for how a guest is entered. The formats of an
architecture's guests are with the architecture (`avmm.arch.x86_64.boot`), one small file each.
They are imported when a program starts its first guest, and not when it imports avmm.
"""

from avmm.boot.entry import Entry, FlatOptions, Mode, Protocol

__all__ = ["Entry", "FlatOptions", "Mode", "Protocol"]
