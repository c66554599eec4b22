"""From an image file to guest memory that is ready to run.

What every architecture needs is here: opening and unpacking image files, ELF headers, the book of
who lies where in memory, and the words for how a guest is entered. The formats of one
architecture's guests are in the folder of its name, one small file each; they are imported when a
program starts its first guest, and not when it imports avmm.
"""

from avmm.boot.entry import Entry, FlatOptions, Mode, Protocol

__all__ = ["Entry", "FlatOptions", "Mode", "Protocol"]
