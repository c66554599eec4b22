"""The frames that go over the line, each with its length, number and checksum.

    kind u8 · zero u8 · zero u16 · length u32 · number u64 · checksum u64 · payload

Little endian. Numbers count from 0 in each direction, so a frame that is lost, doubled or out of
order is noticed. The checksum (XXH3, 64 bits) covers everything before it and the payload. It
reveals damage, not malice: whoever can write to the line is trusted, so use TLS.

A reader compares a frame's length with the limit for its kind before it allocates anything for it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

import xxhash

from avmm.errors import ProtocolError
from avmm.memory.pages import PAGE, RUN_BYTES

Buffer: TypeAlias = bytes | bytearray | memoryview

_HEAD: Final = struct.Struct("<BBHIQ")
_SUM_BYTES: Final = 8
HEADER_BYTES: Final = _HEAD.size + _SUM_BYTES
MOST_DATA_PAGES: Final = 256
MOST_RUNS: Final = 4096
STATE_PIECE: Final = 1 << 20
_FIRST_ROOM: Final = 1 << 16
"""The first size of a reader's buffer, in bytes. The buffer grows with the bytes that have come,
not with the length that a frame claims."""


class MessageKind(IntEnum):
    """What a frame is; docs/migration.md says when it may come."""

    HELLO = 1
    OFFER = 2
    ACCEPT = 3
    ABORT = 4
    PAGES = 5
    ROUND = 6
    STATE = 7
    STATE_END = 8
    READY = 9
    COMMIT = 10
    RUNNING = 11


MOST: Final[Mapping[MessageKind, int]] = {
    MessageKind.HELLO: 4096,
    MessageKind.OFFER: 64 << 20,  # read-only regions are in it
    MessageKind.ACCEPT: 0,
    MessageKind.ABORT: 64 << 10,
    MessageKind.PAGES: 4 + MOST_RUNS * RUN_BYTES + MOST_DATA_PAGES * PAGE,
    MessageKind.ROUND: 64,
    MessageKind.STATE: STATE_PIECE,
    MessageKind.STATE_END: 64,
    MessageKind.READY: 0,
    MessageKind.COMMIT: 64,
    MessageKind.RUNNING: 0,
}
"""The most bytes of payload, for each kind."""


@dataclass(frozen=True, slots=True)
class Message:
    """The contents of one complete frame."""

    kind: MessageKind
    payload: memoryview


def begins_as_hello(data: bytes) -> bool | None:
    """Do the first bytes of a line begin a HELLO, which is how a source begins? None if more bytes
    are needed to tell."""
    head = data[: _HEAD.size]
    if not _HEAD.pack(MessageKind.HELLO, 0, 0, 0, 0)[:4].startswith(head[:4]):
        return False
    if len(head) < _HEAD.size:
        return None
    _, _, _, length, number = _HEAD.unpack(head)
    return bool(number == 0 and length <= MOST[MessageKind.HELLO])


class Encoder:
    """Makes the frames of one direction."""

    def __init__(self) -> None:
        self._number = 0

    def frame(self, kind: MessageKind, *payload: Buffer) -> list[Buffer]:
        """The buffers of the next frame, to be sent in this order; `payload` is not copied."""
        length = sum(map(len, payload))
        if length > MOST[kind]:
            raise ProtocolError(f"{kind.name} has {length} bytes, expected at most {MOST[kind]}")
        head = _HEAD.pack(kind, 0, 0, length, self._number)
        self._number += 1
        return [head + _checksum(head, payload), *payload]


class Decoder:
    """Takes the bytes of one direction, in pieces of any size, and returns frames.

    The bytes are kept in one buffer, which is used again and again. Frames are views of it. The
    buffer is a mapping, because the kernel gives a mapping its pages one by one, as bytes come. A
    `bytearray` writes to all of them when it is made, which takes milliseconds.
    """

    def __init__(self) -> None:
        self._number = 0
        self._data = mmap.mmap(-1, _FIRST_ROOM)
        self._start = self._end = 0

    def feed(self, data: Buffer) -> None:
        """Take the next bytes. They are kept only until `next` has returned their frame."""
        there, wanted = self._end - self._start, self._end - self._start + len(data)
        if self._start + wanted > len(self._data):
            if 2 * wanted > len(self._data):  # or it would be moved again and again
                rest = memoryview(self._data)[self._start : self._end]
                self._data = mmap.mmap(-1, 4 * wanted)
                self._data[:there] = rest
            else:
                self._data.move(0, self._start, there)
            self._start, self._end = 0, there
        self._data[self._end : self._end + len(data)] = data
        self._end += len(data)

    @property
    def is_empty(self) -> bool:
        """Is there no incomplete frame in the buffer?"""
        return self._start == self._end

    @property
    def due(self) -> MessageKind | None:
        """The kind of the frame that `next` will return, or None if not all of it has come. Raises
        `ProtocolError` if the bytes that come cannot be a frame."""
        head = self._head()
        return None if head is None or not self._has(head[1]) else head[0]

    def next(self) -> Message | None:
        """The next frame, or None if not all of it has come. Its payload is valid until `feed`.

        Raises `ProtocolError` if the bytes are not a valid frame. Nothing can be read after that.
        """
        next_head = self._head()
        if next_head is None or not self._has(next_head[1]):
            return None
        kind, length = next_head
        whole = memoryview(self._data)[self._start : self._start + HEADER_BYTES + length]
        head, payload = whole[: _HEAD.size], whole[HEADER_BYTES:].toreadonly()
        if whole[_HEAD.size : HEADER_BYTES] != _checksum(head, [payload]):
            raise ProtocolError(
                f"frame {self._number} ({kind.name}) is damaged: its checksum is wrong"
            )
        self._start += HEADER_BYTES + length
        self._number += 1
        return Message(kind, payload)

    def _has(self, length: int) -> bool:
        return self._end - self._start >= HEADER_BYTES + length

    def _head(self) -> tuple[MessageKind, int] | None:
        """The kind of the next frame and the length of its payload in bytes. None if not all of
        its head has come."""
        if self._end - self._start < HEADER_BYTES:
            return None
        number_kind, zero, zeros, length, number = _HEAD.unpack_from(self._data, self._start)
        try:
            kind = MessageKind(number_kind)
        except ValueError:
            raise ProtocolError(
                f"frame {self._number} has an unknown kind: {number_kind}"
            ) from None
        if zero or zeros or length > MOST[kind]:
            raise ProtocolError(
                f"frame {self._number} ({kind.name}) has {length} bytes, expected at most "
                f"{MOST[kind]}"
            )
        if number != self._number:
            raise ProtocolError(
                f"frame {number} ({kind.name}) came, expected number {self._number}"
            )
        return kind, int(length)


def _checksum(head: Buffer, payload: Sequence[Buffer]) -> bytes:
    state = xxhash.xxh3_64(head)
    for part in payload:
        state.update(part)
    return state.intdigest().to_bytes(_SUM_BYTES, "little")
