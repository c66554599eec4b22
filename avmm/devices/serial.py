"""A serial port: the device that connects the chip to the bus and to whoever waits on either side.

What the registers do is `avmm.devices.uart`, what the host sees is `avmm.devices.console`.

**Safety.** The `Uart` is only touched with `host.lock` held: by the vCPUs' accesses, and by the
stream in the few lines that move bytes. A side that finds nothing to do sets a flag under that
lock and waits for a wake-up. So a byte costs a wake-up only if somebody is waiting for it.

**The hot path.** What a driver does again and again while it sends or polls is to read LSR and IIR
and to write THR. While such an access changes nothing else, it is not made here: the registers are
left to C (`avmm.devices.registers`). The bytes that C has collected are the chip's as soon as
anybody looks. `_chip` takes them in before, and says afterwards what C may do from then on. While
somebody waits for output, C takes none, so that the byte for which he waits is written here.

**Waiting.** If a guest writes although the chip has no room, its vCPU waits in an awaitable until
somebody reads or the port is stalled. Every access by the guest checks the stall clock.
`Serial.run` checks it for guests that sleep, and logs what is lost.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Final

import trio

from avmm.ctrl_c import protected
from avmm.devices.base import Device, Host, Wakeup, WriteAnswer
from avmm.devices.console import ConsoleStream
from avmm.devices.registers import CollectedWrites, Register
from avmm.devices.uart import IIR_FCR, LSR, RBR_THR, Uart
from avmm.errors import ConfigError

logger = logging.getLogger("avmm.serial")

_COLLECTED: Final = 4096
"""The most bytes of output that C collects before the chip takes them in."""


class Serial(Device):
    """A serial port: place it at 8 ports and an interrupt; talk to the guest by `stream`.

    `output_size` and `input_size` bound what is buffered in each direction, `stall` is how many
    seconds the guest waits for a reader of its output; see `avmm.devices.uart`. `clock` is for
    tests.

    While it is quiesced, it takes no input (`send_all` waits) and raises no interrupt; output can
    still be read. Output that is read after `save` is in the saved state as well. Once released,
    it gives no more output: the reader at the guest's new place gets that.
    """

    max_width: ClassVar[int] = 1
    acpi_hid: ClassVar[str] = "PNP0501"

    def __init__(
        self,
        *,
        output_size: int = 64 * 1024,
        input_size: int = 4096,
        stall: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, size in (("output_size", output_size), ("input_size", input_size)):
            if type(size) is not int or size < 1:
                raise ConfigError(f"Serial: {name} is {size!r}, expected a number of bytes")
        if not 0 <= stall < math.inf:
            raise ConfigError(f"Serial: stall is {stall!r}, expected a number of seconds")
        self._uart = Uart(output_size, input_size, stall, clock)
        self._finished = False
        self._closed = False
        self._released = False
        self._reader_waits = False
        self._sender_waits = False
        self._stall_reported = False
        self._shown_lsr: int | None = None
        self._shown_iir: int | None = None
        self._collects = 0
        """Until how many bytes are there C collects more of them."""
        # vCPUs whose byte waits for room. Only trio makes room, so no thread ever wakes them.
        self._writers = trio.lowlevel.ParkingLot()
        self._lsr: Register
        self._iir: Register
        self._thr: CollectedWrites
        self._output: Wakeup
        self._room: Wakeup
        self._full: Wakeup
        self.stream = ConsoleStream(self)
        """The host's end of the cable."""

    @property
    def lost(self) -> int:
        """How many bytes the guest wrote that nobody read in time."""
        return self._uart.lost

    def attach(self, host: Host) -> None:
        super().attach(host)
        self._output, self._room, self._full = host.wakeup(), host.wakeup(), host.wakeup()
        self._uart.on_full = self._full.set
        self._uart.drive = self._drive
        self._lsr = host.registers.constant(LSR, 1, None, saved=False)
        self._iir = host.registers.constant(IIR_FCR, 1, None, saved=False)
        self._thr = host.registers.collected(RBR_THR, 1, _COLLECTED, saved=False)
        self._thr.limit = 0
        self._leave()

    def read(self, offset: int, size: int) -> int:
        self._enter()
        value = self._uart.read(offset)
        if self._sender_waits:
            self._wake_sender()
        self._leave()
        return value

    def write(self, offset: int, size: int, value: int) -> WriteAnswer:
        self._enter()
        taken = self._uart.write(offset, value)
        if taken:
            if self._reader_waits:
                self._wake_reader()
            if self._sender_waits:
                self._wake_sender()
        self._leave()
        return None if taken else self._send_later(value)

    @contextlib.contextmanager
    def _chip(self) -> Iterator[Uart]:
        """The chip, for a few lines that touch it."""
        with self.host.lock:
            self._enter()
            try:
                yield self._uart
            finally:
                self._leave()

    # Called with the lock held, before and after the chip is touched.

    def _enter(self) -> None:
        if self._collects:
            self._thr.limit = 0
            if len(self._thr):
                self._uart.output += self._thr.take()
            self._collects = 0

    def _leave(self) -> None:
        self._show()
        if not self._reader_waits and (room := self._uart.plain_room):
            self._collects = self._thr.limit = room

    def _show(self) -> None:
        """Say what C may answer."""
        uart = self._uart
        if (lsr := uart.plain_lsr) != self._shown_lsr:
            self._shown_lsr = lsr
            self._lsr.answer(lsr)
        if (iir := uart.plain_iir) != self._shown_iir:
            self._shown_iir = iir
            self._iir.answer(iir)

    def _drive(self, level: bool) -> None:
        """A guest that is interrupted looks at once for the reason, without waiting for the
        lock."""
        self._show()
        if self.host.interrupt is not None:
            self.host.interrupt.set(level)

    async def _send_later(self, value: int) -> None:
        """The rest of a THR write that found no room; takes at most `stall` seconds."""
        while True:
            with self._chip() as uart:
                if uart.transmit(value):
                    self._wake_reader()
                    return
                wait = uart.stall_in()
            with trio.move_on_after(max(0, wait)):
                await self._writers.park()

    @protected
    async def run(self) -> None:
        """Watch the stall clock for guests that sleep until THRE is set, and log stalls.

        Only `run` and `receive_some` write to the log. The vCPU that finds the port stalled does
        not, because a log that blocks must not block the guest.
        """
        while True:
            await self._full.wait()
            wait = self._stall_in()
            while wait < math.inf:
                await trio.sleep(max(0, wait))
                wait = self._stall_in()
            if self._uart.stalled:
                self._report_stall()

    async def quiesce(self) -> None:
        with self._chip() as uart:
            uart.hold()

    async def resume(self) -> None:
        with self._chip() as uart:
            if uart.held:
                uart.release()
            self._wake_sender()

    async def release(self) -> None:
        with self.host.lock:
            self._released = True

    async def acquire(self) -> None:
        with self.host.lock:
            self._released = False
            self._output.set()

    def save(self) -> Mapping[str, Any]:
        with self._chip() as uart:
            return uart.save()

    def load(self, state: Mapping[str, Any]) -> None:
        with self._chip() as uart:
            uart.load(state, self.name)
            # A stall in the saved state was reported by the machine in which it happened.
            self._stall_reported = uart.stalled
            self._wake_reader()
            self._wake_sender()
        self._writers.unpark_all()

    def finish(self) -> None:
        """The guest has ended (called in trio): output ends after what is buffered, and input is
        no longer accepted."""
        with self.host.lock:
            self._finished = True
            self._output.set()
            self._room.set()

    # Called with the lock held.

    def _wake_reader(self) -> None:
        if self._reader_waits and self._uart.output:
            self._reader_waits = False
            self._output.set()

    def _wake_sender(self) -> None:
        if self._sender_waits and self._uart.room:
            self._sender_waits = False
            self._room.set()

    # Called in trio, by `run` and the stream.

    def _stall_in(self) -> float:
        with self._chip() as uart:
            uart.check_stall()
            return uart.stall_in()

    def _report_stall(self) -> None:
        if not self._stall_reported:
            self._stall_reported = True
            logger.warning(
                "%s: nobody has read the guest's output for %g s: what the guest writes from "
                "now on is lost, until somebody reads",
                self.name,
                self._uart.stall,
            )

    def _take(self, most: int | None) -> bytes | None:
        """Output for the reader, b"" at its end, or None if the reader has to wait."""
        with self._chip() as uart:
            if self._closed:
                raise trio.ClosedResourceError("this end of the console was closed")
            if self._released:
                return b"" if self._finished else None
            was_stalled = uart.stalled
            data = uart.take(most)
            over = was_stalled and not uart.stalled
            lost = uart.lost - uart.lost_before
            self._reader_waits = not data
            finished = self._finished
        if over:
            self._report_stall()
            self._stall_reported = False
            logger.warning("%s: output is read again; %d bytes were lost", self.name, lost)
        if data:
            self._writers.unpark_all()
        return data if data or finished else None

    def _has_output(self) -> bool:
        with self._chip() as uart:
            return bool(uart.output) and not self._released

    def _feed(self, data: memoryview) -> int:
        """Take input from the sender, and return how many bytes were accepted. Raises if none will
        ever be accepted."""
        with self._chip() as uart:
            self._check_sendable()
            count = uart.feed(data)
            self._sender_waits = count < len(data)
            return count

    def _has_room(self) -> bool:
        with self._chip() as uart:
            self._check_sendable()
            self._sender_waits = not uart.room
            return not self._sender_waits

    def _check_sendable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this end of the console was closed")
        if self._finished:
            raise trio.BrokenResourceError("the guest has ended")

    def _close(self) -> None:
        with self._chip() as uart:
            if not self._closed:
                self._closed = True
                uart.discard()
                self._output.set()
                self._room.set()
        self._writers.unpark_all()
