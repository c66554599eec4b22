"""Virtqueues: chains out and back, notifications both ways, every rule a guest may break."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.virtio_driver import INDIRECT, NEXT, WRITE, Ring

import avmm
from avmm.devices.virtio.queue import Chain, QueueError, Virtqueue
from avmm.errors import DeviceError
from avmm.memory.ram import GuestMemory

RAM = 1 << 20
SIZE = 8


class Fixture:
    def __init__(self, memory: GuestMemory, *, event_idx: bool = True, size: int = SIZE) -> None:
        self.memory = memory
        self.ring = Ring(self, 0, size, 0x1000, event_idx)  # a Ring looks only at `.memory`
        self.memory.write(self.ring.desc, bytes(self.ring.end - self.ring.desc))
        self.queue = Virtqueue(memory, size)
        self.queue.desc, self.queue.driver = self.ring.desc, self.ring.avail
        self.queue.device = self.ring.used
        self.queue.start(event_idx=event_idx, indirect=True)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(RAM)
    yield memory
    memory.close()


@pytest.fixture(params=[True, False], ids=["event_idx", "flags"])
def fix(request: pytest.FixtureRequest, memory: GuestMemory) -> Iterator[Fixture]:
    fix = Fixture(memory, event_idx=request.param)
    yield fix
    fix.queue.reset()


def table(memory: GuestMemory, at: int, *rows: tuple[int, int, int, int]) -> None:
    memory.write(at, b"".join(struct.pack("<QIHH", *row) for row in rows))


def test_chains_that_the_guest_is_to_see_together(fix: Fixture) -> None:
    for _ in range(3):
        fix.ring.add([(0x8000, 8, True)])
    chains = [fix.queue.pop() for _ in range(3)]
    for chain in chains[:2]:
        fix.queue.stage(chain, 8)
        assert fix.ring.take() == []
    fix.queue.push(chains[2], 4)
    assert fix.ring.take() == [(0, 8), (1, 8), (2, 4)]
    assert fix.queue.wants_interrupt()


def test_a_chain_is_the_guests_memory_itself(fix: Fixture) -> None:
    fix.memory.write(0x8000, b"hello, ")
    fix.memory.write(0x9000, b"world")
    fix.ring.add([(0x8000, 7, False), (0x9000, 5, False), (0xA000, 3, True), (0xB000, 9, True)])
    chain = fix.queue.pop()
    assert [bytes(part) for part in chain.readable] == [b"hello, ", b"world"]
    assert chain.put(b"abcdef") == 6
    assert (fix.memory.read(0xA000, 3), fix.memory.read(0xB000, 4)) == (b"abc", b"def\0")
    assert fix.queue.pop() is None
    fix.queue.push(chain, 6)
    assert fix.ring.take() == [(0, 6)]
    assert fix.queue.in_flight == 0


def test_chains_come_back_in_any_order_and_the_ring_goes_round(fix: Fixture) -> None:
    for _ in range(20):
        heads = [fix.ring.add([(0x8000, 1, True)]) for _ in range(SIZE)]
        chains = [fix.queue.pop() for _ in heads]
        assert [chain.head for chain in chains] == heads
        for chain in reversed(chains):
            fix.queue.push(chain, 1)
        assert fix.ring.take() == [(head, 1) for head in reversed(heads)]


@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | WRITE])  # 2.7.5.3.2: ignored there
def test_an_indirect_table(fix: Fixture, flags: int) -> None:
    rows = [(0x8000 + 16 * n, 16, NEXT, n + 1) for n in range(19)]
    table(fix.memory, 0x4000, *rows, (0x9000, 16, WRITE, 0))
    fix.ring.describe(0, 0x7000, 4, NEXT, 3)
    fix.ring.describe(3, 0x4000, 16 * 20, flags, 0)
    fix.ring.offer(0)
    chain = fix.queue.pop()
    assert (len(chain.readable), len(chain.writable)) == (20, 1)  # longer than the queue


def test_zero_bytes_are_no_part(fix: Fixture) -> None:
    fix.ring.add([(1 << 63, 0, False), (0x8000, 4, False), (1 << 63, 0, True)])
    chain = fix.queue.pop()
    assert (chain.readable_bytes, chain.writable_bytes) == (4, 0)


def test_ram_on_both_sides_of_the_hole() -> None:
    """Two regions, without the gigabytes: the table of regions is what counts."""
    memory = GuestMemory(RAM)
    memory.table.struct.regions[0].size = RAM // 2
    memory.table.add(1 << 32, RAM // 2, RAM // 2, memory.whole[RAM // 2 :])
    fix = Fixture(memory)
    fix.ring.add([(0x8000, 4, False), (1 << 32, 4, True), ((1 << 32) + RAM // 2 - 1, 1, True)])
    chain = fix.queue.pop()
    chain.put(b"abcde")
    assert memory.read(RAM // 2, 4) == b"abcd"
    assert memory.read(RAM - 1, 1) == b"e"
    for address, length in ((RAM // 2 - 1, 2), ((1 << 32) - 1, 2), ((1 << 32) + RAM // 2, 1)):
        fix.ring.describe(7, address, length, 0, 0)
        fix.ring.offer(7)
        with pytest.raises(QueueError, match="outside of RAM"):
            fix.queue.pop()
        fix.ring.added -= 1
    chain.release()
    del chain
    memory.close()


def bad_next(fix: Fixture) -> None:
    fix.ring.describe(0, 0x8000, 4, NEXT, SIZE)
    fix.ring.offer(0)


def circle(fix: Fixture) -> None:
    fix.ring.describe(0, 0x8000, 4, NEXT, 1)
    fix.ring.describe(1, 0x8000, 4, NEXT, 0)
    fix.ring.offer(0)


def one_that_follows_itself_in_a_table(fix: Fixture) -> None:
    table(fix.memory, 0x4000, (0x8000, 1, NEXT, 1), (0x8000, 1, NEXT, 0))
    fix.ring.describe(0, 0x4000, 32, INDIRECT, 0)
    fix.ring.offer(0)


def ahead(fix: Fixture) -> None:
    fix.ring.set16(fix.ring.avail + 2, SIZE + 1)


def behind(fix: Fixture) -> None:
    fix.ring.set16(fix.ring.avail + 2, -1)


def head(fix: Fixture) -> None:
    fix.ring.offer(SIZE)


def readable_after_writable(fix: Fixture) -> None:
    fix.ring.add([(0x8000, 4, True), (0x8000, 4, False)])


def outside(fix: Fixture) -> None:
    fix.ring.add([(RAM - 3, 4, False)])


def wraps(fix: Fixture) -> None:
    fix.ring.add([((1 << 64) - 2, 4, False)])


def too_long(fix: Fixture) -> None:
    for n in range(2):
        fix.ring.describe(n, 0, 0, 0, 0)
    table(fix.memory, 0x4000, *[(0, RAM, NEXT, n + 1) for n in range(4096)])
    fix.ring.describe(0, 0x4000, 16 * 4096, INDIRECT, 0)
    fix.ring.offer(0)


def nested(fix: Fixture) -> None:
    table(fix.memory, 0x4000, (0x4000, 16, INDIRECT, 0))
    fix.ring.describe(0, 0x4000, 16, INDIRECT, 0)
    fix.ring.offer(0)


def indirect_and_next(fix: Fixture) -> None:
    table(fix.memory, 0x4000, (0x8000, 16, 0, 0))
    fix.ring.describe(0, 0x4000, 16, INDIRECT | NEXT, 1)
    fix.ring.offer(0)


def table_of_no_length(fix: Fixture) -> None:
    fix.ring.describe(0, 0x4000, 0, INDIRECT, 0)
    fix.ring.offer(0)


def half_an_entry(fix: Fixture) -> None:
    fix.ring.describe(0, 0x4000, 24, INDIRECT, 0)
    fix.ring.offer(0)


def table_outside(fix: Fixture) -> None:
    fix.ring.describe(0, RAM - 16, 32, INDIRECT, 0)
    fix.ring.offer(0)


def twice(fix: Fixture) -> None:
    fix.ring.add([(0x8000, 4, False)])
    fix.queue.pop()
    fix.ring.offer(0)


def more_than_4_gib(fix: Fixture) -> None:
    table(fix.memory, 0x4000, *[(0, RAM, NEXT, n + 1) for n in range(1023)], (0, RAM, 0, 0))
    fix.memory.write(0x4000 + 16 * 1023 + 8, struct.pack("<I", 0xFFFF_FFFF))
    fix.ring.describe(0, 0, RAM, NEXT, 1)
    fix.ring.describe(1, 0x4000, 16 * 1024, INDIRECT, 0)
    fix.ring.offer(0)


BROKEN = {
    bad_next: "beyond its table",
    circle: "circle",
    one_that_follows_itself_in_a_table: "circle",
    ahead: "further ahead",
    behind: "further ahead",
    head: "beyond its table",
    readable_after_writable: "readable descriptor",
    outside: "outside",
    wraps: "outside",
    too_long: "invalid length",
    nested: "indirect",
    indirect_and_next: "indirect",
    table_of_no_length: "invalid length",
    half_an_entry: "invalid length",
    table_outside: "outside",
    twice: "in use",
    more_than_4_gib: "4 GiB",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_broken_rule_is_told_by_name(fix: Fixture, breaks) -> None:
    breaks(fix)
    with pytest.raises(QueueError, match=BROKEN[breaks]):
        fix.queue.pop()


def test_indirect_tables_must_have_been_negotiated(memory: GuestMemory) -> None:
    fix = Fixture(memory)
    fix.queue._ring.struct.indirect = 0
    fix.ring.describe(0, 0x4000, 16, INDIRECT, 0)
    fix.ring.offer(0)
    with pytest.raises(QueueError, match="not negotiated"):
        fix.queue.pop()


@pytest.mark.parametrize(
    "change",
    [
        {"size": 3},
        {"size": 0},
        {"size": 16},
        {"size": 1 << 31},
        {"desc": 8},
        {"driver": 1},
        {"device": 2},
        {"desc": RAM - 16},
        {"driver": RAM - 4},
        {"device": RAM},
        {"device": (1 << 64) - 4},
    ],
    ids=str,
)
def test_a_queue_that_cannot_be(memory: GuestMemory, change: dict[str, int]) -> None:
    queue = Virtqueue(memory, SIZE)
    for name, value in change.items():
        setattr(queue, name, value)
    with pytest.raises(QueueError):
        queue.start(event_idx=True, indirect=True)
    assert queue.pop() is None


def test_interrupts_only_where_the_guest_wants_them(memory: GuestMemory) -> None:
    fix = Fixture(memory)
    for _ in range(4):
        fix.ring.add([(0x8000, 4, True)])

    def pushed() -> bool:
        fix.queue.push(fix.queue.pop(), 0)
        return fix.queue.wants_interrupt()

    assert pushed()  # the first always
    assert not pushed()  # used_event is still 0
    fix.ring.set16(fix.ring.avail + 4 + 2 * SIZE, 3)  # "when the fourth comes back"
    assert not pushed()
    assert pushed()


def test_interrupts_without_event_idx(memory: GuestMemory) -> None:
    fix = Fixture(memory, event_idx=False)
    fix.ring.add([(0x8000, 4, True)])
    fix.queue.push(fix.queue.pop(), 0)
    fix.ring.set16(fix.ring.avail, 1)
    assert not fix.queue.wants_interrupt()
    fix.ring.set16(fix.ring.avail, 0)
    assert fix.queue.wants_interrupt()


def test_the_guest_notifies_only_who_listens(fix: Fixture) -> None:
    assert not fix.queue.listen()
    fix.ring.add([(0x8000, 4, True)])
    assert fix.ring.wants_kick()
    assert fix.queue.listen()  # there is something already
    fix.queue.ignore()
    fix.queue.pop()
    fix.ring.add([(0x8000, 4, True)])
    fix.ring.add([(0x8000, 4, True)])
    fix.ring.kicked = 1
    assert not fix.ring.event_idx or fix.ring.u16(fix.ring.used + 4 + 8 * SIZE) == 0
    if not fix.ring.event_idx:
        assert not fix.ring.wants_kick()


def test_what_was_in_flight_comes_again_in_its_order(fix: Fixture) -> None:
    heads = [fix.ring.add([(0x8000 + n, 1, False)]) for n in range(4)]
    chains = [fix.queue.pop() for _ in range(3)]
    chains[1].done = 17
    fix.queue.push(chains[0], 0)
    fix.queue.hold()
    fix.queue.push(chains[1], 0)  # too late: does nothing
    with pytest.raises(ValueError, match="released"):
        bytes(chains[1].readable[0])
    assert fix.queue.listen()
    state = fix.queue.save()
    again = Virtqueue(fix.memory, SIZE)
    again.load(state)
    assert again.save() == state
    again.start(event_idx=fix.ring.event_idx, indirect=True)
    found = [again.pop() for _ in range(3)]
    assert [chain.head for chain in found] == heads[1:]
    assert [chain.done for chain in found] == [17, 0, 0]
    assert again.pop() is None
    for chain in found:
        again.push(chain, 0)
    assert [head for head, _ in fix.ring.take()] == heads


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1},
        {"ready": 1},
        {"next_avail": 1 << 16},
        {"in_flight": None},
        {"in_flight": [[0, 0]] * 2},
        {"in_flight": [[n, 0] for n in range(SIZE + 1)]},
        {"in_flight": [(0, 0)]},
        {"in_flight": [[0, 1 << 32]]},
        {"in_flight": [[0, True]]},
        {"in_flight": [[0]]},
        {"more": 1},
    ],
    ids=str,
)
def test_states_that_are_none(memory: GuestMemory, change: dict[str, object]) -> None:
    queue = Virtqueue(memory, SIZE)
    state = queue.save()
    with pytest.raises(DeviceError, match="virtqueue"):
        queue.load({**state, **change})
    assert queue.save() == state


def test_after_the_memory_is_closed_nothing_is_touched() -> None:
    memory = GuestMemory(RAM)
    fix = Fixture(memory)
    fix.ring.add([(0x8000, 4, True)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a queue keeps no memory mapped
        memory.close()
    with pytest.raises(QueueError):
        fix.queue.pop()


def test_cutting_chains() -> None:
    data = bytearray(b"abcdefghij")
    view = memoryview(data)

    def chain() -> Chain:
        return Chain(0, [view[:3], view[3:4], view[4:]], [view[:3], view[3:4], view[4:]])

    for count in range(12):
        it = chain()
        assert it.take(count) == data[:count]
        assert b"".join(it.readable) == data[count:]
        it = chain()
        it.skip(count)
        assert b"".join(it.readable) == data[count:]
        assert b"".join(it.cut_writable(count)) == data[:count]
        assert b"".join(it.writable) == data[count:]
        it = chain()
        assert b"".join(it.cut_last_writable(count)) == data[max(0, 10 - count) :]
        assert b"".join(it.writable) == data[: max(0, 10 - count)]
    assert chain().put(b"0123456789XX") == 10
    assert data == b"0123456789"


ADDRESSES = st.one_of(
    st.integers(0, 0x3000),
    st.sampled_from([0x1000, 0x4000, RAM - 16, RAM - 1, RAM, (1 << 64) - 1, 1 << 32]),
)
LENGTHS = st.one_of(st.integers(0, 64), st.sampled_from([16, 32, 128, RAM, (1 << 32) - 1]))
DESCRIPTORS = st.tuples(ADDRESSES, LENGTHS, st.integers(0, 7), st.integers(0, SIZE + 1))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE),
    st.lists(DESCRIPTORS, min_size=8, max_size=8),
    st.lists(st.integers(0, SIZE + 1), min_size=SIZE, max_size=SIZE),
    st.integers(0, SIZE + 2),
    st.booleans(),
)
def test_whatever_is_in_a_ring_stays_in_ram(direct, indirect, heads, count, event_idx) -> None:
    """Chains of garbage either are refused or lie in RAM, all of them."""
    memory = GuestMemory(0x10_0000)
    try:
        fix = Fixture(memory, event_idx=event_idx)
        table(memory, fix.ring.desc, *direct)
        table(memory, 0x4000, *indirect)
        memory.write(fix.ring.avail + 4, struct.pack(f"<{SIZE}H", *heads))
        fix.ring.set16(fix.ring.avail + 2, count)
        try:
            while (chain := fix.queue.pop()) is not None:
                total = chain.readable_bytes + chain.writable_bytes
                assert total < 1 << 32
                chain.put(b"x" * 64)  # may well hit the ring itself
                fix.queue.push(chain, 0)
                fix.queue.wants_interrupt()
                fix.queue.listen()
                del chain
        except QueueError:
            pass
        fix.queue.reset()
        del fix
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            memory.close()


def compiled(name: str, folder: Path) -> Path:
    program = folder / name
    source = Path(__file__).parents[2] / "support" / f"{name}.c"
    header = Path(avmm.__file__).parent / "native"
    command = ["cc", "-O2", "-std=gnu11", "-pthread", f"-I{header}", "-o", str(program)]
    subprocess.run([*command, str(source)], check=True)
    return program


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("vring_stress", tmp_path_factory.mktemp("stress"))


@pytest.mark.parametrize("event_idx", ["1", "0"], ids=["event_idx", "flags"])
@pytest.mark.parametrize(
    "chains",
    # Each chain may cost a sleep on either side: what a switch costs here decides how long it is.
    ["200000", pytest.param("1000000", marks=[pytest.mark.slow, pytest.mark.timeout(300)])],
)
def test_no_notification_is_lost_between_two_threads(
    stress: Path, chains: str, event_idx: str
) -> None:
    done = subprocess.run(
        [stress, chains, event_idx], capture_output=True, text=True, timeout=290, check=False
    )
    assert done.stdout == "ok\n"


def test_several_threads_give_chains_back(tmp_path: Path) -> None:
    program = compiled("vring_givers", tmp_path)
    command = [program, "100000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    assert done.stdout == "ok\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    near, far = os.pipe()
    os.set_blocking(far, False)
    yield near, far
    os.close(near)
    os.close(far)


def test_chains_are_sent_until_the_sink_is_full(fix: Fixture, pipe: tuple[int, int]) -> None:
    near, far = pipe
    fcntl.fcntl(far, fcntl.F_SETPIPE_SZ, 4096)
    fix.memory.write(0x8000, b"a" * 1000 + b"b" * 2000 + b"c" * 5000)
    fix.ring.add([(0x8000, 1000, False), (0x8000 + 1000, 2000, False), (0xF000, 9, True)])
    fix.ring.add([(0xF000, 0, False)])
    assert fix.queue.send(far, False, 1 << 20) == (2, None)
    assert fix.ring.take() == [(0, 0), (3, 0)]
    assert os.read(near, 9999) == b"a" * 1000 + b"b" * 2000
    fix.ring.add([(0x8000 + 3000, 5000, False)])
    fix.ring.add([(0x8000, 1, False)])
    pushed, chain = fix.queue.send(far, False, 1 << 20)
    assert (pushed, fix.queue.in_flight) == (0, 1)
    assert (chain.head, chain.done, chain.readable_bytes) == (4, 4096, 5000)
    assert fix.ring.take() == []
    fix.queue.hold()
    assert fix.queue.send(far, False, 1 << 20)[1].done == 4096


def test_a_call_sends_about_what_it_may(fix: Fixture, pipe: tuple[int, int]) -> None:
    near, far = pipe
    for _ in range(4):
        fix.ring.add([(0x8000, 1000, False)])
    assert fix.queue.send(far, False, 1500) == (2, None)
    pushed, chain = fix.queue.send(far, False, 900)
    assert (pushed, chain.done) == (0, 900)
    assert len(os.read(near, 9999)) == 2900


def test_a_sink_that_fails_takes_nothing(fix: Fixture) -> None:
    near, far = os.pipe()
    os.close(near)
    fix.ring.add([(0x8000, 1000, False)])
    assert fix.queue.send(far, False, 1500)[1].done == 0
    os.close(far)


def test_memory_beyond_the_hole_is_sent(fix: Fixture, pipe: tuple[int, int]) -> None:
    near, far = pipe
    fix.memory.table.struct.regions[0].size = 0x1_0000
    with fix.memory.whole[0x2_0000:0x2_1000] as beyond:
        fix.memory.table.add(1 << 32, 0x1000, 0x2_0000, beyond)
        beyond[:4] = b"high"
    fix.memory.write(0x8000, b"low ")
    fix.ring.add([(0x8000, 4, False), (1 << 32, 4, False)])
    assert fix.queue.send(far, False, 1 << 20) == (1, None)
    assert os.read(near, 99) == b"low high"


def test_a_guest_that_refills_meanwhile_holds_no_call(memory: GuestMemory) -> None:
    """A thread gives back at once what the device has used, and the sink takes it in no time."""
    size = 1024
    fix = Fixture(memory, size=size)
    for index in range(size):
        fix.ring.describe(index, 0x8000, 1, 0, 0)
        fix.ring.set16(fix.ring.avail + 4 + 2 * index, index)
    words = memory.whole.cast("H")
    avail, used = (fix.ring.avail + 2) // 2, (fix.ring.used + 2) // 2
    words[avail] = size
    ended = False

    def refill() -> None:
        while not ended:
            words[avail] = words[used] + size & 0xFFFF

    null = os.open(os.devnull, os.O_WRONLY)
    guest = threading.Thread(target=refill)
    guest.start()
    try:
        assert max(fix.queue.send(null, False, 1 << 30)[0] for _ in range(20)) == size
    finally:
        ended = True
        guest.join()
        os.close(null)
        words.release()
        fix.queue.reset()
