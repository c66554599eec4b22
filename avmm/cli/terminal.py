"""The terminal in raw mode, and its escape key Ctrl-A."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Final, TextIO

import trio

ESCAPE: Final = 0x01
"""Ctrl-A, as in QEMU and screen."""

HELP: Final = (
    "\r\nCtrl-A h   this help"
    "\r\nCtrl-A x   end the guest"
    "\r\nCtrl-A p   pause the guest, or let it run on"
    "\r\nCtrl-A z   suspend avmm, until the shell's fg"
    "\r\nCtrl-A a   send Ctrl-A to the guest (Ctrl-A Ctrl-A does, too)\r\n"
)


class Command(Enum):
    """What a key after the escape asks for."""

    HELP = ord("h")
    QUIT = ord("x")
    PAUSE = ord("p")
    SUSPEND = ord("z")


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


class Raw:
    """A terminal in raw mode. Made by `raw`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before = termios.tcgetattr(fd)

    def enter(self) -> None:
        """Put it into raw mode."""
        tty.setraw(self._fd, termios.TCSADRAIN)

    def restore(self) -> None:
        """Put it back as it was found."""
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def suspend(self) -> None:
        """Stop this process, as Ctrl-Z does in a shell, with the terminal put back meanwhile.
        Returns when the process continues."""
        self.restore()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._enter_in_front()

    async def follow(self) -> None:
        """Until cancelled: put the terminal back before this process is stopped (SIGTSTP), and
        into raw mode again when it continues, however it was stopped. Meanwhile the shell has the
        terminal in its own mode."""
        handled = [
            number
            for number in (signal.SIGTSTP, signal.SIGCONT)
            if signal.getsignal(number) is not signal.SIG_IGN
        ]
        if not handled:
            return
        with trio.open_signal_receiver(*handled) as signals:
            async for number in signals:
                if number == signal.SIGTSTP:
                    self.suspend()
                else:
                    self._enter_in_front()

    def _enter_in_front(self) -> None:
        """Enter raw mode, unless the shell continues this process in the background."""
        with suppress(OSError):
            if os.tcgetpgrp(self._fd) == os.getpgrp():
                self.enter()


@contextmanager
def raw(fd: int) -> Iterator[Raw]:
    """Put the terminal into raw mode inside the block, and restore it afterwards, whatever
    happens.
    """
    terminal = Raw(fd)
    # If the interpreter ends without unwinding, this still runs (except after os._exit).
    atexit.register(terminal.restore)
    try:
        terminal.enter()
        with _messages_with_carriage_return():
            yield terminal
    finally:
        terminal.restore()
        atexit.unregister(terminal.restore)


@contextmanager
def _messages_with_carriage_return() -> Iterator[None]:
    """A raw terminal does not return to the first column at the end of a line. So end avmm's
    messages with a carriage return, too.
    """
    handlers = _on_standard_error()
    for handler in handlers:
        handler.terminator = "\r\n"
    try:
        yield
    finally:
        for handler in handlers:
            handler.terminator = "\n"


@contextmanager
def log_lines_to(take: Callable[[str], None]) -> Iterator[None]:
    """Give `take` each line that would be logged on standard error inside the block, if that is a
    terminal. `take` is called in trio's thread, in order; for a line that a thread logs as the
    block ends, soon afterwards."""
    replaced = _on_standard_error()
    if not replaced or not sys.stderr.isatty():
        yield
        return
    handler = _Lines(trio.lowlevel.current_trio_token(), take)
    handler.setFormatter(replaced[0].formatter)
    root = logging.getLogger()
    for one in replaced:
        root.removeHandler(one)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for one in replaced:
            root.addHandler(one)


class _Lines(QueueHandler):
    """Takes lines from any thread to trio's."""

    def __init__(self, token: trio.lowlevel.TrioToken, take: Callable[[str], None]) -> None:
        super().__init__(SimpleQueue())  # which `enqueue` does not use
        self._token = token
        self._take = take

    def enqueue(self, record: logging.LogRecord) -> None:
        self._token.run_sync_soon(self._take, record.getMessage())


def _on_standard_error() -> list[logging.StreamHandler[TextIO]]:
    return [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    ]
