"""The virtio console: ports as streams, their events, control messages, bounded buffers."""

from __future__ import annotations

import math
import struct

import pytest
import trio
from support.virtio_driver import EVENT_IDX, VERSION_1, Bench, Driver, Ring, settle

from avmm.devices.virtio.console import Console
from avmm.devices.virtio.port import Port
from avmm.errors import ConfigError, DeviceError

MULTIPORT = 2
FEATURES = VERSION_1 | EVENT_IDX | MULTIPORT
READY, ADD, PORT_READY, CONSOLE_PORT, RESIZE, OPEN, NAME = 0, 1, 3, 4, 5, 6, 7


class Guest:
    """A driver of the console that knows ports."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.memory = driver, driver.bench.memory
        self.rings = driver.rings
        self.at = driver.end
        self.buffers: dict[tuple[int, int], int] = {}

    def buffer(self, size: int) -> int:
        self.at += size
        return self.at - size

    def give(self, queue: int, size: int = 64) -> None:
        at = self.buffer(size)
        head = self.rings[queue].add([(at, size, True)])
        self.buffers[queue, head] = at
        self.rings[queue].kick()

    def send(self, queue: int, data: bytes) -> int:
        at = self.buffer(len(data))
        self.memory.write(at, data)
        head = self.rings[queue].add([(at, len(data), False)])
        self.rings[queue].kick()
        return head

    def received(self, queue: int) -> list[bytes]:
        return [
            self.memory.read(self.buffers[queue, head], written)
            for head, written in self.rings[queue].take()
        ]

    async def control(self, port: int, event: int, value: int) -> None:
        self.send(3, struct.pack("<IHH", port, event, value))
        await settle()
        assert len(self.rings[3].take()) == 1

    async def told(self) -> list[tuple[int, int, int, bytes]]:
        for _ in range(8):
            self.give(2)
        await settle()
        found = self.received(2)
        self.rings[2].free += []
        return [(*struct.unpack("<IHH", message[:8]), message[8:]) for message in found]


def ports() -> list[Port]:
    return [Port("hvc0", console=True), Port("org.example.0")]


async def test_without_multiport_there_is_the_console_alone() -> None:
    console = Console(*ports(), columns=132, rows=43)
    bench = Bench(console)
    port = console.ports["hvc0"]
    async with bench.running() as driver:
        await driver.start(VERSION_1 | EVENT_IDX | 1)
        guest = Guest(driver)
        assert [bench.read(0x100, 2), bench.read(0x102, 2), bench.read(0x104)] == [132, 43, 2]
        with trio.fail_after(20):
            await port.opened()
        guest.send(1, b"login: ")
        assert await port.receive_some() == b"login: "
        await port.send_all(b"root\n")
        guest.give(0)
        await settle()
        assert guest.received(0) == [b"root\n"]


async def test_ports_are_announced_named_and_opened() -> None:
    console = Console(*ports(), columns=100, rows=50)
    bench = Bench(console)
    async with bench.running() as driver:
        await driver.start(FEATURES)
        guest = Guest(driver)
        assert await guest.told() == []
        await guest.control(0, READY, 1)
        await settle()
        assert [m[:3] for m in guest_messages(guest)] == [(0, ADD, 1), (1, ADD, 1)]
        await guest.control(0, PORT_READY, 1)
        await settle()
        assert guest_messages(guest) == [
            (0, CONSOLE_PORT, 1, b""),
            (0, RESIZE, 0, struct.pack("<HH", 100, 50)),
            (0, NAME, 1, b"hvc0"),
            (0, OPEN, 1, b""),
        ]
        await guest.control(1, PORT_READY, 1)
        await settle()
        assert guest_messages(guest) == [(1, NAME, 1, b"org.example.0"), (1, OPEN, 1, b"")]


def guest_messages(guest: Guest) -> list[tuple[int, int, int, bytes]]:
    found = guest.received(2)
    for _ in found:
        guest.give(2)
    return [(*struct.unpack("<IHH", message[:8]), message[8:]) for message in found]


async def started(bench: Bench, driver: Driver) -> Guest:
    await driver.start(FEATURES)
    guest = Guest(driver)
    for _ in range(8):
        guest.give(2)
    await guest.control(0, READY, 1)
    for number in range(len(bench.model.ports)):
        await guest.control(number, PORT_READY, 1)
        await settle()
        guest_messages(guest)
    await settle()
    guest_messages(guest)
    return guest


async def test_opening_and_closing_are_events_on_both_sides() -> None:
    console = Console(*ports())
    bench = Bench(console)
    port = console.ports["org.example.0"]
    async with bench.running() as driver:
        guest = await started(bench, driver)
        assert not port.is_open
        await port.send_all(b"early")
        guest.give(4)
        await settle()
        assert guest.received(4) == []  # Linux would throw it away
        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.opened)
            await settle()
            await guest.control(1, OPEN, 1)
        await settle()
        assert guest.received(4) == [b"early"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.closed)
            await settle()
            await guest.control(1, OPEN, 0)
        await port.aclose()
        await settle()
        assert guest_messages(guest) == [(1, OPEN, 0, b"")]
        guest.send(5, b"nobody listens")
        await settle()
        assert len(guest.rings[5].take()) == 1
        assert port.lost == 14
        with pytest.raises(trio.ClosedResourceError):
            await port.receive_some()
        with pytest.raises(trio.ClosedResourceError):
            await port.send_all(b"x")


async def test_a_new_size_is_told() -> None:
    console = Console(*ports())
    bench = Bench(console)
    async with bench.running() as driver:
        guest = await started(bench, driver)
        console.resize(200, 60)
        await settle()
        assert guest_messages(guest) == [(0, RESIZE, 0, struct.pack("<HH", 200, 60))]
        assert (bench.read(0x100), bench.read(0x60) & 2) == (60 << 16 | 200, 2)
    old = Console(rows_first=True)
    old.link = bench.device
    old.ports["hvc0"].ready = True
    old.resize(200, 60)
    assert next(iter(old._messages.values()))[8:] == struct.pack("<HH", 60, 200)


async def test_a_port_that_nobody_reads_makes_its_guest_wait_and_no_other() -> None:
    console = Console(Port("a", output_size=100, stall=math.inf), Port("b"))
    bench = Bench(console)
    async with bench.running() as driver:
        guest = await started(bench, driver)
        guest.send(1, b"x" * 60)
        guest.send(1, b"y" * 60)
        guest.send(5, b"other")
        await settle()
        assert len(guest.rings[1].take()) == 1
        assert await console.ports["b"].receive_some() == b"other"
        assert await console.ports["a"].receive_some() == b"x" * 60 + b"y" * 40
        await settle()
        assert len(guest.rings[1].take()) == 1
        assert await console.ports["a"].receive_some() == b"y" * 20
        assert console.ports["a"].lost == 0


async def test_a_console_that_nobody_reads_keeps_the_newest(autojump_clock) -> None:
    console = Console(Port("hvc0", console=True, output_size=100))
    bench = Bench(console)
    port = console.ports["hvc0"]
    async with bench.running() as driver:
        guest = await started(bench, driver)
        data = bytes(range(250))
        guest.send(1, data)
        await trio.sleep(0.9)
        assert len(guest.rings[1].take()) == 0
        await trio.sleep(0.2)
        assert len(guest.rings[1].take()) == 1
        assert port.lost == 150
        assert await port.receive_some(50) == data[150:200]
        assert await port.receive_some() == data[200:]
        guest.send(1, b"z" * 120)
        await trio.sleep(0.5)
        assert await port.receive_some() == b"z" * 100  # it waits again
        await trio.sleep(0.1)
        assert await port.receive_some() == b"z" * 20


async def test_a_ring_of_the_newest_is_there_for_who_comes_late() -> None:
    console = Console(Port("hvc0", console=True, output_size=10, stall=0))
    bench = Bench(console)
    async with bench.running() as driver:
        guest = await started(bench, driver)
        for n in range(5):
            guest.send(1, b"line %d\n" % n)
        await settle()
        assert len(guest.rings[1].take()) == 5
        assert await console.ports["hvc0"].receive_some() == b" 3\nline 4\n"[-10:]


async def test_a_hostile_chain_of_gigabytes_costs_no_memory() -> None:
    console = Console(Port("hvc0", console=True, output_size=64, stall=0))
    bench = Bench(console)
    async with bench.running() as driver:
        guest = await started(bench, driver)
        ring: Ring = guest.rings[1]
        ring.add([(0, 1 << 20, False)] * 16)
        ring.kick()
        with trio.fail_after(20):
            while not ring.take():
                await trio.lowlevel.checkpoint()
        assert len(console.ports["hvc0"].output) <= 64


async def test_a_released_port_gives_and_takes_nothing() -> None:
    """What is under way when the state is saved may go on in another machine."""
    console = Console(*ports())
    bench = Bench(console)
    port = console.ports["hvc0"]
    async with bench.running() as driver, trio.open_nursery() as nursery:
        guest = await started(bench, driver)
        guest.send(1, b"out")
        await settle()
        await bench.device.quiesce()
        await bench.device.release()
        assert port.discard_output() == 0
        nursery.start_soon(port.send_all, b"in")
        await settle()
        state = console.save()["ports"][0][1]
        assert (state["output"], state["input"]) == (b"out", b"")
        await bench.device.acquire()
        await settle()
        assert await port.receive_some() == b"out"
        assert console.save()["ports"][0][1]["input"] == b"in"
        await bench.device.release()
        console.finish()
        assert await port.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await port.send_all(b"x")


async def test_input_is_bounded_and_waits_for_buffers() -> None:
    console = Console(Port("hvc0", console=True, input_size=16))
    bench = Bench(console)
    port = console.ports["hvc0"]
    async with bench.running() as driver:
        guest = await started(bench, driver)
        await guest.control(0, OPEN, 1)
        with trio.move_on_after(0.05):
            await port.send_all(b"0123456789abcdefghij")
        assert port.accepted == 16
        for _ in range(3):
            guest.give(0, 6)
        await settle()
        assert guest.received(0) == [b"012345", b"6789ab", b"cdef"]
        with trio.fail_after(20):
            await port.wait_send_all_might_not_block()
            await port.send_all(b"ghij")


async def test_messages_for_a_driver_that_never_reads_are_bounded() -> None:
    console = Console(*ports())
    bench = Bench(console)
    async with bench.running() as driver:
        await driver.start(FEATURES)
        guest = Guest(driver)
        for _ in range(200):
            guest.at = driver.end
            await guest.control(0, READY, 1)
            await guest.control(1, PORT_READY, 1)
            await guest.control(77, PORT_READY, 1)
            await guest.control(0, 99, 1)
        guest.send(3, b"short")
        await settle()
        assert len(console._messages) == 4


async def test_after_the_end_of_the_guest() -> None:
    console = Console(*ports())
    bench = Bench(console)
    port = console.ports["hvc0"]
    async with bench.running() as driver:
        guest = await started(bench, driver)
        guest.send(1, b"last words")
        await settle()
    bench.device.finish()
    assert await port.receive_some() == b"last words"
    assert await port.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await port.send_all(b"x")
    with pytest.raises(trio.BrokenResourceError):
        await port.opened()
    await port.closed()


async def test_a_half_sent_chain_is_neither_lost_nor_sent_twice() -> None:
    console = Console(Port("a", output_size=100))
    bench = Bench(console)
    async with bench.running() as driver:
        guest = await started(bench, driver)
        data = bytes(range(250))
        guest.send(1, data)
        await settle()
        got = await console.ports["a"].receive_some(30)
        await settle()
        await bench.device.quiesce()
        state = bench.device.save()
        other = Bench(Console(Port("a", output_size=100)), bench.memory)
    other.device.load(state)
    port = other.model.ports["a"]
    async with other.running():
        while len(got) < 250:
            got += await port.receive_some()
    assert got == data


@pytest.mark.parametrize(
    "change",
    [
        {"size": [1]},
        {"size": [1, -1]},
        {"size": (1, 2)},
        {"ports": []},
        {"ports": [["other", {}]]},
        {"ports": [["hvc0", {}]]},
        {"ports": [["hvc0", {**Port("hvc0").save(), "output": bytes(65_537)}]]},
        {"ports": [["hvc0", {**Port("hvc0").save(), "input": bytes(4097)}]]},
        {"messages": [[1, 9, bytes(8)]]},
        {"messages": [[9, 0, bytes(8)]]},
        {"messages": [[1, 0, bytes(7)]]},
        {"messages": [[1, 0, bytes(8)]] * 2},
        {"messages": [[1, 0, bytes(1000)]]},
        {"messages": None},
    ],
    ids=str,
)
def test_states_that_are_none(change: dict[str, object]) -> None:
    console = Console()
    state = console.save()
    with pytest.raises(DeviceError):
        console.load({**state, **change})
    assert console.save() == state


def test_what_cannot_be() -> None:
    for make in (
        lambda: Port(""),
        lambda: Port("x" * 300),
        lambda: Port("a\0b"),
        lambda: Port("a", output_size=0),
        lambda: Port("a", stall=-1),
        lambda: Port("a", stall=math.nan),
        lambda: Console(Port("a"), Port("a")),
        lambda: Console(*[Port(str(n)) for n in range(32)]),
        lambda: Console(columns=-1),
    ):
        with pytest.raises(ConfigError):
            make()
