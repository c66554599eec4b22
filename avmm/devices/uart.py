"""The chip of a serial port: a 16550A's registers, FIFOs and interrupts, and nothing else.

`Uart` is a pure state machine without trio, thread or lock, so that it can be tested without a
VM (modelled on rust-vmm's vm-superio). `avmm.devices.serial` makes a device of it.

**Output is never lost silently, and output never blocks a vCPU forever.** Bytes go into a bounded
buffer. While the buffer is full, THRE and TEMT are clear, as if the line were busy, and a guest
that checks them waits by itself. Behind the buffer are the transmitter's own 16 bytes, which a
driver that saw THRE earlier may still fill (PC16550D, 8.11). A guest that writes even after that
is made to wait. If there is no room for `stall` seconds, the port is *stalled*: it reports that it
is ready, and what the guest writes is dropped and counted until somebody reads. (Firecracker has
had both: a blocked stdout that blocked the vCPU, #2461, and bytes dropped in silence, #2381.) The
clock starts when the buffer becomes full. Every access by the guest checks it, so a guest that
polls makes progress whatever the host is doing.

**Input is not lost at boot.** What is sent waits in a bounded staging buffer and enters the
16-byte FIFO only when the guest is ready, as if its sender honoured RTS. The guest is ready if RTS
is set, or the receive interrupt is enabled, or it never wrote MCR (a simple guest that only
polls). And a reset of the FIFO puts unread bytes back into staging: Linux resets the FIFOs at
every open and at every change of settings, and whatever a pipe had sent by then would be lost.

**Not modelled.** Baud rate, parity and breaks: the line is infinitely fast and has no errors
except the overrun of loopback. OUT2 does not gate the interrupt. On a PC it does, but in QEMU it
does not either, and guests that forget to set it work there. A reset of the transmit FIFO drops
nothing, because everything that was written has already been sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from avmm.devices.state import DeviceState
from avmm.errors import DeviceError
from avmm.plain import FLAG, U8, U16, Bytes, Int

PORTS: Final = 8
"""How many I/O ports a serial port takes."""

FIFO_SIZE: Final = 16
TRIGGERS: Final = (1, 4, 8, 14)  # PC16550D, 8.5: bytes in the FIFO, by FCR bits 7-6

# Registers (PC16550D, table II); with LCR.DLAB set, 0 and 1 are the divisor.
RBR_THR: Final = 0
IER: Final = 1
IIR_FCR: Final = 2
LCR: Final = 3
MCR: Final = 4
LSR: Final = 5
MSR: Final = 6
SCR: Final = 7

IER_RDI: Final = 0x01
IER_THRI: Final = 0x02
IER_RLSI: Final = 0x04
IER_MSI: Final = 0x08

IIR_NONE: Final = 0x01
IIR_MSI: Final = 0x00
IIR_THRI: Final = 0x02
IIR_RDI: Final = 0x04
IIR_RLSI: Final = 0x06
IIR_TIMEOUT: Final = 0x0C
IIR_FIFOS: Final = 0xC0

FCR_ENABLE: Final = 0x01
FCR_RESET_RX: Final = 0x02
FCR_STORED: Final = 0xC9

LCR_DLAB: Final = 0x80

MCR_RTS: Final = 0x02
MCR_OUT2: Final = 0x08
MCR_LOOP: Final = 0x10

LSR_DR: Final = 0x01
LSR_OE: Final = 0x02
LSR_THRE: Final = 0x20
LSR_TEMT: Final = 0x40
_EMPTY: Final = LSR_THRE | LSR_TEMT
_USUAL: Final = LSR_THRE | LSR_OE  # the bits that decide whether a read of LSR has a side effect

MSR_PRESENT: Final = 0xB0  # DCD, DSR and CTS: somebody is there and listens


class UartState(DeviceState, version=1):
    """The saved state of the chip. `Uart.load` bounds the two buffers by their sizes."""

    ier = Int(0, 0x0F)
    fcr = Int(0, FCR_STORED)
    lcr = U8
    mcr = Int(0, 0x1F)
    mcr_written = FLAG
    overrun = FLAG
    msr_delta = Int(0, 0x0F)
    scr = U8
    divisor = U16
    thr_empty = FLAG
    thre_pending = FLAG
    rx = Bytes(most=FIFO_SIZE)
    looped = Int(0, FIFO_SIZE)
    staging = Bytes()
    output = Bytes()
    lost = Int(0, 1 << 63)
    stalled = FLAG


def _nowhere(level: bool) -> None:
    """Stands in for the interrupt line if a port was placed without one."""


class Uart:
    """The chip: what each register reads and does, and the two buffers behind it.

    `drive` is called at each change of the interrupt output, `on_full` when the output buffer
    has filled up. Section numbers are those of the PC16550D data sheet (June 1995).
    """

    def __init__(
        self,
        output_size: int,
        input_size: int,
        stall: float,
        clock: Callable[[], float],
    ) -> None:
        self.output_size = output_size
        self.input_size = input_size
        self.stall = stall
        self.clock = clock
        self.drive: Callable[[bool], None] = _nowhere
        self.on_full: Callable[[], None] = lambda: None

        self.ier = 0
        self.fcr = 0
        self.lcr = 0
        self.mcr = MCR_OUT2  # as QEMU leaves it, in place of a BIOS
        self.mcr_written = False
        self.lsr = _EMPTY
        self.msr_delta = 0
        self.scr = 0
        self.divisor = 12  # 9600 baud
        self.thre_pending = False
        """The THRE interrupt: not simply THRE, since reading IIR clears it (8.6)."""

        self.rx = bytearray()
        self.looped = 0
        """How many bytes at the front of `rx` came by loopback. The others came from the host."""
        self.staging = bytearray()
        self.output = bytearray()
        self.lost = 0
        self.lost_before = 0
        """The value of `lost` when the port last stalled."""
        self.stalled = False
        self.discarding = False
        """True if nobody will ever read the output, so that it is dropped at once."""
        self.full_since: float | None = None
        """When the output buffer became full. None while it has room, or while the port is
        stalled."""

        self.held = False
        """True while quiesced: nothing enters the FIFO, and the interrupt output stays as it
        is."""
        self.irq = False
        self._trigger = 1
        self._timed_out = True
        self._direct = True
        """True if a write to THR only has to append to `output`: the hot path."""

    # What needs no `read` and no `write` now: a machine may answer such accesses by itself.

    @property
    def plain_lsr(self) -> int | None:
        """What reading LSR gives, if that changes nothing now. None if it may."""
        return self.lsr if self.full_since is None and not self.lsr & LSR_OE else None

    @property
    def plain_iir(self) -> int | None:
        """What reading IIR gives, if that changes nothing now. None if it may: while the THRE
        interrupt is enabled, its cause comes and goes with each byte."""
        if self.ier & IER_THRI:
            return None
        cause = self._cause()
        return cause | IIR_FIFOS if self.fcr & FCR_ENABLE else cause

    @property
    def plain_room(self) -> int:
        """How many bytes the guest may write to THR that only have to be appended to `output`."""
        if not self._direct or self.ier & IER_THRI or self.lcr & LCR_DLAB:
            return 0
        return max(0, self.output_size - 1 - len(self.output))

    # The guest's side.

    def read(self, offset: int) -> int:
        """What the guest reads from register `offset`."""
        if offset == LSR:
            lsr = self.lsr
            return lsr if lsr & _USUAL == LSR_THRE else self._read_lsr()
        if offset == RBR_THR:
            return self.divisor & 0xFF if self.lcr & LCR_DLAB else self._receive()
        if offset == IIR_FCR:
            return self._read_iir()
        return self._read_setting(offset)

    def write(self, offset: int, value: int) -> bool:
        """Take what the guest writes to register `offset`.

        False if this is a byte to send and there is no room for it. Call `transmit` later then.
        """
        if offset == RBR_THR and self.lcr < LCR_DLAB:
            if not self._direct:
                return self.transmit(value)
            self.output.append(value)
            if len(self.output) >= self.output_size:
                self._filled()
            if self.ier & IER_THRI:
                self._sent()
            return True
        self._write_setting(offset, value)
        return True

    def transmit(self, value: int) -> bool:
        """Send a byte, whatever the transmitter's state. Returns False if there is no room for
        it."""
        full = len(self.output) >= self.output_size + FIFO_SIZE
        if self.mcr & MCR_LOOP:
            self._loop_back(value)
        elif self.discarding or self.stalled or (full and self.check_stall()):
            self.lost += 1
        elif full:
            return False
        else:
            self.output.append(value)
            if self.full_since is None and len(self.output) >= self.output_size:
                self._filled()
        if self.ier & IER_THRI:
            self._sent()
        return True

    def _read_lsr(self) -> int:
        self.check_stall()
        lsr = self.lsr
        if lsr & LSR_OE:  # 8.4: reading clears it, and the interrupt with it
            self.lsr = lsr & ~LSR_OE
            self._update()
        return lsr

    def _receive(self) -> int:
        """Read RBR: returns the next byte of the FIFO, or 0 if there is none.

        The interrupt is computed twice. A read ends the receive interrupt (without FIFO) or the
        time-out (8.11), and the next byte raises it again. A driver that takes one byte per
        interrupt needs that edge.
        """
        if not self.rx:
            return 0
        value = self.rx.pop(0)
        self.looped -= self.looped > 0
        if not self.rx:
            self.lsr &= ~LSR_DR
        self._timed_out = False
        self._update()
        self._timed_out = True
        self._refill()
        self._update()
        return value

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRI:  # 8.6, table IV: reading IIR resets it, if it is the source
            self.thre_pending = False
            self._update()
        return cause | IIR_FIFOS if self.fcr & FCR_ENABLE else cause

    def _read_setting(self, offset: int) -> int:
        if offset == IER:
            return self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier
        if offset == LCR:
            return self.lcr
        if offset == MCR:
            return self.mcr
        if offset == MSR:
            msr = self._modem_lines() | self.msr_delta
            self.msr_delta = 0
            self._update()
            return msr
        if offset == SCR:
            return self.scr
        raise DeviceError(f"a serial port has {PORTS} ports, not one at {offset:#x}")

    def _write_setting(self, offset: int, value: int) -> None:
        if offset == LCR:
            self.lcr = value
        elif offset == MCR:
            self._write_mcr(value & 0x1F)
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == SCR:
            self.scr = value
        elif self.lcr & LCR_DLAB and offset == RBR_THR:
            self.divisor = self.divisor & 0xFF00 | value
        elif self.lcr & LCR_DLAB and offset == IER:
            self.divisor = self.divisor & 0x00FF | value << 8
        elif offset == IER:
            self._write_ier(value & 0x0F)
        elif offset not in (LSR, MSR):
            raise DeviceError(f"a serial port has {PORTS} ports, not one at {offset:#x}")

    def _write_ier(self, value: int) -> None:
        """Enabling the THRE interrupt raises it if THR is empty, even if IIR was read since.

        Not in the data sheet, but chips do it and Windows and Linux rely on it (Linux tests for
        it: UART_BUG_THRE). Only a change of the bit counts, as in QEMU and Bochs.
        """
        changed = value ^ self.ier
        self.ier = value
        if changed & IER_THRI:
            self.thre_pending = bool(value & IER_THRI and self.lsr & LSR_THRE)
        self._refill()
        self._update()

    def _write_fcr(self, value: int) -> None:
        """8.5. Turning the FIFOs on or off clears them, too."""
        if value & FCR_RESET_RX or (value ^ self.fcr) & FCR_ENABLE:
            self._put_back(self.looped)
            del self.rx[:]
            self.looped = 0
            self.lsr &= ~LSR_DR
        self.fcr = value & FCR_STORED if value & FCR_ENABLE else 0
        self._set_trigger()
        self._update()
        self._refill()
        self._update()

    def _write_mcr(self, value: int) -> None:
        before = self._modem_lines()
        if value & ~self.mcr & MCR_LOOP:
            # The receiver is disconnected from the line (8.8). A driver that tests itself now
            # expects to read back what it writes, not what somebody typed before.
            self._put_back(self.looped)
        self.mcr = value
        self.mcr_written = True
        after = self._modem_lines()
        changed = before ^ after
        # 8.9: DCTS, DDSR, DDCD at any change, TERI when RI goes off.
        self.msr_delta |= changed >> 4 & 0x0B | (changed & before & 0x40) >> 4
        self._refill()
        self._settle()

    def _modem_lines(self) -> int:
        """MSR bits 7-4; in loopback they are the four outputs of MCR (8.8)."""
        mcr = self.mcr
        if not mcr & MCR_LOOP:
            return MSR_PRESENT
        return (mcr & 0x0C) << 4 | (mcr & 0x02) << 3 | (mcr & 0x01) << 5

    def _loop_back(self, value: int) -> None:
        if len(self.rx) < self._capacity():
            self.rx.append(value)
            self.looped += 1
            self.lsr |= LSR_DR
        else:
            # 8.4: without the FIFO the byte in RBR is overwritten; with it the new byte is lost.
            self.lsr |= LSR_OE
            if not self.fcr & FCR_ENABLE:
                self.rx[0] = value
        self._update()

    # The host's side.

    @property
    def room(self) -> int:
        """How many bytes `feed` would take."""
        return 0 if self.held else max(0, self.input_size - len(self.staging))

    def feed(self, data: memoryview) -> int:
        """Take input for the guest. Returns how many bytes were accepted."""
        count = 0
        while (part := min(self.room, len(data) - count)) > 0:
            self.staging += data[count : count + part]
            count += part
            self._refill()  # this may make room
        self._update()
        return count

    def take(self, most: int | None) -> bytes:
        """Return up to `most` bytes of output, or all of it if `most` is None."""
        output = self.output
        if most is None or most >= len(output):
            data = bytes(output)
            output.clear()
        else:
            data = bytes(output[:most])
            del output[:most]
        if data and (self.stalled or self.full_since is not None):
            if len(output) < self.output_size:
                self.stalled = False
                self.full_since = None
                self._settle()
            elif not self.stalled:
                self.full_since = self.clock()  # somebody is reading, even if slowly
        return data

    def discard(self) -> None:
        """Nobody will read from now on: drop the output that is buffered and all that comes."""
        self.lost += len(self.output)
        self.output.clear()
        self.discarding = True
        self.stalled = False
        self.full_since = None
        self._settle()

    def check_stall(self) -> bool:
        """Look at the clock. Returns whether the port is stalled."""
        if self.full_since is not None and self.stall_in() <= 0:
            self.stalled = True
            self.full_since = None
            self.lost_before = self.lost
            self._settle()
        return self.stalled

    def stall_in(self) -> float:
        """The seconds until the port is stalled, unless somebody reads; inf if it will not be
        stalled."""
        return math.inf if self.full_since is None else self.full_since + self.stall - self.clock()

    def hold(self) -> None:
        """From now on, do nothing that the guest could notice without reading a register."""
        self.held = True

    def release(self) -> None:
        """End `hold`. Whatever became due in the meantime happens now."""
        self.held = False
        self._refill()
        self.irq = self._cause() != IIR_NONE
        self.drive(self.irq)

    # Used by both sides.

    def _cause(self) -> int:
        """The pending interrupt of the highest priority (8.6, table IV)."""
        ier = self.ier
        if ier & IER_RLSI and self.lsr & LSR_OE:
            return IIR_RLSI
        if ier & IER_RDI and self.rx:
            # The line is infinitely fast, so bytes below the trigger level have always timed out.
            if len(self.rx) >= self._trigger:
                return IIR_RDI
            if self._timed_out:
                return IIR_TIMEOUT
        if ier & IER_THRI and self.thre_pending:
            return IIR_THRI
        if ier & IER_MSI and self.msr_delta:
            return IIR_MSI
        return IIR_NONE

    def _update(self) -> None:
        level = self._cause() != IIR_NONE
        if level != self.irq and not self.held:
            self.irq = level
            self.drive(level)

    def _sent(self) -> None:
        """THR was written while its interrupt was enabled. The write ends the interrupt (8.6). If
        the transmitter is empty again, the interrupt is raised again at once; drivers that never
        read IIR need that edge."""
        self.thre_pending = False
        self._update()
        self.thre_pending = bool(self.lsr & LSR_THRE)
        self._update()

    def _filled(self) -> None:
        self.full_since = self.clock()
        self._settle()
        self.on_full()

    def _settle(self) -> None:
        """Recompute what depends on whether there is room: THRE, its interrupt, and the hot
        path."""
        waiting = self.full_since is not None and not self.mcr & MCR_LOOP
        if waiting:
            self.lsr &= ~_EMPTY
            self.thre_pending = False
        elif not self.lsr & LSR_THRE:
            self.lsr |= _EMPTY
            self.thre_pending = bool(self.ier & IER_THRI)
        self._direct = not (waiting or self.mcr & MCR_LOOP or self.stalled or self.discarding)
        self._update()

    def _capacity(self) -> int:
        return FIFO_SIZE if self.fcr & FCR_ENABLE else 1

    def _set_trigger(self) -> None:
        self._trigger = TRIGGERS[self.fcr >> 6] if self.fcr & FCR_ENABLE else 1

    def _refill(self) -> None:
        """Move input from staging into the FIFO if the guest is ready for it."""
        if not self.staging or self.held or self.mcr & MCR_LOOP:
            return
        if self.mcr_written and not (self.mcr & MCR_RTS or self.ier & IER_RDI):
            return
        count = self._capacity() - len(self.rx)
        if count > 0:
            self.rx += self.staging[:count]
            del self.staging[:count]
            self.lsr |= LSR_DR

    def _put_back(self, kept: int) -> None:
        """Return all but the first `kept` bytes of the FIFO to staging, in front."""
        self.staging[:0] = self.rx[kept:]
        del self.rx[kept:]
        if not self.rx:
            self.lsr &= ~LSR_DR

    # State.

    def save(self) -> dict[str, Any]:
        """Everything the guest could notice, and all bytes under way."""
        return UartState.plain(
            ier=self.ier,
            fcr=self.fcr,
            lcr=self.lcr,
            mcr=self.mcr,
            mcr_written=self.mcr_written,
            overrun=bool(self.lsr & LSR_OE),
            msr_delta=self.msr_delta,
            scr=self.scr,
            divisor=self.divisor,
            thr_empty=bool(self.lsr & LSR_THRE),
            thre_pending=self.thre_pending,
            rx=bytes(self.rx),
            looped=self.looped,
            staging=bytes(self.staging),
            output=bytes(self.output),
            lost=self.lost,
            stalled=self.stalled,
        )

    def load(self, state: Mapping[str, Any], device: str = "a serial port") -> None:
        """Restore what `save` returned. If this raises `DeviceError`, nothing was changed.
        Messages call it `device`.

        The stall clock starts from zero, because another machine's clock means nothing here.
        """
        saved = UartState.load(
            device,
            state,
            output=Bytes(most=self.output_size + FIFO_SIZE),
            staging=Bytes(most=self.input_size + FIFO_SIZE),
        )
        if saved.fcr & ~FCR_STORED or (saved.fcr and not saved.fcr & FCR_ENABLE):
            raise saved.wrong("fcr", "the bits that a 16550A keeps")
        if saved.thre_pending and not (saved.thr_empty and saved.ier & IER_THRI):
            raise saved.wrong("thre_pending", "False if THR is full or its interrupt is off")
        if len(saved.rx) > 1 and not saved.fcr:
            raise saved.wrong("rx", "at most 1 byte if the FIFO is off")
        if saved.looped > len(saved.rx):
            raise saved.wrong("looped", f"at most the {len(saved.rx)} bytes of rx")
        full = len(saved.output) >= self.output_size
        if saved.stalled and not full:
            raise saved.wrong("stalled", "False if the output buffer has room")
        # Nothing is refused from here on.
        self.ier, self.fcr, self.lcr = saved.ier, saved.fcr, saved.lcr
        self.mcr, self.mcr_written, self.msr_delta = saved.mcr, saved.mcr_written, saved.msr_delta
        self.scr, self.divisor = saved.scr, saved.divisor
        self.rx, self.looped = bytearray(saved.rx), saved.looped
        self.staging, self.output = bytearray(saved.staging), bytearray(saved.output)
        self.stalled, self.thre_pending = saved.stalled, saved.thre_pending
        self.lost = self.lost_before = saved.lost
        self.lsr = (LSR_DR if self.rx else 0) | (LSR_OE if saved.overrun else 0)
        if saved.thr_empty:
            self.lsr |= _EMPTY  # else THR may become empty now, with an interrupt: see _settle
        self._set_trigger()
        waits = full and not saved.stalled
        self.full_since = self.clock() if waits else None
        if self.discarding:
            self.discard()
        self._refill()
        self._settle()
        if waits:
            self.on_full()
