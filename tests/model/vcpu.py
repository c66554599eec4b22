"""The model vCPU: KVM's side of the completion contract, as field notes 1 and 2 have it.

It has the face of `avmm.kvm.Vcpu`, as far as loop, exits and completion know it. What it does
as the kernel does:

- `run` first finishes the operation that is pending, which may exit again, and only then looks
  at `immediate_exit`, which it samples once (early or late, see `Host`);
- what is pending is a Python generator: it is in no register, so `state` cannot show it, and a
  state that is saved too early loses or repeats exactly what the measured table says;
- a kick counts only while `run` is inside: before, it is taken by the signal's handler, which
  does nothing. What closes that gap is `immediate_exit`, or nothing does.

At each moment at which something may happen elsewhere it calls `gate`, so that a test can have
it happen there.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from avmm.kvm import RunPage, constants
from avmm.vcpu.completion import NEEDS_COMPLETION

MASK: Final = (1 << 64) - 1
PORT, PORTS = 0x100, 0x40
"""Where vCPU 0's ports begin, and how many each has."""
ADDRESS, ADDRESSES = 0xD000_0000, 0x2000
MSR, MSRS = 0x4000_0000, 0x10
UNKNOWN_EXIT: Final = 9999
"""An exit that no avmm knows, and that needs completion."""
NOISE: Final = 0xEEEE_EEEE_EEEE_EEEE
"""What lies where nobody has written an answer."""


class Broken(AssertionError):
    """A property does not hold: what the tests look for."""


def mix(*numbers: int) -> int:
    """A number that depends on all of these, and on their order."""
    value = 0x9E37_79B9
    for number in numbers:
        value = (value ^ number) * 0x5851_F42D_4C95_7F2D + 0x1405_7B7E_F767_814F & MASK
        value ^= value >> 29
    return value


@dataclass(frozen=True, slots=True)
class Op:
    """An instruction of the guest.

    `parts` are the fragments in which an MMIO access leaves the guest, `count` is elements of a
    string, steps of a computation, or spurious wake-ups of a waiting AP.
    """

    kind: str
    size: int = 1
    at: int = 0
    count: int = 1
    parts: tuple[int, ...] = ()


@dataclass(slots=True)
class State:
    """The architectural state: all that user space can read of a vCPU."""

    pc: int = 0
    count: int = 0
    """rcx, of a string instruction; for computing and waiting, what is left of it."""
    checksum: int = 0
    interrupts: tuple[int, ...] = ()
    """Pending ones."""
    taken: int = 0
    """The sum of the interrupts taken: when they come is not the guest's choice."""


@dataclass(frozen=True, slots=True)
class Host:
    """Which KVM the model plays."""

    out_past: bool = True
    """At an `out`'s exit, RIP is past it: so here; stock kvm_amd leaves it at the `out`."""
    store_past: bool = True
    """At an MMIO write's exit, RIP is past it: x86; on arm64 it is not."""
    flags: str = "none"
    """Bit 15: "none" never set; "honest" on all but what never needs it; "sparing" as "honest",
    but not on an output that the kernel is through with (so Linux with the series' change, at
    the elements of a `rep outs`); "deaf" as "honest", but not on what loads, which is a lie;
    "always" set, even where it must not be; "stale" as "honest", but not cleared by a run that is
    interrupted."""
    sample_early: bool = False
    """`immediate_exit` is read when KVM_RUN begins (Linux 6.12), not after completion."""
    batch: int = 4
    """Elements of a `rep ins` that leave in one exit."""
    outs_batch: int = 1
    by_reason: bool = False
    """Whether there is something to complete, KVM sees by `exit_reason`: arm64 and RISC-V. If that
    was written since the exit, nothing is completed, and the instruction is executed again."""
    retries: int = 0
    """How often KVM_RUN answers -EAGAIN before it finishes what is pending. On x86 it does so
    only before a vCPU's first instruction, but nothing says so: only -EINTR is a promise."""


DATA: Final = mmap.PAGESIZE
"""Where in `kvm_run` port data lies: on a page of its own, as KVM has it."""


class Page(RunPage):
    """The real thing but for its kernel, and a gate before the vCPU's thread writes
    `immediate_exit`, which is `request` here."""

    def __init__(self, vcpu: ModelVcpu) -> None:
        super().__init__(-1, 2 * mmap.PAGESIZE)
        self._vcpu = vcpu
        self.request = 0
        self.unknown = 0
        """What lies in the part of an exit that nobody knows."""

    @property
    def immediate_exit(self) -> int:
        return self.request

    @immediate_exit.setter
    def immediate_exit(self, value: int) -> None:
        self._vcpu.before_request_is_written(value)
        self.request = value


Steps = Generator[int, None, None]


def _free(point: str) -> None:
    """The gate of a vCPU that nobody holds up."""


class ModelVcpu:
    """A vCPU with a program. All but `signal`, `interrupt` and `page.immediate_exit` belong to
    the thread that runs it, and that is checked."""

    def __init__(
        self, index: int, program: Sequence[Op], host: Host, state: State | None = None
    ) -> None:
        self.index = index
        self.page = Page(self)
        self.gate: Callable[[str], None] = _free
        """Called in the vCPU's thread at each named moment."""
        self.on_request: Callable[[], None] = lambda: None
        """Called in any other thread, before it writes `immediate_exit`."""
        self.on_broken: Callable[[], None] = lambda: None
        """Called in the vCPU's thread before `run` raises: the thread is about to end."""
        self.asked = False
        """The tests': a pause or stop was asked for, and the asking has returned."""
        self.still = False
        """The tests': somebody looks at the state; nothing may run."""
        self.on_needless: Callable[[int], None] = lambda reason: None
        """The tests': called at a `run` that is to complete the last exit, with its reason, where
        that exit left nothing to be completed and said so."""
        self.wanted: Callable[[], bool] = lambda: True
        """Is it asked to park or end? Else a `run` with `immediate_exit` is no completion."""
        self.thread: int | None = None
        self.thread_id = 0
        self.exits = 0
        self._program = tuple(program)
        self._host = host
        self._state = state or State()
        if state is None:
            self._at(0)
        self._pending: Steps | None = None
        self._through = False
        """Is nothing left to be done after the exit that is being made?"""
        self._needless: int | None = None
        """The reason of the last exit, where nobody needs to enter again for it."""
        self._retries = 0
        self._left_with = 0
        """The reason of the last exit."""
        self._lock = threading.Lock()
        self._inside = False
        self._signal = False
        self._ended = False

    # -- what avmm.kvm.Vcpu has ------------------------------------------------------------

    def run(self) -> int:
        """KVM_RUN."""
        self._check_thread()
        needless, self._needless = self._needless, None
        if needless is not None and self.page.request and self.wanted():
            self.on_needless(needless)
        self.gate("enter")
        with self._lock:
            self._inside, self._signal = True, False
        if self._host.flags != "stale":
            self.page.struct.flags = 0
        try:
            status = self._run()
        except Broken:
            self.on_broken()
            raise
        finally:
            with self._lock:
                self._inside = False
        self.gate("leave")
        return status

    def pc(self) -> int:
        return self._state.pc

    # -- what tests have beside it ---------------------------------------------------------

    def state(self) -> State:
        """What the ioctls that read a vCPU's state give: nothing of what is pending."""
        with self._lock:
            return replace(self._state)

    @property
    def pending(self) -> bool:
        """Is something pending that `state` does not show? No ioctl tells; for messages."""
        return self._pending is not None

    @property
    def finished(self) -> bool:
        """Has the program come to its end, with nothing pending?"""
        return self._state.pc == len(self._program) and self._pending is None

    def signal(self) -> None:
        """The kick's signal, to the thread that runs this vCPU."""
        with self._lock:
            self._signal = self._inside

    def interrupt(self, vector: int) -> None:
        """A device's interrupt. Any thread."""
        if self.still:
            raise Broken(f"vCPU {self.index} is interrupted while its state is read")
        with self._lock:
            self._state.interrupts += (vector,)

    def rest(self) -> None:
        """It stands still: what comes then is no completion of its last exit."""
        self._needless = None

    def end(self) -> None:
        """Leave the guest at once and for good, whatever bug is planted: for tearing down."""
        self._ended = True

    def before_request_is_written(self, value: int) -> None:
        """For `Page`: the thread is about to write `immediate_exit`, or somebody else is."""
        if threading.get_ident() == self.thread:
            self.gate(f"immediate_exit = {value}")
        else:
            self.on_request()

    # -- the kernel ------------------------------------------------------------------------

    def _check_thread(self) -> None:
        me = threading.get_ident()
        if self.thread is None:
            self.thread, self.thread_id = me, threading.get_native_id()
        elif self.thread != me:
            raise Broken(f"vCPU {self.index} is run by another thread than before")

    def _run(self) -> int:
        asked = self.page.request
        if self._host.by_reason and self.page.struct.exit_reason != self._left_with:
            self._pending = None
        if self._pending is not None:
            if self._retries:
                self._retries -= 1
                return -errno.EAGAIN
            self._step()
            reason = next(self._pending, None)
            if reason is not None:
                return self._leave(reason)
            self._pending = None
        if not self._host.sample_early:
            self.gate("sample")
            asked = self.page.request
        self.gate("sampled")
        if asked:
            return self._interrupted()
        return self._guest()

    def _guest(self) -> int:
        """The guest runs, until it exits or is kicked."""
        while True:
            if self._signal or self._ended:
                return self._interrupted()
            with self._lock:
                self._state.taken += sum(self._state.interrupts)
                self._state.interrupts = ()
            if self._state.pc == len(self._program):
                self.gate("idle")  # hlt, with the APIC in the kernel
                if self.asked and not self._signal and not self._ended:
                    raise self._lost_kick()
                continue
            op = self._program[self._state.pc]
            if op.kind in ("compute", "wait"):
                self.gate(op.kind)
                if self._signal or self._ended:
                    continue
                self._begin()
                self._one_less()
                if op.kind == "wait":
                    return -errno.EAGAIN
                continue
            self._begin()
            steps: Steps = getattr(self, f"_do_{op.kind}")(op)
            reason = next(steps, None)
            if reason is not None:
                self._pending = steps
                return self._leave(reason)

    def _begin(self) -> None:
        if self.asked:
            raise self._lost_kick()
        self._step()

    def _lost_kick(self) -> Broken:
        return Broken(
            f"vCPU {self.index} runs on in the guest though it was asked to leave it: "
            "a kick was lost"
        )

    def _step(self) -> None:
        if self.still:
            raise Broken(f"vCPU {self.index} runs while its state is read")

    def _interrupted(self) -> int:
        self.page.struct.exit_reason = constants.KVM_EXIT_INTR
        if self._host.flags == "always":
            self.page.struct.flags = NEEDS_COMPLETION
        return -errno.EINTR

    def _leave(self, reason: int) -> int:
        self.exits += 1
        self._retries = self._host.retries
        self.page.struct.exit_reason = self._left_with = reason
        needs = reason != constants.KVM_EXIT_INTR
        flags = {
            "none": False,
            "always": True,
            "sparing": needs and not self._through,
            "deaf": needs and not self._loads(reason),
        }.get(self._host.flags, needs)
        self.page.struct.flags = NEEDS_COMPLETION if flags else 0
        is_through = self._through or not needs
        self._needless = reason if is_through and not flags else None
        self._through = False
        return reason

    def _loads(self, reason: int) -> bool:
        if reason == constants.KVM_EXIT_IO:
            return bool(self.page.struct.io.direction == constants.KVM_EXIT_IO_IN)
        return reason == constants.KVM_EXIT_MMIO and not self.page.struct.mmio.is_write

    def _at(self, pc: int) -> None:
        self._state.pc = pc
        self._state.count = self._program[pc].count if pc < len(self._program) else 0

    def _next(self) -> None:
        self._at(self._state.pc + 1)

    def _one_less(self) -> None:
        self._state.count -= 1
        if not self._state.count:
            self._next()

    def _take(self, value: int) -> None:
        self._state.checksum = mix(self._state.checksum, value)

    def _value(self, size: int) -> int:
        """What the guest writes: it depends on all that it has read."""
        state = self._state
        return mix(state.checksum, state.pc, state.count) & (1 << 8 * size) - 1

    # -- instructions: each `yield` is an exit, what follows it is what was pending ------------

    def _port(self, way: int, op: Op, count: int, data: bytes = b"") -> int:
        io = self.page.struct.io
        io.direction, io.size, io.port = way, op.size, PORT + PORTS * self.index + op.at
        io.count, io.data_offset = count, DATA
        self.page.io_store(DATA, data or bytes([NOISE & 0xFF]) * op.size * count)
        return constants.KVM_EXIT_IO

    def _address(self, address: int, length: int, value: int | None) -> int:
        mmio = self.page.struct.mmio
        mmio.phys_addr = ADDRESS + ADDRESSES * self.index + address
        mmio.len, mmio.is_write = length, int(value is not None)
        self.page.answer_mmio(NOISE if value is None else value | NOISE << 8 * length & MASK)
        return constants.KVM_EXIT_MMIO

    def _loaded(self, length: int) -> int:
        _, value, _, _ = self.page.mmio()
        return value & (1 << 8 * length) - 1

    def _input(self, size: int, at: int = 0) -> int:
        return int.from_bytes(self.page.io_load(DATA + at * size, size), "little")

    def _do_in(self, op: Op) -> Steps:
        yield self._port(constants.KVM_EXIT_IO_IN, op, 1)
        self._take(self._input(op.size))
        self._next()

    def _do_out(self, op: Op) -> Steps:
        data = self._value(op.size).to_bytes(op.size, "little")
        if self._host.out_past:
            self._next()
        self._through = self._host.out_past
        yield self._port(constants.KVM_EXIT_IO_OUT, op, 1, data)
        if not self._host.out_past:
            self._next()

    def _do_ins(self, op: Op) -> Steps:
        """RIP stays at the instruction until it is entered once more, with rcx = 0."""
        if not self._state.count:
            self._next()
            return
        count = min(self._state.count, self._host.batch)
        yield self._port(constants.KVM_EXIT_IO_IN, op, count)
        for at in range(count):
            self._take(self._input(op.size, at))
        self._state.count -= count

    def _do_outs(self, op: Op) -> Steps:
        if not self._state.count:
            self._next()
            return
        before, count = self._state.count, min(self._state.count, self._host.outs_batch)
        data = b""
        for _ in range(count):
            data += self._value(op.size).to_bytes(op.size, "little")
            self._state.count -= 1
        after = self._state.count
        if not self._host.out_past:
            self._state.count = before
        self._through = self._host.out_past
        yield self._port(constants.KVM_EXIT_IO_OUT, op, count, data)
        self._state.count = after

    def _do_load(self, op: Op) -> Steps:
        value, address = 0, op.at
        for length in op.parts:
            yield self._address(address, length, None)
            value |= self._loaded(length) << 8 * (address - op.at)
            address += length
        self._take(value)
        self._next()

    def _do_store(self, op: Op) -> Steps:
        value, address = self._value(sum(op.parts)), op.at
        if self._host.store_past:
            self._next()
        for at, length in enumerate(op.parts, 1):
            self._through = self._host.store_past and at == len(op.parts)
            yield self._address(address, length, value & (1 << 8 * length) - 1)
            value >>= 8 * length
            address += length
        if not self._host.store_past:
            self._next()

    def _do_rmw(self, op: Op) -> Steps:
        yield self._address(op.at, op.size, None)
        value = self._loaded(op.size)
        self._take(value)
        self._next()
        self._through = True
        yield self._address(op.at, op.size, value + 1 & (1 << 8 * op.size) - 1)

    def _do_outs_mmio(self, op: Op) -> Steps:
        """`rep outs` from MMIO: a load and an output for each element."""
        if not self._state.count:
            self._next()
            return
        yield self._address(op.at, op.size, None)
        value = self._loaded(op.size)
        yield self._port(constants.KVM_EXIT_IO_OUT, op, 1, value.to_bytes(op.size, "little"))
        self._take(value)
        self._state.count -= 1

    def _do_ins_mmio(self, op: Op) -> Steps:
        """`rep ins` into MMIO: an input and a store for each element."""
        if not self._state.count:
            self._next()
            return
        yield self._port(constants.KVM_EXIT_IO_IN, op, 1)
        value = self._input(op.size)
        self._take(value)
        self._state.count -= 1
        self._through = True
        yield self._address(op.at, op.size, value)

    def _do_rdmsr(self, op: Op) -> Steps:
        msr = self.page.struct.msr
        msr.index, msr.error, msr.data = MSR + MSRS * self.index + op.at, 1, NOISE
        yield constants.KVM_EXIT_X86_RDMSR
        self._take(mix(1) if msr.error else msr.data)
        self._next()

    def _do_wrmsr(self, op: Op) -> Steps:
        msr = self.page.struct.msr
        msr.index, msr.error = MSR + MSRS * self.index + op.at, 1
        msr.data = self._value(8)
        yield constants.KVM_EXIT_X86_WRMSR
        self._take(msr.error)
        self._next()

    def _do_kvm(self, op: Op) -> Steps:
        call = self.page.struct.hypercall
        call.nr, call.ret, call.longmode = constants.KVM_HC_MAP_GPA_RANGE, NOISE, 1
        call.args = [op.at, self._value(8), 0, 0, 0, 0]
        yield constants.KVM_EXIT_HYPERCALL
        self._take(call.ret)
        self._next()

    def _do_xen(self, op: Op) -> Steps:
        self.page.struct.xen.type = constants.KVM_EXIT_XEN_HCALL
        call = self.page.struct.xen.u.hcall
        call.longmode, call.cpl = 1, 0
        call.input, call.result, call.params = op.at, NOISE, [self._value(8)] * 6
        yield constants.KVM_EXIT_XEN
        self._take(call.result)
        self._next()

    def _do_papr(self, op: Op) -> Steps:
        call = self.page.struct.papr_hcall
        call.nr, call.ret, call.args = op.at, NOISE, [self._value(8)] * 9
        yield constants.KVM_EXIT_PAPR_HCALL
        for value in (call.ret, *call.args):
            self._take(value)
        self._next()

    def _do_osi(self, op: Op) -> Steps:
        self.page.struct.osi.gprs = [self._value(8)] * 32
        self.page.struct.osi.gprs[5] = op.at
        yield constants.KVM_EXIT_OSI
        for value in self.page.struct.osi.gprs:
            self._take(value)
        self._next()

    def _do_epr(self, op: Op) -> Steps:
        self.page.struct.epr.epr = NOISE & 0xFFFF_FFFF
        yield constants.KVM_EXIT_EPR
        self._take(self.page.struct.epr.epr)
        self._next()

    def _do_unknown(self, op: Op) -> Steps:
        self.page.unknown = NOISE
        yield UNKNOWN_EXIT
        self._take(self.page.unknown)
        self._next()

    def _do_notice(self, op: Op) -> Steps:
        """An exit that leaves nothing pending; of those, the one that avmm serves and goes on."""
        self._next()
        yield constants.KVM_EXIT_INTR
