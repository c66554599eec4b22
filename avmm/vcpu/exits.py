"""What each kind of exit asks for, and where the answer goes.

`Exits.serve` is called after `KVM_RUN` has returned with an exit: in the vCPU's thread, or in its
task if the thread has handed the exit over (`avmm.loop`). If it
returns None, it has written the answer into `kvm_run`. Otherwise it returns an awaitable, which
has written the answer when it is done. The answer takes effect at the next `KVM_RUN`; for what
that means for saved state see `avmm.loop`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Final

from avmm.bus.coalesced import CoalescedWrites
from avmm.bus.space import MASKS, Bus
from avmm.errors import MsrFault, VcpuError
from avmm.kvm import constants, exit_name
from avmm.kvm.exits import (
    FailEntryExit,
    InternalErrorExit,
    MmioExit,
    MsrExit,
    PioExit,
    UnknownExit,
)
from avmm.kvm.vcpu import Vcpu
from avmm.outcome import CRASHED, Cause, Outcome
from avmm.vcpu.calls import KINDS, CallHandler, serve_call

Served = Awaitable[None] | None

_OUT: Final = constants.KVM_EXIT_IO_OUT
_SYSTEM_EVENTS: Final = {
    constants.KVM_SYSTEM_EVENT_SHUTDOWN: Cause.SHUTDOWN,
    constants.KVM_SYSTEM_EVENT_RESET: Cause.RESET,
    constants.KVM_SYSTEM_EVENT_CRASH: Cause.CRASH,
}


class Exits:
    """Serves the exits of one vCPU: accesses go to the buses, endings to `end`.

    `buses` maps the name of each space of the architecture, as in `Placement.space`, to its bus.
    `reasons` are the exits that the architecture has (`KVM_EXIT_*`). `registers` describes the
    vCPU's registers and instruction for error messages. `missing` says what of RAM the host cannot
    provide; a guest that is without it faults through no fault of its own. `interrupted` serves
    the exit that only a deterministic run has: the host is to settle.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        buses: Mapping[str, Bus],
        reasons: Collection[int],
        end: Callable[[Outcome], None],
        registers: Callable[[], str],
        calls: CallHandler | None = None,
        coalesced: CoalescedWrites | None = None,
        missing: Callable[[], str] = str,
        interrupted: Callable[[], Served] = lambda: None,
    ) -> None:
        self._vcpu = vcpu
        self._missing = missing
        self._coalesced = coalesced
        self._delivers = False
        self._page = vcpu.page
        # For spaces that the architecture lacks; it has no exits for them either.
        nowhere = Bus("nowhere", 0)
        self._pio = buses.get("pio", nowhere)
        self._mmio = buses.get("mmio", nowhere)
        self._msrs = buses.get("msr", nowhere)
        self._end = end
        self._registers = registers
        table: dict[int, Callable[[], Served]] = {
            constants.KVM_EXIT_IO: self._serve_pio,
            constants.KVM_EXIT_MMIO: self._serve_mmio,
            constants.KVM_EXIT_X86_RDMSR: self._serve_rdmsr,
            constants.KVM_EXIT_X86_WRMSR: self._serve_wrmsr,
            **{reason: partial(serve_call, self._page, reason, calls) for reason in KINDS},
            constants.KVM_EXIT_SHUTDOWN: self._serve_shutdown,
            constants.KVM_EXIT_SYSTEM_EVENT: self._serve_system_event,
            constants.KVM_EXIT_INTR: interrupted,
        }
        self._table = {reason: table[reason] for reason in reasons}

    def serve(self, reason: int) -> Served:
        """Serve the exit in `kvm_run`. Raises `VcpuError` if it cannot be served."""
        if self._coalesced is not None:
            self._delivers = True
            self._coalesced.deliver()  # the writes that the guest made before
            self._delivers = False
        serve = self._table.get(reason)
        if serve is None:
            raise VcpuError(f"vCPU {self._vcpu.index} cannot go on: {self.report()}")
        return serve()

    def _serve_mmio(self) -> Served:
        address, data, length, is_write = self._page.mmio()
        if is_write:
            return self._mmio.write(address, length, data & MASKS[length])
        answer = self._mmio.read(address, length)
        if not isinstance(answer, int):
            return self._answer_mmio(answer)
        self._page.answer_mmio(answer)
        return None

    async def _answer_mmio(self, answer: Awaitable[int]) -> None:
        self._page.answer_mmio(await answer)

    def _serve_pio(self) -> Served:
        direction, size, port, count, offset = self._page.io()
        if count != 1:
            strings = self._outs if direction == _OUT else self._ins
            return strings(port, size, offset, size * count)
        if direction == _OUT:
            data = self._page.io_load(offset, size)
            return self._pio.write(port, size, int.from_bytes(data, "little"))
        answer = self._pio.read(port, size)
        if not isinstance(answer, int):
            return self._answer_pio(size, offset, answer)
        self._page.io_store(offset, answer.to_bytes(size, "little"))
        return None

    async def _answer_pio(self, size: int, offset: int, answer: Awaitable[int]) -> None:
        self._page.io_store(offset, (await answer).to_bytes(size, "little"))

    def _outs(self, port: int, size: int, offset: int, length: int) -> Served:
        """`rep outs`: the same port once for each element, in order."""
        data = self._page.io_load(offset, length)
        for at in range(0, length, size):
            pending = self._pio.write(port, size, _number(data, at, size))
            if pending is not None:
                return self._outs_rest(port, size, data, at, pending)
        return None

    async def _outs_rest(
        self, port: int, size: int, data: bytes, done: int, first: Awaitable[None]
    ) -> None:
        await first
        for at in range(done + size, len(data), size):
            pending = self._pio.write(port, size, _number(data, at, size))
            if pending is not None:
                await pending

    def _ins(self, port: int, size: int, offset: int, length: int) -> Served:
        """`rep ins`: the kernel asks for up to a page of elements at once."""
        data = bytearray()
        while len(data) < length:
            answer = self._pio.read(port, size)
            if not isinstance(answer, int):
                return self._ins_rest(port, size, offset, length, data, answer)
            data += answer.to_bytes(size, "little")
        self._page.io_store(offset, data)
        return None

    async def _ins_rest(
        self,
        port: int,
        size: int,
        offset: int,
        length: int,
        data: bytearray,
        first: Awaitable[int],
    ) -> None:
        data += (await first).to_bytes(size, "little")
        while len(data) < length:
            answer = self._pio.read(port, size)
            data += (answer if isinstance(answer, int) else await answer).to_bytes(size, "little")
        self._page.io_store(offset, data)

    def _serve_rdmsr(self) -> Served:
        try:
            answer = self._msrs.read(8 * self._page.msr().number, 8)
        except MsrFault:
            self._page.refuse_msr()
            return None
        if not isinstance(answer, int):
            return self._answer_msr(answer)
        self._page.answer_msr(answer)
        return None

    def _serve_wrmsr(self) -> Served:
        number, data = self._page.msr()
        try:
            pending = self._msrs.write(8 * number, 8, data)
        except MsrFault:
            self._page.refuse_msr()
            return None
        if pending is not None:
            return self._answer_msr(pending)
        self._page.answer_msr()
        return None

    async def _answer_msr(self, answer: Awaitable[int | None]) -> None:
        try:
            self._page.answer_msr(await answer)
        except MsrFault:
            self._page.refuse_msr()

    def _serve_shutdown(self) -> Served:
        if missing := self._missing():
            raise VcpuError(f"the host cannot provide the guest's memory: {missing}")
        self._end(Outcome(Cause.TRIPLE_FAULT, CRASHED, f"at rip {self._vcpu.pc():#x}"))
        return None

    def _serve_system_event(self) -> Served:
        kind = self._page.system_event().kind
        cause = _SYSTEM_EVENTS.get(kind)
        if cause is None:
            raise VcpuError(f"vCPU {self._vcpu.index}: system event {kind} at {self.report()}")
        self._end(Outcome(cause, status=CRASHED if cause is Cause.CRASH else 0))
        return None

    def report(self) -> str:
        """`describe`, with registers and the instruction on lines of their own."""
        text = f"{self.describe()}\n{self._registers()}"
        match self._page.exit():
            case InternalErrorExit(instruction=instruction) if instruction:
                return f"{text}\n{_REFUSED}"
        return text

    def owner(self) -> str:
        """In words: the access in `kvm_run` and the device that has to answer it, or the device
        that must first get a coalesced write."""
        if self._delivers and self._coalesced is not None and (late := self._coalesced.late()):
            return f"{late}, before {self.describe()}"
        match self._page.exit():
            case PioExit(size=size, port=port):
                owner = self._pio.owner(port, size)
            case MmioExit(address=address, length=length):
                owner = self._mmio.owner(address, length)
            case MsrExit(number=number):
                owner = self._msrs.owner(8 * number)
            case _:
                owner = "the handler `calls`"
        return f"{owner} at {self.describe()}"

    def describe(self) -> str:
        """The exit that `kvm_run` holds, in words, for messages."""
        name = exit_name(self._page.exit_reason)
        match self._page.exit():
            case PioExit(is_output, size, port, times):
                more = f", {times} times" if times != 1 else ""
                way = "out" if is_output else "in"
                return f"{name}: {way} of {size} bytes at port {port:#x}{more}"
            case MmioExit(address, length, is_write):
                way = "write" if is_write else "read"
                return f"{name}: {way} of {length} bytes at {address:#x}"
            case MsrExit(number=number):
                return f"{name}: MSR {number:#x}"
            case InternalErrorExit() as error:
                return f"{name}, {_internal_error(error)}"
            case FailEntryExit(why):
                return f"{name}: the CPU refused to enter the guest, hardware reason {why:#x}"
            case UnknownExit(why):
                return f"{name}, hardware exit reason {why:#x}"
        return name


_REFUSED: Final = (
    "  KVM's emulator does not support this instruction. An ordinary KVM emulates only\n"
    "  instructions that access devices. A KVM that interprets ring 0 (see `avmm doctor`)\n"
    "  emulates all that a kernel does: there, run the guest on the software engine\n"
    "  (`--engine soft`), or build its kernel without this instruction."
)


def _internal_error(error: InternalErrorExit) -> str:
    if error.suberror != constants.KVM_INTERNAL_ERROR_EMULATION:
        data = " ".join(f"{word:#x}" for word in error.data)
        return f"suberror {error.suberror}, data {data or 'none'}"
    return f"KVM cannot emulate the instruction {error.instruction.hex(' ')}".rstrip()


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _nothing() -> Served:
    return None
