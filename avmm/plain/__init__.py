"""Plain data, of which states, descriptions and messages are made.

Plain data is numbers, bytes, text, lists, dicts with text as keys, true, false and None, and
nothing else. Plain data that are read may come from anybody, so they pass two gates: `decode`
makes them from bytes, within limits (`encoding`), and `Fields` checks what they hold (`fields`).
"""

from avmm.plain.encoding import decode, encode
from avmm.plain.fields import (
    ANYTHING,
    FLAG,
    MAPPING,
    U8,
    U16,
    U32,
    U64,
    Bytes,
    Fields,
    Float,
    Int,
    Kind,
    ListOf,
    MappingOf,
    Mismatch,
    Nested,
    OneOf,
    OrMissing,
    OrNone,
    Row,
    Text,
    shown,
)

__all__ = [
    "ANYTHING",
    "FLAG",
    "MAPPING",
    "U8",
    "U16",
    "U32",
    "U64",
    "Bytes",
    "Fields",
    "Float",
    "Int",
    "Kind",
    "ListOf",
    "MappingOf",
    "Mismatch",
    "Nested",
    "OneOf",
    "OrMissing",
    "OrNone",
    "Row",
    "Text",
    "decode",
    "encode",
    "shown",
]
