"""From an image file to guest memory that is ready to run: one small file a format.

`avmm.boot.formats.load` picks the format and loads. It is not imported here, so that a program
pays for the formats when it starts its first guest and not when it imports avmm.
"""

from avmm.boot.entry import Entry, FlatOptions, Mode, Protocol

__all__ = ["Entry", "FlatOptions", "Mode", "Protocol"]
