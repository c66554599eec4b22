"""A keyboard controller, for the reset line and for Ctrl-Alt-Del: ports 0x60 and 0x64.

PCs are reset through it (command 0xfe), and guests look for it early. A guest that waits for an
answer which never comes waits for long: Linux for half a second each time
(drivers/input/serio/i8042.c). So all commands to the controller itself are answered at once.
Behind it is a keyboard (`avmm.devices.pc.keyboard`) and no mouse: commands to a mouse are accepted
and never answered. Only the keyboard's bytes cause interrupts, because drivers poll for the answer
to a command.

Linux's probe goes like this. It reads the command byte twice and gets the same value. Its loopback
through the mouse port (0xd3) comes back, but is not marked as coming from the mouse, and its test
of the mouse port (0xa9) gives an error. So it concludes "no mouse port" without waiting. A Linux
that reads ACPI's tables does not look, because they do not tell of a controller.

Sources: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device
Controller"; QEMU's hw/input/pckbd.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from avmm.devices.base import Device, Host, InterruptLine
from avmm.devices.pc.keyboard import MOST_BYTES, TAKE_A_BYTE, Keyboard
from avmm.devices.state import DeviceState
from avmm.plain import FLAG, U8, Bytes, OneOf

DATA: Final = 0
"""Offset of port 0x60."""
COMMAND: Final = 4
"""Offset of port 0x64; reads give the status."""

# Status bits.
STATUS_OUTPUT_FULL: Final = 0x01
STATUS_SYSTEM: Final = 0x04  # the self-test was passed
STATUS_COMMAND: Final = 0x08  # the last write was to 0x64
STATUS_UNLOCKED: Final = 0x10

# Bits of the command byte.
MODE_KEYBOARD_INTERRUPT: Final = 0x01
MODE_TRANSLATED: Final = 0x40
MODE_KEYBOARD_OFF: Final = 0x10
MODE_MOUSE_OFF: Final = 0x20
_MODE_AT_START: Final = 0x65  # translation, mouse off, system flag, keyboard interrupt

# Bits of the output port.
OUT_NO_RESET: Final = 0x01
OUT_A20: Final = 0x02
_OUT_AT_START: Final = 0xCF  # QEMU's

# Commands; the rest is listed where it is served.
READ_MODE: Final = 0x20
WRITE_MODE: Final = 0x60
WRITE_OUT: Final = 0xD1
_TAKES_A_BYTE: Final = frozenset({WRITE_MODE, WRITE_OUT, 0xD2, 0xD3, 0xD4})

_ANSWERS: Final = {
    0xA9: 0x01,  # mouse port: its clock line is stuck low, there is nothing to test
    0xAA: 0x55,  # self-test passed
    0xAB: 0x00,  # keyboard port works
    0xC0: 0x80,  # input port: keyboard not locked
}
# Command -> the bits of the command byte that it sets and clears.
_MODES: Final = {
    0xA7: (MODE_MOUSE_OFF, 0),
    0xA8: (0, MODE_MOUSE_OFF),
    0xAD: (MODE_KEYBOARD_OFF, 0),
    0xAE: (0, MODE_KEYBOARD_OFF),
}


class I8042(Device):
    """The controller. `on_reset` is called, in the vCPU's thread, when the guest pulls the
    processor's reset line; everything continues until the machine acts on it.

    A20 is remembered and read back; it masks nothing, as on every processor since Haswell.
    """

    class State(DeviceState, version=2):
        mode = U8
        out = U8
        status = U8
        answer = U8
        pending = OneOf(0, *sorted(_TAKES_A_BYTE))
        keys = Bytes(most=MOST_BYTES)
        scanning = FLAG
        keyboard_pending = OneOf(0, *sorted(TAKE_A_BYTE))

    max_width: ClassVar[int] = 1

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._mode = _MODE_AT_START
        self._out = _OUT_AT_START
        self._status = STATUS_SYSTEM | STATUS_UNLOCKED
        self._answer = 0
        """The value that a read of 0x60 returns. A new answer replaces one that was not read, so
        that a driver which gave up on an answer does not take it for the next one."""
        self._pending = 0
        """The command that waits for its byte, or 0."""
        self._keyboard = Keyboard()
        self._line: InterruptLine | None = None

    def attach(self, host: Host) -> None:
        super().attach(host)
        self._line = host.interrupt

    @property
    def hears_keys(self) -> bool:
        """Has the guest set the controller and the keyboard up for interrupts by keys?"""
        interrupts = self._mode & (MODE_KEYBOARD_INTERRUPT | MODE_KEYBOARD_OFF)
        return self._keyboard.is_scanning and interrupts == MODE_KEYBOARD_INTERRUPT

    def press_ctrl_alt_del(self) -> None:
        """Press the three keys. Does nothing if the guest does not listen to the keyboard. Call it
        in trio."""
        with self.host.lock:
            self._keyboard.press_ctrl_alt_del()
            self._fill()

    def read(self, offset: int, size: int) -> int:
        if offset == COMMAND:
            return self._status
        if offset == DATA:
            self._status &= ~STATUS_OUTPUT_FULL
            answer = self._answer
            self._fill()
            return answer
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == COMMAND:
            self._status |= STATUS_COMMAND
            self._command(value)
        elif offset == DATA:
            self._status &= ~STATUS_COMMAND
            command, self._pending = self._pending, 0
            self._take(command, value)

    def _command(self, command: int) -> None:
        self._pending = command if command in _TAKES_A_BYTE else 0
        if command in _ANSWERS:
            self._say(_ANSWERS[command])
        elif command in _MODES:
            on, off = _MODES[command]
            self._mode = (self._mode | on) & ~off
            self._fill()
        elif command == READ_MODE:
            self._say(self._mode)
        elif command == 0xD0:
            self._say(self._out)
        elif command in (0xDD, 0xDF):  # A20 off, on
            self._write_out(self._out & ~OUT_A20 | (command & OUT_A20))
        elif command >= 0xF0 and not command & OUT_NO_RESET:  # pulse output port bits low
            self._on_reset()

    def _take(self, command: int, value: int) -> None:
        """A byte written to 0x60. It belongs to `command`; if that is 0, it is for the
        keyboard."""
        if not command:
            self._keyboard.take(value)
            self._fill()
        elif command == WRITE_MODE:
            self._mode = value
            self._fill()
        elif command == WRITE_OUT:
            self._write_out(value)
        elif command in (0xD2, 0xD3):  # as if it came from the keyboard, from the mouse
            self._say(value)

    def _write_out(self, value: int) -> None:
        # The reset line does not stay low, because the reset that it causes sets it high again.
        self._out = value | OUT_NO_RESET
        if not value & OUT_NO_RESET:
            self._on_reset()

    def _fill(self) -> None:
        """Take the keyboard's next byte, if the guest has read what was there before."""
        if self._status & STATUS_OUTPUT_FULL or self._mode & MODE_KEYBOARD_OFF:
            return
        value = self._keyboard.next(translated=bool(self._mode & MODE_TRANSLATED))
        if value is not None:
            self._say(value)
            self._interrupt()

    def _interrupt(self) -> None:
        if self._mode & MODE_KEYBOARD_INTERRUPT and self._line is not None:
            self._line.pulse()

    def _say(self, value: int) -> None:
        self._answer = value
        self._status |= STATUS_OUTPUT_FULL

    def save(self) -> Mapping[str, Any]:
        return self.State.plain(
            mode=self._mode,
            out=self._out,
            status=self._status,
            answer=self._answer,
            pending=self._pending,
            keys=bytes(self._keyboard.waiting),
            scanning=self._keyboard.is_scanning,
            keyboard_pending=self._keyboard.pending,
        )

    def load(self, state: Mapping[str, Any]) -> None:
        saved = self.State.load(self.name, state)
        possible = STATUS_SYSTEM | STATUS_UNLOCKED | STATUS_COMMAND | STATUS_OUTPUT_FULL
        if saved.status & ~possible:
            raise saved.wrong("status", f"no bits except those of {possible:#x}")
        if not saved.out & OUT_NO_RESET:
            raise saved.wrong("out", f"a number with bit {OUT_NO_RESET:#x} set")
        self._mode, self._out, self._status = saved.mode, saved.out, saved.status
        self._answer, self._pending = saved.answer, saved.pending
        self._keyboard.waiting = list(saved.keys)
        self._keyboard.is_scanning = saved.scanning
        self._keyboard.pending = saved.keyboard_pending
        if self._status & STATUS_OUTPUT_FULL:
            self._interrupt()  # the interrupt may have been on its way when it was saved
