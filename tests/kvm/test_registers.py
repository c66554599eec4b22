"""The C of the registers that need no handler (registers.h), against plain bytes and lists."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.compiled import compiled

from avmm.kvm.registers import CollectingRegister, ServedRegister, Writes

SIZE = 8
CAPACITY = 3
SOURCE = """
#include "registers.h"
static uint8_t bytes[64];           /* more than it has, for bugs */
static struct avmm_register r;
void make(int whole, int width, int limit)
{
    r = (struct avmm_register){ .bytes = bytes, .size = width ? 3 * width : 8, .whole = whole,
                                .answers = !width, .width = width, .limit = limit };
    memset(bytes, 0, sizeof bytes);
    avmm_register_init(&r);
}
int read_(uint32_t at, uint32_t size, uint64_t *value)
{
    return avmm_register_read(&r, at, size, value);
}
int write_(int how, uint32_t at, uint32_t size, uint64_t value)
{
    return avmm_register_write(&r, how, at, size, value);
}
uint64_t change(uint32_t size, uint64_t kept, uint64_t set)
{
    return avmm_register_change(&r, size, kept, set);
}
void answer(int answers, uint64_t value) { avmm_register_answer(&r, answers, 8, value); }
int push(uint64_t value) { return avmm_register_push(&r, value); }
void limit(uint32_t limit) { avmm_register_limit(&r, limit); }
uint32_t take(uint8_t *to, uint32_t most, int keep)
{
    return avmm_register_take(&r, to, most, keep);
}
void fill(const uint8_t *from, uint32_t count) { avmm_register_fill(&r, from, count); }
"""

Step = tuple[Any, ...]


def u64(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)


class Bytes:
    """What a register of 8 bytes does."""

    def __init__(self, library: Any, whole: bool) -> None:
        self.library, self.whole = library, whole
        self.data, self.answers = bytearray(SIZE), True
        library.make(int(whole), 0, 0)

    def read(self, at: int, size: int) -> bool:
        value = ctypes.c_uint64(2**64 - 1)
        served = self.library.read_(at, size, ctypes.byref(value))
        if not self.answers or (self.whole and size != SIZE):
            return served == 0
        return bool(served) and value.value == int.from_bytes(self.data[at : at + size], "little")

    def write(self, how: int, at: int, size: int, value: int) -> bool:
        served = self.library.write_(how, at, size, u64(value))
        if how == Writes.TO_DEVICE or (self.whole and size != SIZE):
            return served == 0
        for index, byte in enumerate(value.to_bytes(8, "little")[:size]):
            if how == Writes.STORES:
                self.data[at + index] = byte
            elif how == Writes.CLEARS:
                self.data[at + index] &= ~byte
        return bool(served)

    def change(self, kept: int, put: int) -> bool:
        before = int.from_bytes(self.data, "little")
        self.library.change.restype = ctypes.c_uint64
        told = self.library.change(SIZE, u64(kept), u64(put))
        self.data[:] = (before & kept | put).to_bytes(8, "little")
        return bool(told == before)

    def answer(self, answers: bool, value: int) -> bool:
        self.library.answer(int(answers), u64(value))
        self.data[:], self.answers = value.to_bytes(8, "little"), answers
        return True


class Ring:
    """What a ring for three writes does."""

    def __init__(self, library: Any, width: int) -> None:
        self.library, self.width, self.limited = library, width, CAPACITY
        self.held: list[int] = []
        library.make(0, width, CAPACITY)

    def write(self, size: int, value: int) -> bool:
        value &= (1 << 8 * size) - 1
        fits = size == self.width and len(self.held) < self.limited
        if fits:
            self.held.append(value)
        return bool(self.library.write_(Writes.COLLECTS, 0, size, u64(value))) == fits

    def push(self, value: int) -> bool:
        value &= (1 << 8 * self.width) - 1
        fits = len(self.held) < CAPACITY
        if fits:
            self.held.append(value)
        return bool(self.library.push(u64(value))) == fits

    def limit(self, limit: int) -> bool:
        self.limited = limit
        self.library.limit(limit)
        return True

    def fill(self, values: list[int]) -> bool:
        self.held = [value & (1 << 8 * self.width) - 1 for value in values]
        data = b"".join(value.to_bytes(self.width, "little") for value in self.held)
        self.library.fill(data, len(self.held))
        return True

    def take(self, most: int, keep: bool = False) -> bool:
        room = (ctypes.c_uint8 * 64)()  # more than it may use, for bugs
        count = self.library.take(room, most, int(keep))
        expected = self.held[:most]
        if not keep:
            self.held = self.held[most:]
        data = bytes(room)[: count * self.width]
        return data == b"".join(each.to_bytes(self.width, "little") for each in expected)

    def read(self) -> bool:
        return self.library.read_(0, 1, ctypes.byref(ctypes.c_uint64())) == 0


def first_wrong(model: Any, steps: Sequence[Step]) -> Step | None:
    """The first step at which the C does something else than it should."""
    for name, *arguments in steps:
        if not getattr(model, name)(*arguments):
            return (name, *arguments)
    return None


numbers = st.integers(0, (1 << 64) - 1)
places = st.sampled_from([(at, size) for size in (1, 2, 4, 8) for at in range(0, 9 - size)])
hows = st.sampled_from([Writes.TO_DEVICE, Writes.STORES, Writes.IGNORES, Writes.CLEARS])
byte_steps = st.lists(
    st.one_of(
        places.map(lambda place: ("read", *place)),
        st.tuples(hows, places, numbers).map(lambda t: ("write", t[0], *t[1], t[2])),
        st.tuples(st.just("change"), numbers, numbers),
        st.tuples(st.just("answer"), st.booleans(), numbers),
    ),
    max_size=30,
)
ring_steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from((1, 2, 4, 8)), numbers),
        st.tuples(st.just("push"), numbers),
        st.tuples(st.just("limit"), st.integers(0, CAPACITY)),
        st.tuples(st.just("take"), st.integers(0, CAPACITY + 1), st.booleans()),
        st.tuples(st.just("fill"), st.lists(numbers, max_size=CAPACITY)),
        st.just(("read",)),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compiled(tmp_path_factory.mktemp("registers"), SOURCE, "registers.h")


@given(whole=st.booleans(), steps=byte_steps)
def test_bytes(library: Any, whole: bool, steps: list[Step]) -> None:
    assert first_wrong(Bytes(library, whole), steps) is None


@given(width=st.sampled_from((1, 2)), steps=ring_steps)
def test_collected_writes(library: Any, width: int, steps: list[Step]) -> None:
    assert first_wrong(Ring(library, width), steps) is None


SCRIPT: list[Step] = [
    ("write", Writes.STORES, 0, 8, 0x8877_6655_4433_2211),
    ("read", 1, 2),
    ("write", Writes.STORES, 2, 1, 0x99),
    ("read", 0, 8),
    ("write", Writes.CLEARS, 1, 2, 0x0F2A),
    ("read", 0, 8),
    ("write", Writes.IGNORES, 0, 1, 5),
    ("write", Writes.TO_DEVICE, 0, 1, 6),
    ("read", 0, 8),
    ("change", 0xFF00, 0x0F),
    ("read", 0, 8),
    ("answer", False, 3),
    ("read", 0, 8),
    ("answer", True, 4),
    ("read", 0, 8),
]
RING: list[Step] = [
    *(("write", 2, value) for value in (0x1111, 0x2222, 0x3333, 0x4444)),
    ("take", 1),
    ("write", 1, 0x55),
    ("limit", 2),
    ("write", 2, 0x6666),
    ("push", 0x7777),
    ("push", 0x8888),
    ("take", 3),
    ("limit", 3),
    ("write", 2, 0x9999),
    ("take", 4, True),
    ("take", 4),
    ("take", 4),
    ("push", 0xAAAA),
    ("fill", [0xBBBB, 0xCCCC]),
    ("take", 4),
    ("read",),
]


def test_the_scripts_pass(library: Any) -> None:
    for whole in (False, True):
        assert first_wrong(Bytes(library, whole), SCRIPT) is None
    assert first_wrong(Ring(library, 2), RING) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("r->answers && !(r->whole && size != r->size)", "!(r->whole && size != r->size)"),
        ("r->answers && !(r->whole && size != r->size)", "r->answers"),
        ("memcpy(value, r->bytes + at, size);", "memcpy(value, r->bytes, size);"),
        ("    *value = 0;\n", ""),
        ("if (r->whole && size != r->size)\n        return 0;\n    pthread", "pthread"),
        ("memcpy(r->bytes + at, &value, size);", "memcpy(r->bytes + at, &value, 8 - at);"),
        ("r->bytes[at + i] &= ~(value >> 8 * i);", "r->bytes[at + i] &= value >> 8 * i;"),
        ("r->bytes[at + i] &= ~(value >> 8 * i);", "r->bytes[at + i] &= ~value;"),
        ("(before & kept) | set", "before | set"),
        ("r->answers = answers;", ""),
        ("r->count >= limit || ", ""),
        (" || size != r->width", ""),
        ("(r->first + r->count) % capacity", "r->count % capacity"),
        ("(r->first + r->count) % capacity", "(r->first + r->count)"),
        ("collect(r, r->limit, size, value)", "collect(r, 3, size, value)"),
        ("collect(r, r->size / r->width, r->width, value)", "collect(r, r->limit, 2, value)"),
        ("r->first = (r->first + piece) % capacity;", "r->first = 0;"),
        ("r->count -= piece;", "r->count = 0;"),
        ("        piece = piece < most - taken ? piece : most - taken;\n", ""),
        ("    r->limit = limit;\n", ""),
        ("if (keep) {", "if (!keep) {"),
        ("        r->count = count;\n    }", "    }"),
        ("    r->first = 0;\n    r->count = count;", "    r->count = count;"),
        ("    r->first = 0;\n    r->count = count;", "    r->first = 0;"),
    ],
)
def test_a_bug_is_found(tmp_path: Path, old: str, new: str) -> None:
    library = compiled(tmp_path, SOURCE, "registers.h", old, new)
    found = [first_wrong(Bytes(library, whole), SCRIPT) for whole in (False, True)]
    assert any(found) or first_wrong(Ring(library, 2), RING)


def test_two_sides_that_change_bits_at_once_lose_none() -> None:
    register = ServedRegister(8)
    rounds, failed = 20_000, []

    def clear() -> None:
        for _ in range(rounds):
            register.set_bits(1 << 40)
            register.write(Writes.CLEARS, 0, 8, 1 << 40)
            if register.value & 1 << 40:
                failed.append("cleared, and yet set")

    other = threading.Thread(target=clear)
    other.start()
    for _ in range(rounds):
        register.set_bits(2)
        if not register.value & 2:
            failed.append("set, and yet clear")
        register.clear_bits(2)
    other.join()
    assert not failed
    assert register.value == 0


def test_a_part_of_its_bytes() -> None:
    register = ServedRegister(16)
    register.put(b"abc", 3)
    assert register.get(2, 5) == b"\0abc\0"
    assert register.get(13) == b"\0\0\0"
    for at, size in ((-1, 2), (15, 2), (0, 17), (3, -1)):
        with pytest.raises(ValueError, match="16 bytes"):
            register.get(at, size)
    with pytest.raises(ValueError, match="16 bytes"):
        register.put(b"ab", 15)


def test_more_than_eight_bytes_are_no_number() -> None:
    register = ServedRegister(9)
    for use in (
        lambda: register.value,
        lambda: register.set_bits(1),
        lambda: register.clear_bits(1),
        lambda: register.answer(1),
    ):
        with pytest.raises(ValueError, match="9 bytes; a number has at most 8"):
            use()
    assert register.get() == bytes(9)


def test_a_number_that_does_not_fit_is_refused() -> None:
    register = ServedRegister(2)

    def put(number: int) -> None:
        register.value = number

    for use in (put, register.set_bits, register.clear_bits, register.answer):
        for number in (-1, 0x1_0000, 1 << 70):
            with pytest.raises(ValueError, match="does not fit a register of 2 bytes"):
                use(number)
    assert register.value == 0


def test_who_answers_is_saved() -> None:
    register, other = ServedRegister(2, whole=True), ServedRegister(2, whole=True)
    register.answer(None)
    other.load(register.save())
    assert other.read(0, 2) is None
    register.answer(7)
    other.load(register.save())
    assert other.read(0, 2) == 7
    with pytest.raises(ValueError, match="0 bytes; expected 2"):
        ServedRegister(2).load(b"")


def test_what_it_holds_is_saved() -> None:
    ring = CollectingRegister(2, 4)
    for value in (1, 2, 3):
        assert ring.push(value)
    state = ring.save()
    assert ring.take(1) == b"\1\0"
    other = CollectingRegister(2, 4)
    other.push(9)
    other.load(state)
    assert other.take() == b"\1\0\2\0\3\0"
    for wrong in (b"a", bytes(10)):
        with pytest.raises(ValueError, match="4 times 2"):
            other.load(wrong)
    with pytest.raises(ValueError, match="expected 8"):
        ServedRegister(8).load(b"")
