"""A PS/2 keyboard that can press one thing: Ctrl-Alt-Del.

It answers what drivers ask before they believe in a keyboard (Linux's
drivers/input/keyboard/atkbd.c; IBM PS/2 Hardware Interface Technical Reference, "Keyboard"). It
speaks scan code set 2, which the controller translates for guests that ask it to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

_ACK, _RESEND, _TEST_PASSED, _ECHO = 0xFA, 0xFE, 0xAA, 0xEE
_IDENTITY: Final = (0xAB, 0x83)
_SET: Final = 2
_SET_LEDS, _CODE_SET, _SET_RATE = 0xED, 0xF0, 0xF3
TAKE_A_BYTE: Final = frozenset({_SET_LEDS, _CODE_SET, _SET_RATE})
"""The commands that are followed by a byte."""
_ENABLE, _DISABLE, _DEFAULTS, _IDENTIFY, _RESET = 0xF4, 0xF5, 0xF6, 0xF2, 0xFF

_CTRL, _ALT, _DEL, _EXTENDED, _RELEASED = 0x14, 0x11, 0x71, 0xE0, 0xF0
CTRL_ALT_DEL: Final = (
    *(_CTRL, _ALT, _EXTENDED, _DEL),
    *(_EXTENDED, _RELEASED, _DEL, _RELEASED, _ALT, _RELEASED, _CTRL),
)
_TRANSLATED: Final[Mapping[int, int]] = {_CTRL: 0x1D, _ALT: 0x38, _DEL: 0x53, 0x83: 0x41}
"""Scan code set 2 to set 1, for all bytes of this keyboard that differ."""
_RELEASED_BIT: Final = 0x80
MOST_BYTES: Final = 2 * len(CTRL_ALT_DEL)
"""The most bytes that wait for the controller."""


class Keyboard:
    """The keyboard. Its state is `waiting`, `is_scanning` and `pending`."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        """Bytes for the controller."""
        self.is_scanning = False
        """Does it tell of keys?"""
        self.pending = 0
        """The command that waits for its byte, or 0."""

    def take(self, value: int) -> None:
        """A byte from the guest."""
        self.waiting.clear()  # a command interrupts everything else
        command, self.pending = self.pending, 0
        if command:
            self.waiting += [_ACK, _SET] if (command, value) == (_CODE_SET, 0) else [_ACK]
        else:
            self.waiting += self._command(value)

    def _command(self, command: int) -> Sequence[int]:
        if command in TAKE_A_BYTE:
            self.pending = command
        elif command == _IDENTIFY:
            return (_ACK, *_IDENTITY)
        elif command == _RESET:
            self.is_scanning = False
            return (_ACK, _TEST_PASSED)
        elif command == _ECHO:
            return (_ECHO,)
        elif command in (_ENABLE, _DISABLE, _DEFAULTS):
            self.is_scanning = command != _DISABLE
        else:
            return (_RESEND,)
        return (_ACK,)

    def press_ctrl_alt_del(self) -> None:
        """Press and release the three keys, unless they wait to be read already."""
        if self.is_scanning and len(self.waiting) + len(CTRL_ALT_DEL) <= MOST_BYTES:
            self.waiting += CTRL_ALT_DEL

    def next(self, *, translated: bool) -> int | None:
        """The next byte for the guest. None if there is none."""
        if not self.waiting:
            return None
        value = self.waiting.pop(0)
        if not translated:
            return value
        if value == _RELEASED and self.waiting:
            released = self.waiting.pop(0)
            return _TRANSLATED.get(released, released) | _RELEASED_BIT
        return _TRANSLATED.get(value, value)
