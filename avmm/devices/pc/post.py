"""Ports that only carry messages: POST codes at 0x80 and Bochs' debug console at 0xe9.

Both go to `logging`, from the vCPU's thread: they are for debugging, so their order among the
guest's other actions matters. The guest decides what it writes. So what is kept and logged is
bounded, and control characters are escaped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from avmm.devices.base import Device
from avmm.devices.state import DeviceState
from avmm.plain import U8, Bytes

_post_logger = logging.getLogger("avmm.post")
_console_logger = logging.getLogger("avmm.debugcon")

LINE_LIMIT: Final = 1024
"""The longest line of the debug console, in bytes; longer ones are cut into parts."""

_NEWLINE: Final = 0x0A


class PostCode(Device):
    """The port at which firmware reports its progress. Linux writes to it to pass a
    microsecond."""

    class State(DeviceState, version=1):
        code = U8

    max_width: ClassVar[int] = 1

    def __init__(self) -> None:
        self.code = 0
        """The code written last."""

    def read(self, offset: int, size: int) -> int:
        """The code written last, because the port is a latch (on a PC, an unused page register of
        the DMA controller)."""
        return self.code

    def write(self, offset: int, size: int, value: int) -> None:
        # Repeats are delays, not progress: Linux's io_delay writes the same code again and again.
        if value != self.code:
            self.code = value
            _post_logger.debug("POST code %#04x", value)

    def save(self) -> Mapping[str, Any]:
        return self.State.plain(code=self.code)

    def load(self, state: Mapping[str, Any]) -> None:
        self.code = self.State.load(self.name, state).code


class DebugConsole(Device):
    """Bochs' and QEMU's debugcon: bytes written become lines of the logger `avmm.debugcon`.

    It reads as 0xe9; guests recognise it by that (Bochs, iodev/unmapped.cc).
    """

    class State(DeviceState, version=1):
        line = Bytes(most=LINE_LIMIT - 1)

    max_width: ClassVar[int] = 1

    def __init__(self) -> None:
        self._line = bytearray()

    def read(self, offset: int, size: int) -> int:
        return 0xE9

    def write(self, offset: int, size: int, value: int) -> None:
        if value == _NEWLINE:
            self._log()
        else:
            self._line.append(value)
            if len(self._line) >= LINE_LIMIT:
                self._log()

    def finish(self) -> None:
        """The guest has ended: log the line that it began, if any."""
        if self._line:
            self._log()

    def _log(self) -> None:
        text = self._line.rstrip(b"\r").decode("utf-8", "backslashreplace")
        self._line.clear()
        if not text.isprintable():
            text = "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)
        _console_logger.info("%s", text)

    def save(self) -> Mapping[str, Any]:
        return self.State.plain(line=bytes(self._line))

    def load(self, state: Mapping[str, Any]) -> None:
        self._line = bytearray(self.State.load(self.name, state).line)
