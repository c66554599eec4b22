"""The terminal in raw mode, and its escape key Ctrl-A."""

from __future__ import annotations

import atexit
import logging
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final

ESCAPE: Final = 0x01
"""Ctrl-A, as in QEMU and screen."""

HELP: Final = (
    "\r\nCtrl-A h   this help"
    "\r\nCtrl-A x   end the guest"
    "\r\nCtrl-A p   pause the guest, or let it run on"
    "\r\nCtrl-A a   send Ctrl-A to the guest (Ctrl-A Ctrl-A does, too)\r\n"
)


class Command(Enum):
    """What a key after the escape asks for."""

    HELP = ord("h")
    QUIT = ord("x")
    PAUSE = ord("p")


class Escape:
    """Splits what is typed into input for the guest and commands for avmm."""

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, typed: bytes) -> Iterator[bytes | Command]:
        """Bytes for the guest and commands, in the order in which they were typed."""
        plain = bytearray()
        for byte in typed:
            if not self._escaped:
                self._escaped = byte == ESCAPE
                if not self._escaped:
                    plain.append(byte)
                continue
            self._escaped = False
            if byte in (ESCAPE, ord("a")):
                plain.append(ESCAPE)
                continue
            if plain:
                yield bytes(plain)
                plain.clear()
            try:
                yield Command(byte)
            except ValueError:
                yield Command.HELP
        if plain:
            yield bytes(plain)


@contextmanager
def raw(fd: int) -> Iterator[None]:
    """Put the terminal into raw mode inside the block, and restore it afterwards, whatever
    happens.
    """
    before = termios.tcgetattr(fd)

    def restore() -> None:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)

    # If the interpreter ends without unwinding, this still runs (except after os._exit).
    atexit.register(restore)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        with _messages_with_carriage_return():
            yield
    finally:
        restore()
        atexit.unregister(restore)


@contextmanager
def _messages_with_carriage_return() -> Iterator[None]:
    """A raw terminal does not return to the first column at the end of a line. So end avmm's
    messages with a carriage return, too.
    """
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    ]
    for handler in handlers:
        handler.terminator = "\r\n"
    try:
        yield
    finally:
        for handler in handlers:
            handler.terminator = "\n"
