"""From an image file to guest memory that is ready to run.

Here is what every architecture needs: opening and unpacking image files, ELF headers, the record
of which part of memory belongs to what, and the ways in which a guest can be entered. The formats
of an architecture's guests are with the architecture (`avmm.arch.x86_64.boot`), one small file
each. They are imported when a program starts its first guest, and not when it imports avmm.
"""

from avmm.boot.entry import Entry, FlatOptions, Mode, Protocol

__all__ = ["Entry", "FlatOptions", "Mode", "Protocol"]
