"""Whatever guest and host do in whatever order: no byte is lost, doubled or reordered.

Bytes below 0x80 travel between guest and host, those above only in loopback, so the model can
tell them apart.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from avmm.devices.uart import FIFO_SIZE, MCR_LOOP, Uart

OUTPUT, INPUT, STALL = 24, 12, 10.0
IER, FCR, LCR, MCR, LSR, MSR = 1, 2, 3, 4, 5, 6

line_bytes = st.binary(min_size=1, max_size=20).map(lambda b: bytes(x & 0x7F for x in b))


class UartMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.level = False
        self.uart = self.new_uart()
        self.sent = bytearray()  # host -> guest: accepted, received
        self.received = bytearray()
        self.written = bytearray()  # guest -> host: accepted, taken
        self.taken = bytearray()
        self.lost = 0
        self.looped = []
        self.parked = None

    def new_uart(self):
        uart = Uart(OUTPUT, INPUT, STALL, lambda: self.now)
        uart.drive = self.drive
        return uart

    def drive(self, level):
        assert not self.uart.held or level == (self.uart._cause() != 1)
        self.level = level

    # The host.

    @rule(data=line_bytes)
    def feed(self, data):
        count = self.uart.feed(memoryview(data))
        assert count == 0 or not self.uart.held
        self.sent += data[:count]

    @rule(most=st.none() | st.integers(1, 40))
    def take(self, most):
        data = self.uart.take(most)
        assert most is None or len(data) <= most
        self.taken += data
        self.retry()

    @rule(seconds=st.sampled_from([0.0, 1.0, 9.0, 10.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def quiesce(self):
        self.uart.hold()

    @rule()
    def resume(self):
        if self.uart.held:
            self.uart.release()

    @rule()
    def move(self):
        """Save, load elsewhere; the line's level is a part of what arrives."""
        state = self.uart.save()
        held = self.uart.held
        lsr = self.uart.lsr
        self.uart = self.new_uart()
        self.uart.held = held
        self.uart.load(state)
        assert self.uart.save() == state
        assert self.uart.lsr == lsr
        if held:
            self.uart.irq = self.level  # driven by `release`

    # The guest.

    def loop(self):
        return bool(self.uart.mcr & MCR_LOOP)

    @rule(data=line_bytes)
    def write(self, data):
        if self.parked is not None or self.uart.held:
            return
        for byte in data:
            if self.uart.lcr & 0x80:
                return
            if not self.write_one(byte):
                return

    def write_one(self, byte):
        if self.loop():
            byte |= 0x80
            room = len(self.uart.rx) < (FIFO_SIZE if self.uart.fcr else 1)
            assert self.uart.write(0, byte)
            if room:
                self.looped.append(byte)
            else:
                assert self.uart.lsr & 0x02
                if not self.uart.fcr:
                    self.looped[-1] = byte
            return True
        lost = self.uart.lost
        if not self.uart.write(0, byte):
            assert not self.uart.lsr & 0x20, "a guest that looks is never made to wait"
            self.parked = byte
            return False
        self.account(byte, lost)
        return True

    def account(self, byte, lost):
        if self.uart.lost == lost:
            self.written.append(byte)
        else:
            assert self.uart.lost == lost + 1
            assert self.uart.stalled
            self.lost += 1

    def retry(self):
        if self.parked is not None:
            lost = self.uart.lost
            if self.uart.transmit(self.parked):
                self.account(self.parked, lost)
                self.parked = None

    @rule()
    def after_the_stall_time_a_parked_write_ends(self):
        if self.parked is not None:
            self.now += max(0, self.uart.stall_in())
            self.retry()
            assert self.parked is None

    @rule()
    def read_byte(self):
        if self.uart.lcr & 0x80:
            return
        ready = self.uart.read(LSR) & 1
        byte = self.uart.read(0)
        if not ready:
            assert byte == 0
        elif byte & 0x80:
            assert self.looped.pop(0) == byte
        else:
            self.received.append(byte)

    @rule(value=st.integers(0, 0x0F))
    def write_ier(self, value):
        if not self.uart.lcr & 0x80 and self.parked is None:
            self.uart.write(IER, value)

    @rule(value=st.sampled_from([0x00, 0x01, 0x03, 0x07, 0x41, 0x81, 0xC1, 0xC7]))
    def write_fcr(self, value):
        changed = (value ^ self.uart.fcr) & 1
        self.uart.write(FCR, value)
        if value & 2 or changed:
            self.looped.clear()

    @rule(value=st.integers(0, 0x1F))
    def write_mcr(self, value):
        if self.parked is None:
            self.uart.write(MCR, value)

    @rule(value=st.sampled_from([0x03, 0x83]))
    def write_lcr(self, value):
        if self.parked is None:
            self.uart.write(LCR, value)

    @rule(offset=st.sampled_from([2, 5, 6]))
    def read_status(self, offset):
        self.uart.read(offset)

    # What always holds.

    @invariant()
    def bounded(self):
        uart = self.uart
        assert len(uart.output) <= OUTPUT + FIFO_SIZE
        assert len(uart.staging) <= INPUT + FIFO_SIZE
        assert len(uart.rx) <= (FIFO_SIZE if uart.fcr else 1)

    @invariant()
    def order(self):
        uart = self.uart
        host = uart.rx[uart.looped :]
        assert self.received + host + uart.staging == self.sent
        assert bytes(uart.rx[: uart.looped]) == bytes(self.looped)
        assert self.taken + uart.output == self.written
        assert uart.lost == self.lost

    @invariant()
    def consistent(self):
        uart = self.uart
        lsr = uart.lsr
        assert bool(lsr & 1) == bool(uart.rx)
        assert bool(lsr & 0x20) == bool(lsr & 0x40)
        full = len(uart.output) >= OUTPUT
        assert bool(lsr & 0x20) == (not full or uart.stalled or self.loop())
        assert not uart.stalled or full
        if not uart.held:
            assert self.level == uart.irq == (uart._cause() != 1)
            ready = not uart.mcr_written or uart.mcr & 2 or uart.ier & 1
            if ready and not self.loop() and uart.staging:
                assert len(uart.rx) == (FIFO_SIZE if uart.fcr else 1)

    def teardown(self):
        """A guest that is ready gets the rest, and a reader too."""
        uart = self.uart
        if uart.held:
            uart.release()
        self.take(None)
        self.take(None)
        assert self.taken == self.written
        uart.write(LCR, 0x03)
        uart.write(MCR, 0x02)
        while uart.read(LSR) & 1:
            self.read_byte()
        assert self.received == self.sent


UartMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestUart = UartMachine.TestCase
