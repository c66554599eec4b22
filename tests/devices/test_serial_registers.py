"""The UART as a guest sees it; what the host does comes in by `stream`'s plain halves."""

from __future__ import annotations

import pytest

from avmm.devices.serial import Serial
from avmm.devices.uart import FIFO_SIZE
from avmm.errors import ConfigError, DeviceError

RBR = THR = 0
IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 1, 2, 2, 3, 4, 5, 6, 7
RDI, THRI, RLSI, MSI = 1, 2, 4, 8
NONE = 1


def feed(serial, data):
    """`send_all` without trio: all of it must fit."""
    assert serial._feed(memoryview(data)) == len(data)


def taken(serial):
    return serial._take(None) or b""


@pytest.fixture
def port(cpu):
    return cpu(Serial())


def test_reset_values(port):
    assert [port.inp(n) for n in range(8)] == [0, 0, 0x01, 0, 0x08, 0x60, 0xB0, 0]


def test_scratch_and_line_control_are_plain_storage(port):
    for value in (0xAA, 0x55, 0):
        port.out(SCR, value)
        port.out(LCR, value & 0x7F)
        assert port.inp(SCR) == value
        assert port.inp(LCR) == value & 0x7F


def test_divisor_latch_hides_data_and_ier(port):
    port.out(IER, 0x05)
    port.out(LCR, 0x83)
    port.out(0, 0x34)
    port.out(1, 0x12)
    assert (port.inp(0), port.inp(1)) == (0x34, 0x12)
    port.out(0, 0x35)
    assert (port.inp(0), port.inp(1)) == (0x35, 0x12)
    port.out(LCR, 0x03)
    assert port.inp(IER) == 0x05
    assert taken(port.device) == b""


def test_reserved_bits_read_zero(port):
    port.out(IER, 0xFF)
    port.out(MCR, 0xFF)
    assert port.inp(IER) == 0x0F
    assert port.inp(MCR) == 0x1F


def test_lsr_and_msr_cannot_be_written(port):
    port.out(LSR, 0)
    port.out(MSR, 0)
    assert (port.inp(LSR), port.inp(MSR)) == (0x60, 0xB0)


@pytest.mark.parametrize("offset", [8, 100])
def test_there_are_eight_ports(port, offset):
    with pytest.raises(DeviceError):
        port.inp(offset)
    with pytest.raises(DeviceError):
        port.out(offset, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"output_size": 0},
        {"output_size": 1.5},
        {"input_size": -1},
        {"stall": -1},
        {"stall": float("nan")},
        {"stall": float("inf")},
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Serial(**wrong)


# What Linux does: drivers/tty/serial/8250/8250_port.c.


def linux_autoconfig(port):
    """autoconfig(), autoconfig_16550a() and what follows, as for `ttyS0`."""
    scratch = port.inp(IER)
    port.out(IER, 0)
    assert port.inp(IER) & 0x0F == 0
    port.out(IER, 0x0F)
    assert port.inp(IER) & 0x0F == 0x0F
    port.out(IER, scratch)

    save_mcr, save_lcr = port.inp(MCR), port.inp(LCR)
    port.out(MCR, 0x10 | 0x0A)
    assert port.inp(MSR) & 0xF0 == 0x90, "loopback test"
    port.out(MCR, save_mcr)

    port.out(LCR, 0xBF)
    port.out(FCR, 0)  # EFR of a 16650
    port.out(LCR, 0)
    port.out(FCR, 0x01)
    assert port.inp(IIR) >> 6 == 3, "a 16550A"

    # autoconfig_16550a: neither a 16650, a 16C950, a NatSemi, a 16750 nor an XScale
    port.out(LCR, 0x80)
    assert port.inp(FCR) != 0, "EFR reads 0 on a 16650"
    port.out(LCR, 0xBF)
    assert port.inp(FCR) != 0
    port.out(LCR, 0)
    mcr = port.inp(MCR)
    port.out(LCR, 0xE0)  # bank 2 of a NatSemi, where register 2 shows the LOOP bit
    assert not (port.inp(2) ^ mcr) & 0x10
    port.out(LCR, 0)
    port.out(MCR, mcr ^ 0x10)
    port.out(LCR, 0xE0)
    assert not (port.inp(2) ^ mcr) & 0x10, "it followed: a NatSemi"
    port.out(LCR, 0)
    port.out(MCR, mcr)
    port.out(FCR, 0x21)
    assert port.inp(IIR) >> 5 & 7 == 6, "no 64-byte FIFO with DLAB clear"
    port.out(FCR, 0x01)
    port.out(LCR, 0x80)
    port.out(FCR, 0x21)
    assert port.inp(IIR) >> 5 & 7 == 6, "nor with DLAB set"
    port.out(FCR, 0x01)
    port.out(LCR, 0)
    iersave = port.inp(IER)
    port.out(IER, iersave & ~0x40)
    assert not port.inp(IER) & 0x40
    port.out(IER, iersave | 0x40)
    assert not port.inp(IER) & 0x40, "not an XScale"
    port.out(IER, iersave)

    port.out(LCR, save_lcr)
    port.out(MCR, save_mcr)
    linux_clear_fifos(port)
    port.inp(RBR)
    port.out(IER, 0)


def linux_clear_fifos(port):
    port.out(FCR, 0x01)
    port.out(FCR, 0x07)
    port.out(FCR, 0)


def linux_startup(port):
    """serial8250_do_startup(), then uart_startup's set_termios and RTS."""
    linux_clear_fifos(port)
    for register in (LSR, RBR, IIR, MSR):
        port.inp(register)
    assert port.inp(LSR) != 0xFF
    # "Test for UARTs that do not reassert THRE"
    assert port.inp(LSR) & 0x20
    port.out(IER, THRI)
    iir1 = port.inp(IIR)
    port.out(IER, 0)
    port.out(IER, THRI)
    iir = port.inp(IIR)
    port.out(IER, 0)
    assert not (iir1 & 1 == 0 and iir & 1), "UART_BUG_THRE"
    port.out(LCR, 0x03)
    port.out(MCR, 0x08)
    port.out(IER, THRI)
    lsr, iir = port.inp(LSR), port.inp(IIR)
    port.out(IER, 0)
    assert not (lsr & 0x40 and iir & 1), "UART_BUG_TXEN"
    for register in (LSR, RBR, IIR, MSR):
        port.inp(register)
    linux_set_termios(port)
    port.out(MCR, 0x0B)
    port.out(IER, RLSI | RDI)


def linux_set_termios(port):
    port.out(LCR, 0x83)
    port.out(0, 1)
    port.out(1, 0)
    port.out(LCR, 0x03)
    port.out(FCR, 0x01)
    port.out(FCR, 0x87)


def linux_interrupt(port):
    """serial8250_handle_irq() until nothing is pending; what was received."""
    data = bytearray()
    while not port.inp(IIR) & 1:
        lsr = port.inp(LSR)
        while lsr & 1:
            data.append(port.inp(RBR))
            lsr = port.inp(LSR)
        port.inp(MSR)
    return bytes(data)


def test_linux_finds_a_16550a(port):
    linux_autoconfig(port)
    assert taken(port.device) == b""
    assert not port.line.level


def test_linux_loses_nothing_that_was_sent_before_it_booted(port):
    sent = bytes(range(100))
    feed(port.device, sent)
    linux_autoconfig(port)
    assert not port.inp(LSR) & 1
    linux_startup(port)
    assert port.line.level
    got = linux_interrupt(port)
    assert got == sent
    assert not port.line.level
    feed(port.device, b"more")
    linux_set_termios(port)  # stty, while input is unread
    assert linux_interrupt(port) == b"more"


def test_linux_sends_sixteen_bytes_an_interrupt(port):
    linux_autoconfig(port)
    linux_startup(port)
    data = bytes(range(256)) * 3
    rest = data
    port.out(IER, RLSI | RDI | THRI)  # start_tx
    while rest:
        assert port.line.level
        assert port.inp(IIR) == 0xC2
        assert not port.line.level
        port.puts(rest[:FIFO_SIZE])
        rest = rest[FIFO_SIZE:]
    port.out(IER, RLSI | RDI)
    assert not port.line.level
    assert taken(port.device) == data


# Interrupts.


def test_without_fifo_iir_has_no_fifo_bits_and_fcr_sets_them(port):
    assert port.inp(IIR) == 0x01
    port.out(FCR, 0x01)
    assert port.inp(IIR) == 0xC1
    port.out(FCR, 0x00)
    assert port.inp(IIR) == 0x01


def test_priorities(port):
    port.out(FCR, 0x01)
    port.out(MCR, 0x1F)  # loopback
    port.puts(bytes(FIFO_SIZE + 1))  # one too many
    port.out(MCR, 0x0F)
    port.out(IER, 0x0F)
    assert port.inp(IIR) == 0xC6, "receiver line status first"
    assert port.inp(LSR) & 0x03 == 0x03
    assert port.inp(IIR) == 0xC4, "then received data"
    while port.inp(LSR) & 1:
        port.inp(RBR)
    assert port.inp(IIR) == 0xC2, "then THR empty"
    assert port.inp(IIR) == 0xC0, "then modem status"
    assert port.line.level
    port.inp(MSR)
    assert port.inp(IIR) == 0xC1
    assert not port.line.level


def test_overrun_is_cleared_by_reading_lsr(port):
    port.out(MCR, 0x1B)
    port.out(IER, RLSI)
    port.puts(b"ab")
    assert port.line.level
    assert port.inp(LSR) == 0x63
    assert port.inp(LSR) == 0x61
    assert not port.line.level


def test_reading_iir_clears_thre_only_where_it_is_the_source(port):
    feed(port.device, b"x")
    port.out(IER, RDI | THRI)
    assert port.inp(IIR) == 0x04
    assert port.inp(RBR) == ord("x")
    assert port.inp(IIR) == 0x02
    assert port.inp(IIR) == 0x01
    assert not port.line.level


def test_thre_comes_again_when_it_is_enabled_again_and_not_otherwise(port):
    port.out(IER, THRI)
    assert port.inp(IIR) == 0x02
    port.out(IER, THRI)
    assert port.inp(IIR) == NONE, "no change of the bit"
    port.out(IER, 0)
    assert port.inp(IIR) == NONE
    port.out(IER, THRI)
    assert port.inp(IIR) == 0x02


def test_each_byte_sent_gives_an_edge_even_if_iir_is_never_read(port):
    port.out(IER, THRI)
    edges = port.line.edges
    for n in range(5):
        port.out(THR, n)
        assert port.line.level
        assert port.line.edges == edges + n + 1


def test_no_thre_interrupt_for_a_polling_guest(port):
    port.puts(b"hello")
    assert port.line.edges == 0
    assert port.inp(IIR) == NONE


def test_trigger_level_and_timeout(port):
    port.out(FCR, 0x81)  # 8 bytes
    port.out(IER, RDI)
    feed(port.device, b"1234567")
    assert port.inp(IIR) == 0xCC, "below the trigger level: as if it had timed out"
    assert port.line.level
    feed(port.device, b"8")
    assert port.inp(IIR) == 0xC4
    assert port.gets() == b"12345678"
    assert port.inp(IIR) == 0xC1
    assert not port.line.level


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_levels(port, fcr, trigger):
    port.out(FCR, fcr)
    port.out(IER, RDI)
    for count in range(1, 17):
        feed(port.device, b".")
        assert port.inp(IIR) == (0xC4 if count >= trigger else 0xCC)


@pytest.mark.parametrize("fcr", [0x00, 0xC1])
def test_a_driver_that_takes_one_byte_an_interrupt_gets_all(port, fcr):
    port.out(FCR, fcr)
    port.out(IER, RDI)
    feed(port.device, b"0123456789")
    got = bytearray()
    served = 0
    while port.line.edges > served and len(got) < 100:
        served += 1
        got.append(port.inp(RBR))
    assert bytes(got) == b"0123456789"


def test_interrupts_do_not_need_out2(port):
    port.out(MCR, 0x03)
    port.out(IER, THRI)
    assert port.line.level


def test_a_port_without_interrupt_works(cpu):
    port = cpu(Serial(), irq=False)
    port.out(IER, 0x0F)
    port.puts(b"hi")
    feed(port.device, b"x")
    assert port.gets() == b"x"
    assert port.line.edges == 0


# Loopback and modem lines.


def test_loopback_comes_back_and_does_not_leave(port):
    port.out(FCR, 0x01)
    port.out(MCR, 0x1B)
    port.puts(b"test")
    assert port.gets() == b"test"
    assert taken(port.device) == b""


@pytest.mark.parametrize(
    ("fcr", "kept"), [(0x01, bytes(range(16))), (0x00, bytes([17]))], ids=["fifo", "no fifo"]
)
def test_loopback_overrun(port, fcr, kept):
    """8.4: the FIFO keeps what it has, a register without FIFO is overwritten."""
    port.out(FCR, fcr)
    port.out(MCR, 0x1B)
    port.puts(bytes(range(18)))
    assert port.inp(LSR) & 0x02
    assert port.gets() == kept


def test_loopback_of_the_modem_lines(port):
    for mcr, msr in ((0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x10, 0)):
        port.out(MCR, mcr)
        assert port.inp(MSR) & 0xF0 == msr


def test_deltas(port):
    port.out(MCR, 0x1B)
    port.inp(MSR)
    port.out(IER, MSI)
    assert not port.line.level
    port.out(MCR, 0x1E)  # DTR off, OUT1 on: DSR changes, RI comes on, which is no event
    assert port.line.level
    assert port.inp(IIR) == 0x00
    assert port.inp(MSR) == 0xD2
    assert not port.line.level
    port.out(MCR, 0x12)  # OUT1 and OUT2 off: RI goes (TERI), DCD changes
    assert port.inp(MSR) == 0x1C
    assert port.inp(MSR) == 0x10
    port.out(MCR, 0x10)
    assert port.inp(MSR) == 0x01


def test_input_waits_while_the_port_tests_itself(port):
    """As in wiki.osdev.org's self-test: it expects its own byte, whatever was typed before."""
    feed(port.device, b"typed")
    assert port.inp(LSR) & 1
    port.out(MCR, 0x1E)
    port.out(THR, 0xAE)
    assert port.inp(RBR) == 0xAE
    assert not port.inp(LSR) & 1
    port.out(MCR, 0x0F)
    assert port.gets() == b"typed"


def test_looped_bytes_stay_before_input_and_are_not_put_back(port):
    port.out(FCR, 0x01)
    port.out(MCR, 0x1F)
    port.puts(b"loop")
    feed(port.device, b"input")
    port.out(MCR, 0x0F)
    assert port.inp(RBR) == ord("l")
    port.out(FCR, 0x03)
    assert port.gets() == b"input"


# Input.


def test_a_polling_guest_that_never_writes_mcr_gets_input(port):
    feed(port.device, b"abc")
    assert port.gets() == b"abc"


@pytest.mark.parametrize(
    "ready", [lambda p: p.out(MCR, 0x02), lambda p: p.out(IER, RDI)], ids=["RTS", "RDI"]
)
def test_input_waits_until_the_guest_is_ready(port, ready):
    port.out(MCR, 0x09)
    feed(port.device, b"abc")
    assert not port.inp(LSR) & 1
    assert port.inp(RBR) == 0
    ready(port)
    assert port.gets() == b"abc"


def test_the_fifo_is_refilled_as_it_is_read_and_never_overruns(port):
    data = bytes(range(200))
    port.out(FCR, 0x01)
    feed(port.device, data)
    assert port.gets() == data
    assert not port.inp(LSR) & 0x02


@pytest.mark.parametrize("fcr", [0x03, 0x00, 0x01], ids=["reset", "turned off", "turned on"])
def test_a_fifo_reset_puts_unread_input_back(port, fcr):
    port.out(FCR, 0x01 if fcr != 0x01 else 0x00)
    port.out(MCR, 0x0B)
    feed(port.device, b"0123456789" * 3)
    assert port.inp(RBR) == ord("0")
    port.out(MCR, 0x09)  # not ready: nothing may come in behind the reset
    port.out(FCR, fcr)
    assert not port.inp(LSR) & 1, "it does look reset"
    port.out(MCR, 0x0B)
    assert port.gets() == b"123456789" + b"0123456789" * 2


def test_staging_is_bounded(cpu):
    port = cpu(Serial(input_size=10))
    port.out(MCR, 0)
    assert port.device._feed(memoryview(bytes(25))) == 10
    assert port.device._feed(memoryview(b"x")) == 0
    port.out(MCR, 2)  # RTS: one byte into RBR
    assert port.device._feed(memoryview(b"xy")) == 1


# Output.


def test_thre_is_clear_while_the_buffer_is_full_and_the_fifo_behind_it_takes_sixteen(cpu):
    port = cpu(Serial(output_size=4))
    port.puts(b"abc")
    assert port.inp(LSR) == 0x60
    port.puts(b"d")
    assert port.inp(LSR) == 0x00
    port.puts(b"0123456789abcdef")
    assert taken(port.device) == b"abcd0123456789abcdef"
    assert port.inp(LSR) == 0x60


def test_thre_interrupt_comes_when_there_is_room_again(cpu):
    port = cpu(Serial(output_size=4))
    port.out(IER, THRI)
    port.puts(b"abcd")
    assert not port.line.level
    assert port.inp(IIR) == NONE
    assert port.device._take(1) == b"a"
    assert port.line.level
    assert port.inp(IIR) == 0x02
    assert port.inp(LSR) == 0x60


def test_loopback_works_while_the_output_is_full(cpu):
    port = cpu(Serial(output_size=4))
    port.puts(b"abcd")
    port.out(MCR, 0x1B)
    assert port.inp(LSR) == 0x60
    port.out(THR, 0x55)
    assert port.inp(RBR) == 0x55
    port.out(MCR, 0x0B)
    assert port.inp(LSR) == 0x00
    assert taken(port.device) == b"abcd"


def test_a_polling_guest_gets_on_when_nobody_reads(cpu, clock):
    port = cpu(Serial(output_size=4, stall=1.0, clock=clock))
    port.puts(b"abcd")
    clock.now += 0.999
    assert not port.inp(LSR) & 0x20
    assert port.device.lost == 0
    clock.now += 0.001
    assert port.inp(LSR) == 0x60
    port.puts(b"gone")
    assert port.device.lost == 4
    assert taken(port.device) == b"abcd"
    port.puts(b"back")
    assert taken(port.device) == b"back"
    assert port.device.lost == 4


def test_a_slow_reader_is_no_stall(cpu, clock):
    port = cpu(Serial(output_size=4, stall=1.0, clock=clock))
    port.puts(b"abcd" + bytes(FIFO_SIZE))
    for _ in range(10):
        clock.now += 0.9
        assert len(port.device._take(1)) == 1
        assert not port.inp(LSR) & 0x20
    assert port.device.lost == 0


def test_a_stall_starts_anew_when_room_was_made(cpu, clock):
    port = cpu(Serial(output_size=4, stall=1.0, clock=clock))
    port.puts(b"abcd")
    clock.now += 0.9
    assert taken(port.device) == b"abcd"
    clock.now += 100
    assert port.inp(LSR) == 0x60
    port.puts(b"efgh")
    clock.now += 0.9
    assert port.inp(LSR) == 0
    assert port.device.lost == 0


def test_a_stall_raises_the_thre_interrupt(cpu, clock):
    port = cpu(Serial(output_size=4, stall=1.0, clock=clock))
    port.out(IER, THRI)
    port.puts(b"abcd")
    assert not port.line.level
    clock.now += 1
    assert port.device._stall_in() == float("inf")  # as `run` does it
    assert port.line.level
    port.puts(b"dropped")
    assert port.line.level
    assert port.device.lost == 7


def test_no_patience_at_all(cpu, clock):
    port = cpu(Serial(output_size=4, stall=0, clock=clock))
    port.puts(b"abcd" + bytes(FIFO_SIZE) + b"lost")
    assert port.inp(LSR) == 0x60
    assert port.device.lost == 4
