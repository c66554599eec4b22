"""What each exit asks for and where its answer goes, without KVM: `kvm_run` is a file of ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from avmm import arch
from avmm.arch.x86_64.kvm import X86Vcpu
from avmm.bus.space import Bus, mmio, msr, pio
from avmm.devices.base import Device
from avmm.errors import DeviceError, MsrFault, VcpuError
from avmm.kvm import constants
from avmm.outcome import Cause, Outcome
from avmm.vcpu.calls import Answer, Call, serve_call
from avmm.vcpu.exits import Exits

PORT, ADDRESS, MSR, NOBODY = 0x100, 0xD000_0000, 0xC001_0000, 0x500
DATA = 4096
"""Where in `kvm_run` port data lies: on a page of its own, as KVM has it."""
NOISE = b"\xee" * 8


class FakeVcpu(X86Vcpu):
    """The real thing but for its kernel."""

    def __init__(self) -> None:
        fd = os.memfd_create("kvm_run")
        os.ftruncate(fd, 2 * 4096)
        super().__init__(fd, 3, 2 * 4096)

    def regs(self) -> Any:
        return SimpleNamespace(rip=0x1234)


class Fifo(Device):
    """Gives 0, 1, 2, ... and keeps what it gets; answers those numbered `late` when awaited."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.given = 0
        self.late: range = range(0)
        self.waiting = 0

    def read(self, offset: int, size: int) -> Any:
        assert not self.waiting, "called while it was waited for"
        self.given += 1
        return self._answer(self.given - 1, self.given - 1)

    def write(self, offset: int, size: int, value: int) -> Any:
        assert not self.waiting, "called while it was waited for"
        self.got.append(value)
        return self._answer(len(self.got) - 1, None)

    def _answer(self, number: int, value: int | None) -> Any:
        return self._later(value) if number in self.late else value

    async def _later(self, value: int | None) -> int | None:
        self.waiting += 1
        await trio.lowlevel.checkpoint()
        self.waiting -= 1
        return value


class Store(Device):
    """Eight bytes; answers late if so told."""

    def __init__(self) -> None:
        self.data = bytearray(b"abcdefgh")
        self.late = False

    def read(self, offset: int, size: int) -> Any:
        answer = int.from_bytes(self.data[offset : offset + size], "little")
        return self._later(answer) if self.late else answer

    def write(self, offset: int, size: int, value: int) -> Any:
        self.data[offset : offset + size] = value.to_bytes(size, "little")
        return self._later(None) if self.late else None

    async def _later(self, value: int | None) -> int | None:
        await trio.lowlevel.checkpoint()
        return value


class Msrs(Device):
    """Two MSRs, of which the second is always a fault; answers late if so told."""

    def __init__(self) -> None:
        self.value = 0x1122_3344_5566_7788
        self.late = False

    def read(self, offset: int, size: int) -> Any:
        return self._later(offset, self.value) if self.late else self._answer(offset, self.value)

    def write(self, offset: int, size: int, value: int) -> Any:
        self.value = value
        return self._later(offset, None) if self.late else self._answer(offset, None)

    def _answer(self, offset: int, value: int | None) -> int | None:
        if offset >= 8:
            raise MsrFault
        return value

    async def _later(self, offset: int, value: int | None) -> int | None:
        await trio.lowlevel.checkpoint()
        return self._answer(offset, value)


class Board:
    """A vCPU, a device at a port and one at an address, and what the guest's end was."""

    def __init__(self) -> None:
        self.vcpu = FakeVcpu()
        self.page = self.vcpu.page.struct
        self.fifo, self.store = Fifo(), Store()
        self.ends: list[Outcome] = []
        self.msrs = Msrs()
        self.ports, self.addresses = Bus("port", 1 << 16, 0), Bus("address", 1 << 52, 0)
        numbers = Bus("MSR", 1 << 32, 0, unit=8)
        self.ports.add(pio(self.fifo, PORT, 4), nullcontext())
        self.addresses.add(mmio(self.store, ADDRESS, 8), nullcontext())
        numbers.add(msr(self.msrs, MSR, 2), nullcontext())
        self.exits = Exits(
            self.vcpu,
            {"pio": self.ports, "mmio": self.addresses, "msr": numbers},
            arch.host().exit_reasons,
            end=self.ends.append,
            registers=lambda: "  rax=7",
            calls=self._call,
        )
        self.calls: list[Call] = []
        self.answer: Any = 42
        """What each call is answered."""
        self.answers_late = False

    def _call(self, call: Call) -> Any:
        self.calls.append(call)
        return self._answer_late() if self.answers_late else self.answer

    async def _answer_late(self) -> Any:
        await trio.lowlevel.checkpoint()
        return self.answer

    def papr(self) -> Any:
        call = self.page.papr_hcall
        call.nr, call.ret, call.args = 7, 0xEEEE, list(range(100, 109))
        return self.exit(constants.KVM_EXIT_PAPR_HCALL)

    def osi(self) -> Any:
        self.page.osi.gprs = list(range(100, 132))
        return self.exit(constants.KVM_EXIT_OSI)

    def xen(self, cpl: int = 0) -> Any:
        self.page.xen.type = constants.KVM_EXIT_XEN_HCALL
        call = self.page.xen.u.hcall
        call.longmode, call.cpl, call.input, call.result = 1, cpl, 7, 0xEEEE
        call.params = list(range(100, 106))
        return self.exit(constants.KVM_EXIT_XEN)

    def kvm_call(self) -> Any:
        call = self.page.hypercall
        call.nr, call.ret, call.args = 12, 0xEEEE, list(range(100, 106))
        return self.exit(constants.KVM_EXIT_HYPERCALL)

    def exit(self, reason: int) -> Any:
        self.page.exit_reason = reason
        return self.exits.serve(reason)

    def io(self, direction: int, size: int, count: int = 1, port: int = PORT) -> Any:
        io = self.page.io
        io.direction, io.size, io.count = direction, size, count
        io.port, io.data_offset = port, DATA
        return self.exit(constants.KVM_EXIT_IO)

    def out(self, data: bytes, size: int, port: int = PORT) -> Any:
        self.vcpu.page.io_store(DATA, data + NOISE)
        return self.io(constants.KVM_EXIT_IO_OUT, size, len(data) // size, port)

    def inp(self, size: int, count: int = 1, port: int = PORT) -> Any:
        self.vcpu.page.io_store(DATA, NOISE)
        return self.io(constants.KVM_EXIT_IO_IN, size, count, port)

    def mmio_read(self, length: int, address: int = ADDRESS) -> Any:
        mmio = self.page.mmio
        mmio.phys_addr, mmio.len, mmio.is_write, mmio.data = address, length, 0, NOISE
        return self.exit(constants.KVM_EXIT_MMIO)

    def mmio_write(self, data: bytes, address: int = ADDRESS) -> Any:
        mmio = self.page.mmio
        mmio.phys_addr, mmio.len, mmio.is_write = address, len(data), 1
        mmio.data = (data + NOISE)[:8]
        return self.exit(constants.KVM_EXIT_MMIO)

    def rdmsr(self, index: int) -> Any:
        msr = self.page.msr
        msr.index, msr.error, msr.data = index, 1, 0xEEEE
        return self.exit(constants.KVM_EXIT_X86_RDMSR)

    def wrmsr(self, index: int, value: int) -> Any:
        msr = self.page.msr
        msr.index, msr.error, msr.data = index, 1, value
        return self.exit(constants.KVM_EXIT_X86_WRMSR)

    def read(self, length: int) -> bytes:
        """What the guest gets from a port."""
        return self.vcpu.page.io_load(DATA, length)

    def loaded(self, length: int) -> bytes:
        """What the guest gets from an address."""
        return bytes(self.page.mmio.data)[:length]


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.vcpu.close()


# -- ports ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_out_hands_over_so_many_bytes(board: Board, size: int) -> None:
    assert board.out(b"\xa1\xa2\xa3\xa4"[:size], size) is None
    assert board.fifo.got == [0xA4A3A2A1 & (1 << 8 * size) - 1]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_in_is_answered_with_so_many_bytes(board: Board, size: int) -> None:
    board.fifo.given = 0xA4A3A2A1
    assert board.inp(size) is None
    assert board.read(8) == b"\xa1\xa2\xa3\xa4"[:size] + NOISE[size:]


@pytest.mark.parametrize("size", [1, 2, 4])
async def test_a_late_in_is_answered_when_it_has_been_awaited(board: Board, size: int) -> None:
    board.fifo.given = 0xA4A3A2A1
    board.fifo.late = range(1 << 32)
    pending = board.inp(size)
    assert board.read(size) == NOISE[:size]
    await pending
    assert board.read(8) == b"\xa1\xa2\xa3\xa4"[:size] + NOISE[size:]


async def test_a_late_out_is_done_when_it_has_been_awaited(board: Board) -> None:
    board.fifo.late = range(1)
    pending = board.out(b"a", 1)
    assert isinstance(pending, Awaitable)
    assert await pending is None
    assert board.fifo.got == [ord("a")]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_nobodys_port_reads_all_ones(board: Board, size: int) -> None:
    assert board.inp(size, port=NOBODY) is None
    assert board.read(size) == b"\xff" * size
    assert board.out(b"abcd"[:size], size, NOBODY) is None


def test_port_data_is_where_kvm_says(board: Board) -> None:
    board.inp(1)
    board.page.io.data_offset = DATA + 64
    board.exits.serve(constants.KVM_EXIT_IO)
    assert (board.read(1), board.vcpu.page.io_load(DATA + 64, 1)) == (b"\0", b"\1")


# -- strings -------------------------------------------------------------------------------

ELEMENTS = 1024
"""More than KVM hands over at once today: a `rep ins` comes in pieces of 1024 bytes."""

LATE = pytest.mark.parametrize(
    "late",
    [range(0), range(1), range(2, 4), range(ELEMENTS - 1, ELEMENTS), range(0, ELEMENTS, 3)],
    ids=["none", "first", "middle", "last", "every third"],
)


@LATE
@pytest.mark.parametrize(("size", "count"), [(1, 2), (1, ELEMENTS), (2, 512), (4, 256), (4, 3)])
async def test_a_string_out_is_its_elements_in_order(
    board: Board, size: int, count: int, late: range
) -> None:
    board.fifo.late = late
    values = [at * 0x01010103 & (1 << 8 * size) - 1 for at in range(count)]
    pending = board.out(b"".join(value.to_bytes(size, "little") for value in values), size)
    assert (pending is not None) == any(at < count for at in late)
    if pending is not None:
        await pending
    assert board.fifo.got == values


@LATE
@pytest.mark.parametrize(("size", "count"), [(1, 2), (1, 256), (2, 512), (4, 256), (4, ELEMENTS)])
async def test_a_string_in_is_its_elements_in_order(
    board: Board, size: int, count: int, late: range
) -> None:
    board.fifo.late = late
    pending = board.inp(size, count)
    assert (pending is not None) == any(at < count for at in late)
    if pending is not None:
        await pending
    assert board.read(size * count) == b"".join(at.to_bytes(size, "little") for at in range(count))
    assert board.fifo.given == count


async def test_a_string_of_which_each_element_waits_is_no_recursion(board: Board) -> None:
    board.fifo.late = range(ELEMENTS)
    await board.out(bytes(ELEMENTS), 1)
    assert board.fifo.got == [0] * ELEMENTS
    await board.inp(2, ELEMENTS)
    assert board.fifo.given == ELEMENTS


def test_a_string_in_does_not_touch_what_lies_behind_it(board: Board) -> None:
    board.inp(1, 3)
    assert board.read(8) == b"\0\1\2" + NOISE[3:]


def test_strings_at_nobodys_port(board: Board) -> None:
    assert board.inp(2, 3, NOBODY) is None
    assert board.read(6) == b"\xff" * 6
    assert board.out(b"abcdef", 2, NOBODY) is None


def test_elements_that_do_not_fit_the_device_are_split(board: Board) -> None:
    assert board.out(b"abcdefgh", 4, PORT + 2) is None
    assert board.fifo.got == [int.from_bytes(b"ab", "little"), int.from_bytes(b"ef", "little")]


# -- addresses -----------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("length", range(1, 9))
async def test_a_load_of_any_length_is_answered(board: Board, length: int, late: bool) -> None:
    board.store.late = late
    pending = board.mmio_read(length)
    if late:
        assert board.loaded(length) == NOISE[:length]
        await pending
    assert board.loaded(length) == b"abcdefgh"[:length]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("length", range(1, 9))
async def test_a_store_of_any_length_is_handed_over(board: Board, length: int, late: bool) -> None:
    board.store.late = late
    pending = board.mmio_write(b"ABCDEFGH"[:length])
    if late:
        await pending
    assert board.store.data == b"ABCDEFGH"[:length] + b"abcdefgh"[length:]


def test_nobodys_address_reads_all_ones(board: Board) -> None:
    assert board.mmio_read(8, ADDRESS + 8) is None
    assert board.loaded(8) == b"\xff" * 8
    assert board.mmio_write(b"ABCD", ADDRESS + 8) is None


def test_the_address_may_be_any_of_64_bits(board: Board) -> None:
    assert board.mmio_read(4, (1 << 64) - 4) is None
    assert board.loaded(4) == b"\xff" * 4


# -- MSRs ----------------------------------------------------------------------------------


async def finish(pending: Any) -> None:
    if pending is not None:
        await pending


@pytest.mark.parametrize("late", [False, True])
async def test_an_msr_is_read_and_written(board: Board, late: bool) -> None:
    board.msrs.late = late
    await finish(board.rdmsr(MSR))
    assert (board.page.msr.data, board.page.msr.error) == (0x1122_3344_5566_7788, 0)
    await finish(board.wrmsr(MSR, (1 << 64) - 7))
    assert (board.msrs.value, board.page.msr.error) == ((1 << 64) - 7, 0)


@pytest.mark.parametrize("late", [False, True])
async def test_a_fault_of_an_msr_is_the_guests(board: Board, late: bool) -> None:
    board.msrs.late = late
    await finish(board.rdmsr(MSR + 1))
    assert board.page.msr.error == 1
    await finish(board.wrmsr(MSR + 1, 7))
    assert board.page.msr.error == 1


# -- calls ---------------------------------------------------------------------------------

U64 = (1 << 64) - 1
AT_ONCE_OR_LATE = pytest.mark.parametrize("late", [False, True])


@AT_ONCE_OR_LATE
@pytest.mark.parametrize("answer", [42, -3, Answer(-3)])
async def test_a_call_is_answered_by_a_number(board: Board, answer: Any, late: bool) -> None:
    board.answer, board.answers_late = answer, late
    number = (answer.value if isinstance(answer, Answer) else answer) & U64
    await finish(board.kvm_call())
    assert board.page.hypercall.ret == number
    await finish(board.papr())
    assert board.page.papr_hcall.ret == number
    assert list(board.page.papr_hcall.args) == list(range(100, 109))
    await finish(board.osi())
    assert list(board.page.osi.gprs) == [100, 101, 102, number, *range(104, 132)]
    await finish(board.xen())
    assert board.page.xen.u.hcall.result == number
    assert [call.kind for call in board.calls] == ["kvm", "papr", "osi", "xen"]
    assert board.calls[1] == Call("papr", 7, tuple(range(100, 109)))
    assert board.calls[2].number == 105


@AT_ONCE_OR_LATE
@pytest.mark.parametrize("count", [1, 4, 9])
async def test_a_papr_call_may_change_its_arguments(board: Board, count: int, late: bool) -> None:
    board.answers_late = late
    board.answer = Answer(5, tuple(-1 - at for at in range(count)))
    await finish(board.papr())
    changed = [U64 - at for at in range(count)]
    assert list(board.page.papr_hcall.args) == changed + list(range(100 + count, 109))
    assert board.page.papr_hcall.ret == 5


@AT_ONCE_OR_LATE
@pytest.mark.parametrize("count", [2, 32])
async def test_an_osi_call_may_change_all_registers(board: Board, count: int, late: bool) -> None:
    board.answers_late = late
    board.answer = Answer(5, tuple(range(U64 - count, U64)))
    await finish(board.osi())
    expected = [*range(U64 - count, U64), *range(100 + count, 132)]
    expected[3] = 5
    assert list(board.page.osi.gprs) == expected


@AT_ONCE_OR_LATE
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (None, "an int or an Answer that holds one"),
        ("42", "an int or an Answer that holds one"),
        (Answer("42"), "an int or an Answer that holds one"),  # type: ignore[arg-type]
        (Answer(0, [1]), "a tuple of at most 9 args"),  # type: ignore[arg-type]
        (Answer(0, (1,) * 10), "a tuple of at most 9 args"),
        (Answer(0, (1, "2")), "args of 64 bits each"),  # type: ignore[arg-type]
        (Answer(0, (1, 1 << 64)), "args of 64 bits each"),
        (Answer(0, (1, (-1 << 63) - 1)), "args of 64 bits each"),
    ],
)
async def test_an_answer_that_cannot_be_is_named_and_nothing_of_it_written(
    board: Board, answer: Any, expected: str, late: bool
) -> None:
    board.answer, board.answers_late = answer, late
    with pytest.raises(
        DeviceError, match=f"the handler `calls` answered Call.*: expected {expected}"
    ):
        await finish(board.papr())
    assert board.page.papr_hcall.ret == 0xEEEE
    assert list(board.page.papr_hcall.args) == list(range(100, 109))


def test_xen_calls_of_the_guests_user_space_are_refused(board: Board) -> None:
    assert board.xen(cpl=3) is None
    assert board.page.xen.u.hcall.result == U64 + 1 - errno.EPERM
    assert not board.calls


def test_a_call_that_has_nothing_but_a_result_takes_no_more(board: Board) -> None:
    board.answer = Answer(0, (1,))
    with pytest.raises(DeviceError, match="expected a tuple of at most 0 args"):
        board.kvm_call()


def test_a_call_that_nobody_answers_is_refused_as_its_kind_has_it() -> None:
    vcpu = FakeVcpu()
    page = vcpu.page.struct
    page.papr_hcall.args = list(range(9))
    assert serve_call(vcpu.page, constants.KVM_EXIT_PAPR_HCALL, None) is None
    assert page.papr_hcall.ret == U64 - 1
    assert list(page.papr_hcall.args) == list(range(9))
    vcpu.close()


# -- endings -------------------------------------------------------------------------------


def test_a_shutdown_is_a_triple_fault_and_says_where(board: Board) -> None:
    assert board.exit(constants.KVM_EXIT_SHUTDOWN) is None
    assert board.ends == [Outcome(Cause.TRIPLE_FAULT, 134, "at rip 0x1234")]


@pytest.mark.parametrize(
    ("kind", "cause", "status"),
    [("SHUTDOWN", Cause.SHUTDOWN, 0), ("RESET", Cause.RESET, 0), ("CRASH", Cause.CRASH, 134)],
)
def test_a_system_event_ends_the_run(board: Board, kind: str, cause: Cause, status: int) -> None:
    board.page.system_event.type = getattr(constants, f"KVM_SYSTEM_EVENT_{kind}")
    assert board.exit(constants.KVM_EXIT_SYSTEM_EVENT) is None
    assert board.ends == [Outcome(cause, status)]


def test_an_unknown_system_event_is_an_error(board: Board) -> None:
    board.page.system_event.type = 99
    with pytest.raises(VcpuError) as caught:
        board.exit(constants.KVM_EXIT_SYSTEM_EVENT)
    assert str(caught.value) == "vCPU 3: system event 99 at KVM_EXIT_SYSTEM_EVENT\n  rax=7"
    assert not board.ends


def test_an_interrupted_run_asks_for_nothing(board: Board) -> None:
    assert board.exit(constants.KVM_EXIT_INTR) is None
    assert not board.ends


# -- what cannot be served -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (constants.KVM_EXIT_HLT, "KVM_EXIT_HLT"),
        (constants.KVM_EXIT_DEBUG, "KVM_EXIT_DEBUG"),
        (9999, "exit reason 9999"),
    ],
)
def test_an_exit_that_cannot_be_served_is_named_with_the_registers(
    board: Board, reason: int, name: str
) -> None:
    with pytest.raises(VcpuError) as caught:
        board.exit(reason)
    assert str(caught.value) == f"vCPU 3 cannot go on: {name}\n  rax=7"


def test_a_refused_entry_gives_the_hardwares_reason(board: Board) -> None:
    board.page.fail_entry.hardware_entry_failure_reason = 0x8000_0021
    text = "the CPU refused to enter the guest, hardware reason 0x80000021"
    with pytest.raises(VcpuError, match=f"KVM_EXIT_FAIL_ENTRY: {text}\n"):
        board.exit(constants.KVM_EXIT_FAIL_ENTRY)


def test_an_unknown_hardware_exit_gives_its_reason(board: Board) -> None:
    board.page.hw.hardware_exit_reason = 0x55
    with pytest.raises(VcpuError, match="KVM_EXIT_UNKNOWN, hardware exit reason 0x55\n"):
        board.exit(constants.KVM_EXIT_UNKNOWN)


def internal_error(board: Board) -> str:
    with pytest.raises(VcpuError) as caught:
        board.exit(constants.KVM_EXIT_INTERNAL_ERROR)
    prefix, registers, *meaning = str(caught.value).split("\n")
    assert registers == "  rax=7"
    assert bool(meaning) == ("the instruction " in prefix)
    return prefix.removeprefix("vCPU 3 cannot go on: KVM_EXIT_INTERNAL_ERROR, ")


def emulation_failure(board: Board, *, ndata: int, flags: int, size: int, code: bytes) -> str:
    failure = board.page.emulation_failure
    failure.flags, failure.insn_size, failure.insn_bytes = flags, size, code
    board.page.internal.suberror, board.page.internal.ndata = 1, ndata
    return internal_error(board)


HAS_BYTES = constants.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES


@pytest.mark.parametrize(("size", "shown"), [(3, 3), (15, 15), (255, 15)])
def test_an_instruction_that_kvm_cannot_emulate_is_shown(
    board: Board, size: int, shown: int
) -> None:
    code = bytes(range(0xF1, 0x100))
    text = emulation_failure(board, ndata=3, flags=HAS_BYTES, size=size, code=code)
    assert text == f"KVM cannot emulate the instruction {code[:shown].hex(' ')}"


@pytest.mark.parametrize(("ndata", "flags"), [(0, HAS_BYTES), (2, HAS_BYTES), (3, 0), (3, 2)])
def test_an_instruction_that_kvm_does_not_give_is_not_made_up(
    board: Board, ndata: int, flags: int
) -> None:
    text = emulation_failure(board, ndata=ndata, flags=flags, size=3, code=b"\x0f\x01\xc1")
    assert text == "KVM cannot emulate the instruction"


@pytest.mark.parametrize(
    ("ndata", "shown"),
    [(0, "none"), (2, "0x10 0x11"), (1 << 31, " ".join(hex(at) for at in range(16, 32)))],
)
def test_other_internal_errors_give_their_data(board: Board, ndata: int, shown: str) -> None:
    board.page.internal.suberror, board.page.internal.ndata = 3, ndata
    board.page.internal.data = list(range(16, 32))
    assert internal_error(board) == f"suberror 3, data {shown}"


# -- in words ------------------------------------------------------------------------------


def test_accesses_are_described_for_messages(board: Board) -> None:
    board.out(b"a", 1)
    assert board.exits.report() == "KVM_EXIT_IO: out of 1 bytes at port 0x100\n  rax=7"
    board.inp(2, 3)
    assert board.exits.describe() == "KVM_EXIT_IO: in of 2 bytes at port 0x100, 3 times"
    board.mmio_read(5)
    assert board.exits.describe() == "KVM_EXIT_MMIO: read of 5 bytes at 0xd0000000"
    board.mmio_write(b"abc")
    assert board.exits.describe() == "KVM_EXIT_MMIO: write of 3 bytes at 0xd0000000"
    board.rdmsr(MSR)
    assert board.exits.describe() == "KVM_EXIT_X86_RDMSR: MSR 0xc0010000"


def test_who_has_an_access_in_hand_is_said(board: Board) -> None:
    board.out(b"a", 1)
    assert board.exits.owner() == "Fifo at KVM_EXIT_IO: out of 1 bytes at port 0x100"
    board.mmio_read(1)
    assert board.exits.owner() == "Store at KVM_EXIT_MMIO: read of 1 bytes at 0xd0000000"
    board.mmio_read(1, ADDRESS + 8)
    assert board.exits.owner().startswith("no device at ")
    board.rdmsr(MSR + 1)
    assert board.exits.owner() == "Msrs at KVM_EXIT_X86_RDMSR: MSR 0xc0010001"


def test_a_devices_mistake_passes_as_it_is(board: Board) -> None:
    board.addresses.add(mmio(Device(), ADDRESS + 8, 8), nullcontext())
    with pytest.raises(DeviceError, match="Device cannot be read"):
        board.mmio_read(1, ADDRESS + 8)
