"""The serial port's other end: the trio stream, back-pressure both ways, stalls, threads."""

from __future__ import annotations

import logging
import threading

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from avmm.devices.serial import Serial
from avmm.devices.uart import FIFO_SIZE

IER, MCR, LSR = 1, 4, 5
RDI, THRI = 1, 2


@pytest.fixture
def port(cpu):
    return cpu(Serial())


async def collect(into, stream):
    async for data in stream:
        into += data


# Output.


async def test_output_is_received_in_order(port):
    port.puts(b"hello, world")
    with assert_checkpoints():
        assert await port.device.stream.receive_some(5) == b"hello"
    assert await port.device.stream.receive_some() == b", world"


async def test_output_that_nobody_has_received(port):
    stream = port.device.stream
    assert not stream.has_output
    port.puts(b"one two")
    assert stream.has_output
    assert await stream.receive_until(b"one ") == b"one "
    assert stream.has_output, "it was read, and not returned"
    assert await stream.receive_some() == b"two"
    assert not stream.has_output


async def test_a_waiting_reader_is_woken_once(port, nursery):
    got = bytearray()
    nursery.start_soon(collect, got, port.device.stream)
    await wait_all_tasks_blocked()
    port.puts(b"ab")
    sets = sum(w.sets for w in port.host.wakeups)
    assert sets == 1, "a byte costs a wake-up only where somebody waits"
    await wait_all_tasks_blocked()
    port.puts(b"c")
    await wait_all_tasks_blocked()
    assert got == b"abc"
    nursery.cancel_scope.cancel()


async def test_cancelled_receive_loses_nothing(port):
    with trio.CancelScope() as scope:
        scope.cancel()
        await port.device.stream.receive_some()
    port.puts(b"x")
    with trio.CancelScope() as scope:
        scope.cancel()
        await port.device.stream.receive_some()
    assert scope.cancelled_caught
    assert await port.device.stream.receive_some() == b"x"


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (-1, ValueError), ("1", TypeError)])
async def test_max_bytes_is_checked(port, wrong, error):
    with pytest.raises(error):
        await port.device.stream.receive_some(wrong)


async def test_two_tasks_in_one_half_are_told(port, nursery):
    stream = port.device.stream
    nursery.start_soon(stream.receive_some)
    nursery.start_soon(stream.send_all, bytes(100_000))
    await wait_all_tasks_blocked()
    with pytest.raises(trio.BusyResourceError):
        await stream.receive_some()
    with pytest.raises(trio.BusyResourceError):
        await stream.send_all(b"")
    with pytest.raises(trio.BusyResourceError):
        await stream.wait_send_all_might_not_block()
    nursery.cancel_scope.cancel()


async def test_after_a_cancelled_use_the_stream_is_free_again(port):
    stream = port.device.stream
    with trio.move_on_after(0):
        await stream.receive_some()
    with trio.move_on_after(0):
        await stream.send_all(bytes(100_000))
    port.puts(b"x")
    assert await stream.receive_some() == b"x"


# Input.


async def test_input_arrives_in_order_and_send_all_waits_for_room(cpu, nursery):
    port = cpu(Serial(input_size=100))
    data = bytes(n & 0x7F for n in range(1000))
    done = trio.Event()

    async def send():
        await port.device.stream.send_all(data)
        done.set()

    nursery.start_soon(send)
    await wait_all_tasks_blocked()
    assert not done.is_set()
    got = port.gets()
    assert len(got) == 101
    assert not done.is_set()
    while not done.is_set():
        await wait_all_tasks_blocked()
        got += port.gets()
    assert got + port.gets() == data


async def test_input_interrupts_the_guest(port):
    port.out(IER, RDI)
    await port.device.stream.send_all(b"x")
    assert port.line.level


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_send_all_takes_any_bytes(port, kind):
    with assert_checkpoints():
        await port.device.stream.send_all(kind(b"abc"))
    with assert_checkpoints():
        await port.device.stream.send_all(kind(b""))
    assert port.gets() == b"abc"


async def test_a_cancelled_send_says_what_was_accepted(cpu):
    port = cpu(Serial(input_size=10))
    port.out(MCR, 0)
    stream = port.device.stream
    data = bytes(range(64, 90))
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert stream.accepted == 10
    port.out(MCR, 2)
    got = port.gets()
    assert got == data[:10]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data[stream.accepted :])
        for _ in range(10):
            await wait_all_tasks_blocked()
            got += port.gets()
    assert got == data


async def test_wait_send_all_might_not_block(cpu, nursery):
    port = cpu(Serial(input_size=4))
    stream = port.device.stream
    with assert_checkpoints():
        await stream.wait_send_all_might_not_block()
    port.out(MCR, 0)
    await stream.send_all(b"1234")
    woken = trio.Event()

    async def wait():
        await stream.wait_send_all_might_not_block()
        woken.set()

    nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    assert not woken.is_set()
    port.out(MCR, 2)  # one byte goes into the FIFO
    await wait_all_tasks_blocked()
    assert woken.is_set()


# The end.


async def test_after_the_guest_has_ended(port, nursery):
    stream = port.device.stream
    got = bytearray()
    port.puts(b"last words")
    port.device.finish()
    assert await stream.receive_some(4) == b"last"
    await collect(got, stream)
    assert got == b" words"
    assert await stream.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"hello?")
    with pytest.raises(trio.BrokenResourceError):
        await stream.wait_send_all_might_not_block()


async def test_finish_wakes_both_halves(port):
    stream = port.device.stream

    async def send():
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(bytes(100_000))

    async def receive():
        assert await stream.receive_some() == b""

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        port.device.finish()


async def test_aclose_wakes_both_halves_and_closes_for_good(port):
    stream = port.device.stream

    async def use(function, *args):
        with pytest.raises(trio.ClosedResourceError):
            await function(*args)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(use, stream.send_all, bytes(100_000))
        nursery.start_soon(use, stream.receive_some)
        await wait_all_tasks_blocked()
        with assert_checkpoints():
            await stream.aclose()
    await stream.aclose()
    await use(stream.send_all, b"")
    await use(stream.receive_some)
    await use(stream.wait_send_all_might_not_block)
    port.device.finish()
    await use(stream.receive_some)


async def test_aclose_under_cancellation_closes(port):
    with trio.CancelScope() as scope:
        scope.cancel()
        await port.device.stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await port.device.stream.receive_some()


async def test_a_closed_console_never_holds_the_guest_up(cpu, clock):
    port = cpu(Serial(output_size=4, clock=clock))
    port.puts(b"abcd")
    await port.device.stream.send_all(b"input")
    await port.device.stream.aclose()
    assert port.inp(LSR) & 0x60 == 0x60
    port.puts(bytes(1000))
    assert port.device.lost == 1004
    assert port.gets() == b"input"


# Output that nobody reads.


async def test_a_write_without_room_waits_for_the_reader(cpu, nursery, clock):
    port = cpu(Serial(output_size=4, stall=3600, clock=clock))
    stream = port.device.stream
    port.puts(b"abcd" + b"." * FIFO_SIZE)
    answer = port.try_out(0, ord("!"))
    assert answer is not None
    written = trio.Event()

    async def vcpu():
        await answer
        written.set()

    nursery.start_soon(vcpu)
    await wait_all_tasks_blocked()
    assert not written.is_set()
    assert await stream.receive_some(1) == b"a"
    await wait_all_tasks_blocked()
    assert written.is_set()
    assert await stream.receive_some() == b"bcd" + b"." * FIFO_SIZE + b"!"
    assert port.device.lost == 0


async def test_several_vcpus_wait_for_room_at_once(cpu, nursery, clock):
    port = cpu(Serial(output_size=1, stall=3600, clock=clock))
    port.puts(bytes(1 + FIFO_SIZE))
    for byte in b"xyz":

        async def vcpu(answer):
            await answer

        nursery.start_soon(vcpu, port.try_out(0, byte))
    await wait_all_tasks_blocked()
    got = bytearray()
    while len(got) < 1 + FIFO_SIZE + 3:
        with trio.fail_after(5):
            got += await port.device.stream.receive_some()
    assert sorted(got[-3:]) == sorted(b"xyz")


async def test_a_waiting_write_ends_when_the_console_is_closed(cpu, nursery, clock):
    port = cpu(Serial(output_size=1, stall=3600, clock=clock))
    port.puts(bytes(1 + FIFO_SIZE))
    answer = port.try_out(0, 1)
    written = trio.Event()

    async def vcpu():
        await answer
        written.set()

    nursery.start_soon(vcpu)
    await wait_all_tasks_blocked()
    await port.device.stream.aclose()
    with trio.fail_after(5):
        await written.wait()


async def test_a_waiting_write_gives_up_after_the_stall_time(cpu, autojump_clock):
    port = cpu(Serial(output_size=4, stall=1.0, clock=autojump_clock.current_time))
    port.puts(b"abcd" + b"." * FIFO_SIZE)
    began = trio.current_time()
    await port.try_out(0, ord("!"))
    assert trio.current_time() - began == pytest.approx(1.0)
    assert port.device.lost == 1
    port.puts(b"lost as well")
    assert trio.current_time() - began == pytest.approx(1.0)
    assert port.device.lost == 13
    assert await port.device.stream.receive_some() == b"abcd" + b"." * FIFO_SIZE


async def test_a_guest_that_sleeps_until_thre_is_woken_by_the_stall(cpu, autojump_clock, nursery):
    port = cpu(Serial(output_size=4, stall=1.0, clock=autojump_clock.current_time))
    nursery.start_soon(port.device.run)
    await wait_all_tasks_blocked()
    port.out(IER, THRI)
    port.puts(b"abcd")
    assert not port.line.level
    await trio.sleep(0.99)
    assert not port.line.level
    await trio.sleep(0.02)
    assert port.line.level
    nursery.cancel_scope.cancel()


async def test_the_watch_starts_anew_when_room_was_made(cpu, autojump_clock, nursery):
    port = cpu(Serial(output_size=4, stall=1.0, clock=autojump_clock.current_time))
    nursery.start_soon(port.device.run)
    for _ in range(5):
        port.puts(b"abcd")
        await trio.sleep(0.7)
        assert await port.device.stream.receive_some() == b"abcd"
    port.puts(b"abcd")
    await trio.sleep(0.9)
    assert not port.inp(LSR) & 0x20
    await trio.sleep(0.2)
    port.out(0, 1)
    assert port.device.lost == 1
    nursery.cancel_scope.cancel()


async def test_a_stall_is_reported_once_and_so_is_its_end(cpu, autojump_clock, nursery, caplog):
    caplog.set_level(logging.WARNING, "avmm.serial")
    port = cpu(Serial(output_size=4, stall=1.0, clock=autojump_clock.current_time))
    nursery.start_soon(port.device.run)
    port.puts(b"abcd")
    await trio.sleep(2)
    assert len(caplog.records) == 1
    assert "1 s" in caplog.text
    port.puts(bytes(7))
    await trio.sleep(2)
    assert len(caplog.records) == 1
    await port.device.stream.receive_some()
    assert len(caplog.records) == 2
    assert "7 bytes" in caplog.records[1].getMessage()
    port.puts(b"efgh")
    await trio.sleep(2)
    assert len(caplog.records) == 3, "another stall"
    port.puts(b"!")
    await port.device.stream.receive_some()
    assert "1 bytes" in caplog.records[3].getMessage()
    assert {r.levelname for r in caplog.records} == {"WARNING"}
    assert {r.name for r in caplog.records} == {"avmm.serial"}
    nursery.cancel_scope.cancel()


async def test_both_reports_come_even_if_the_reader_finds_the_stall_first(cpu, clock, caplog):
    port = cpu(Serial(output_size=4, stall=1.0, clock=clock))
    port.puts(b"abcd")
    clock.now += 1
    assert port.inp(LSR) & 0x20
    assert not caplog.records, "a vCPU does not log"
    port.puts(b"xy")
    await port.device.stream.receive_some()
    assert [r.getMessage() for r in caplog.records if "2 bytes" in r.getMessage()]
    assert len(caplog.records) == 2


# Quiesced.


async def test_quiesced_takes_no_input_and_raises_no_interrupt(cpu, nursery):
    port = cpu(Serial(output_size=4, input_size=8))
    device, stream = port.device, port.device.stream
    port.out(IER, RDI | THRI)
    port.inp(2)
    await device.quiesce()
    await device.quiesce()
    before = device.save()
    nursery.start_soon(stream.send_all, b"abc")
    await wait_all_tasks_blocked()
    assert not port.line.level
    assert device.save() == before
    await device.resume()
    await wait_all_tasks_blocked()
    assert port.line.level
    assert port.gets() == b"abc"
    await device.resume()


async def test_quiesced_output_is_read_and_its_interrupt_comes_later(cpu):
    port = cpu(Serial(output_size=4))
    port.out(IER, THRI)
    port.puts(b"abcd")
    await port.device.quiesce()
    assert await port.device.stream.receive_some() == b"abcd"
    assert not port.line.level
    await port.device.resume()
    assert port.line.level


async def test_quiesced_leaves_staged_input_where_it_is(cpu):
    port = cpu(Serial())
    port.out(MCR, 0)
    await port.device.stream.send_all(b"abc")
    await port.device.quiesce()
    port.out(MCR, 2)
    assert port.inp(LSR) & 1 == 0
    await port.device.resume()
    assert port.gets() == b"abc"


async def test_resume_without_quiesce_does_nothing(port):
    port.out(IER, THRI)
    port.inp(2)
    edges = port.line.edges
    await port.device.resume()
    assert port.line.edges == edges


async def test_released_output_is_for_another_machine(cpu, nursery):
    """Its reader waits, and gets it only where the guest comes back."""
    port = cpu(Serial())
    got = bytearray()
    nursery.start_soon(collect, got, port.device.stream)
    await wait_all_tasks_blocked()
    await port.device.quiesce()
    port.puts(b"ab")
    await port.device.release()
    assert port.device.save()["output"] == b"ab"
    await wait_all_tasks_blocked()
    assert got == b""
    await port.device.acquire()
    await wait_all_tasks_blocked()
    assert got == b"ab"
    await port.device.release()
    port.puts(b"cd")
    port.device.finish()
    await wait_all_tasks_blocked()
    assert got == b"ab"
    assert await port.device.stream.receive_some() == b"", "the reader before was told the end"
    assert port.device.save()["output"] == b"cd"


# From a real thread, as a vCPU runs.


async def test_a_guest_that_polls_lsr_from_a_thread_loses_nothing(cpu):
    port = cpu(Serial(output_size=64, stall=3600))
    data = bytes(n * 7 & 0xFF for n in range(20_000))

    def vcpu():
        for byte in data:
            while not port.inp(LSR) & 0x20:
                pass
            port.out(0, byte)

    await check_output(port, vcpu, data)


async def test_a_guest_that_never_looks_loses_nothing_either(cpu):
    port = cpu(Serial(output_size=64, stall=3600))
    data = bytes(n * 7 & 0xFF for n in range(20_000))
    waited = 0

    def vcpu():
        nonlocal waited
        for byte in data:
            answer = port.try_out(0, byte)
            if answer is not None:
                waited += 1
                trio.from_thread.run(lambda answer=answer: answer)

    await check_output(port, vcpu, data)
    assert waited


async def test_a_guest_driven_by_interrupts_loses_nothing(cpu):
    port = cpu(Serial(output_size=64, stall=3600))
    data = bytes(n * 7 & 0xFF for n in range(20_000))
    raised = threading.Semaphore(0)
    line_set = port.line.set

    def line(level):
        if level and not port.line.level:
            raised.release()
        line_set(level)

    port.device._uart.drive = line

    def vcpu():
        port.out(2, 0x01)
        port.out(IER, THRI)
        rest = data
        while rest:
            assert raised.acquire(timeout=20)
            if port.inp(2) & 0x0F == 0x02:
                port.puts(rest[:FIFO_SIZE])
                rest = rest[FIFO_SIZE:]

    await check_output(port, vcpu, data)


async def check_output(port, vcpu, data):
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect, got, port.device.stream)
        await trio.to_thread.run_sync(vcpu)
        port.device.finish()
    assert got == data
    assert port.device.lost == 0


async def test_input_reaches_a_thread_and_its_reads_make_room(cpu):
    port = cpu(Serial(input_size=32))
    data = bytes(n * 7 & 0xFF for n in range(5_000))

    def vcpu():
        got = bytearray()
        while len(got) < len(data):
            if port.inp(LSR) & 1:
                got.append(port.inp(0))
        return got

    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.device.stream.send_all, data)
        assert await trio.to_thread.run_sync(vcpu) == data


async def test_an_echo_through_both_halves(cpu):
    port = cpu(Serial(input_size=16, output_size=16, stall=3600))
    data = bytes(n & 0xFF for n in range(5_000))

    def vcpu():
        for _ in data:
            while not port.inp(LSR) & 1:
                pass
            byte = port.inp(0)
            while not port.inp(LSR) & 0x20:
                pass
            port.out(0, byte)
        trio.from_thread.run_sync(port.device.finish)

    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect, got, port.device.stream)
        nursery.start_soon(port.device.stream.send_all, data)
        nursery.start_soon(trio.to_thread.run_sync, vcpu)
    assert got == data
