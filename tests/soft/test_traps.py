"""The library's traps, each with a guest that falls into it without its cure.

`soft_take_away` takes a cure away. Then the same guest must go wrong: so the test is known to see
what it looks for.
"""

from __future__ import annotations

import errno
import signal
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.soft.bare import ALIAS, CODE, NX_ALIAS, Bare, kicked_by, kvm, load, soft

WHOLE_BLOCKS, PROTECTION, REFUSAL, EARLY_STOP = 1, 2, 4, 8
KICK = signal.SIGUSR2
COUNTER = 0x18_0000
OUT = bytes.fromhex("66baf803 ef")  # mov dx, 0x3f8; out dx, eax


@pytest.fixture(autouse=True)
def _all_cures() -> Iterator[None]:
    load()
    yield
    soft.lib.soft_take_away(0)


@pytest.fixture
def kicks() -> Iterator[None]:
    with kicked_by(KICK):
        yield


def count_under_kicks(times: int) -> tuple[int, int]:
    """What a guest counts in memory while it is stopped all the time, and how often it was."""
    code = b"\xb9" + struct.pack("<I", times) + b"\x48\xbf" + struct.pack("<Q", COUNTER)
    code += bytes.fromhex("ff07 e2fc") + b"\x8b\x07" + OUT  # incl (rdi); loop; mov eax, (rdi)
    stops, thread, done = 0, threading.get_ident(), threading.Event()

    def kick() -> None:
        while not done.wait(0.0002):  # without a pause the guest comes to nothing in between
            signal.pthread_kill(thread, KICK)

    with Bare(code) as guest:
        kicker = threading.Thread(target=kick)
        kicker.start()
        try:
            while (answer := guest.run()) == -errno.EINTR:
                stops += 1
            assert answer == kvm.KVM_EXIT_IO
        finally:
            done.set()
            kicker.join()
        counted = guest.io()[3]
        guest.maps[0][1] = 1  # immediate_exit: it also takes a kick that came too late
        assert guest.run() == -errno.EINTR
        return counted, stops


def test_a_stop_does_no_instruction_twice(kicks: None) -> None:
    count, stops = count_under_kicks(100_000_000)
    assert stops > 20
    assert count == 100_000_000


def test_without_whole_blocks_instructions_are_done_twice(kicks: None) -> None:
    soft.lib.soft_take_away(WHOLE_BLOCKS)
    count, stops = count_under_kicks(10_000_000)
    assert stops > 20
    assert count > 10_000_000


# ---- code that is patched through another address ----

FUNCTION, OTHER, BORDER = 0x11_0000, 0x11_0100, 0x12_0FFD
SPARE = 0x11_0800  # data in the functions' page
SAME = 0


def call(address: int) -> bytes:
    return b"\x48\xbb" + struct.pack("<Q", address) + b"\xff\xd3"


def store(address: int, value: int) -> bytes:
    return b"\x48\xbf" + struct.pack("<Q", address) + b"\xc7\x07" + struct.pack("<I", value)


def returning(value: int) -> bytes:
    return b"\xb8" + struct.pack("<I", value) + b"\xc3"  # mov eax, value; ret


def after_data(alias: int) -> tuple[bytes, list[int]]:
    """The page was written through the alias before."""
    code = call(FUNCTION) + OUT + store(alias + SPARE, 7) + store(alias + SPARE, 8)
    code += store(alias + FUNCTION + 1, 2) + call(FUNCTION) + OUT
    return code, [1, 2]


def one_after_the_other(alias: int) -> tuple[bytes, list[int]]:
    """Two functions in the page: the page still holds code after the first patch."""
    code = store(alias + SPARE, 7) + call(FUNCTION) + OUT + call(OTHER) + OUT
    code += store(alias + FUNCTION + 1, 2) + store(alias + OTHER + 1, 22)
    code += call(FUNCTION) + OUT + call(OTHER) + OUT
    return code, [1, 11, 2, 22]


def over_two_pages(alias: int) -> tuple[bytes, list[int]]:
    """The block's second page is patched."""
    code = store(alias + BORDER + 0x103, 7) + call(BORDER) + OUT
    code += store(alias + BORDER + 3, 0x00C30002) + call(BORDER) + OUT
    return code, [1, 0x20000 | 1]


def run_patched(code: bytes, expected: int) -> list[int]:
    with Bare(code) as guest:
        guest.ram[FUNCTION : FUNCTION + 6] = returning(1)
        guest.ram[OTHER : OTHER + 6] = returning(11)
        guest.ram[BORDER : BORDER + 6] = returning(1)
        values = []
        for _ in range(expected):
            assert guest.run() == kvm.KVM_EXIT_IO
            values.append(guest.io()[3])
        return values


CASES = [after_data, one_after_the_other, over_two_pages]


@pytest.mark.parametrize(
    "alias", [SAME, ALIAS, NX_ALIAS], ids=["same address", "executable", "not executable"]
)
@pytest.mark.parametrize("case", CASES)
def test_patched_code_runs(case, alias) -> None:  # type: ignore[no-untyped-def]
    code, expected = case(alias)
    assert run_patched(code, len(expected)) == expected


@pytest.mark.parametrize("cure", [PROTECTION, REFUSAL])
def test_without_the_cures_old_code_runs(cure: int) -> None:
    soft.lib.soft_take_away(cure)
    wrong = 0
    for case in CASES:
        for alias in (ALIAS, NX_ALIAS):
            code, expected = case(alias)
            wrong += run_patched(code, len(expected)) != expected
    assert wrong


# ---- LOCK ----


def test_lock_is_atomic_between_vcpus() -> None:
    times = 2_000_000
    code = b"\xb9" + struct.pack("<I", times) + b"\x48\xbf" + struct.pack("<Q", COUNTER)
    code += bytes.fromhex("f0ff07 e2fb") + b"\x8b\x07" + OUT
    with Bare(code, cpus=2) as guest:
        answers = []
        threads = [
            threading.Thread(target=lambda cpu=cpu: answers.append(guest.run(cpu)))  # type: ignore[misc]
            for cpu in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [kvm.KVM_EXIT_IO] * 2
        assert max(guest.io(cpu)[3] for cpu in range(2)) == 2 * times
        assert struct.unpack_from("<I", guest.ram, COUNTER) == (2 * times,)


# ---- a stop before the start ----


def stop_before_the_start() -> bool:
    """Is a guest stopped that never ends, by a kick that came before KVM_RUN? If not, another kick
    ends it."""
    with Bare(bytes.fromhex("ebfe")) as guest:
        signal.pthread_kill(threading.get_ident(), KICK)
        rescued = threading.Event()
        thread = threading.get_ident()

        def rescue() -> None:
            rescued.set()
            signal.pthread_kill(thread, KICK)

        timer = threading.Timer(0.5, rescue)
        timer.start()
        assert guest.run() == -errno.EINTR
        timer.cancel()
        timer.join()
        return not rescued.is_set()


def test_a_stop_before_the_start_stops(kicks: None) -> None:
    assert stop_before_the_start()


def test_without_the_cure_it_is_lost(kicks: None) -> None:
    soft.lib.soft_take_away(EARLY_STOP)
    assert not stop_before_the_start()


def test_code_stored_by_the_host_runs() -> None:
    code = call(FUNCTION) + OUT + call(FUNCTION) + OUT
    with Bare(code) as guest:
        guest.ram[FUNCTION : FUNCTION + 6] = returning(1)
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.io()[3] == 1
        guest.ram[FUNCTION : FUNCTION + 6] = returning(2)
        soft.lib.soft_wrote(guest.vm, soft.ffi.cast("void *", guest.address + FUNCTION), 6)
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.io()[3] == 2
        assert CODE
