"""`struct kvm_run`: the page that a vCPU shares with the kernel, as typed values.

Port and memory accesses are read once an exit: `io` and `mmio` unpack all of one in a single call
that costs what a single field of a cffi structure does, and give plain tuples for it. All else may
cost more, and is an `Exit` with names.

`exit_reason` can only be read here: whoever completes an exit leaves it alone, because on arm64
and RISC-V KVM decides by that very field whether there is something to complete.
"""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from avmm.kvm._kvm import ffi, lib
from avmm.kvm.errors import KvmError
from avmm.kvm.exits import (
    Exit,
    FailEntryExit,
    HypercallExit,
    InternalErrorExit,
    MmioExit,
    MsrExit,
    OsiExit,
    PaprExit,
    PioExit,
    PlainExit,
    SystemEventExit,
    UnknownExit,
    XenExit,
)

if TYPE_CHECKING:
    from avmm.kvm import _kvm

PortAccess: TypeAlias = tuple[int, int, int, int, int]
"""(KVM_EXIT_IO_IN or _OUT, bytes of an element, port, number of elements, where the data lies)"""
MemoryAccess: TypeAlias = tuple[int, int, int, int]
"""(address, data as a number of 8 bytes, length in bytes, whether it is a write)"""

_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


def _layout(union_part: str, type_: _kvm.CType, *names: str) -> tuple[struct.Struct, int]:
    """Unpacks these fields of a part of `kvm_run`'s union, where the compiler put them; and where
    that part begins."""
    fields = dict(type_.fields)
    pattern, end = "=", 0
    for name in names:
        field, size = fields[name], ffi.sizeof(fields[name].type)
        pattern += f"{field.offset - end}x{_CODES[size]}"
        end = field.offset + size
    return struct.Struct(pattern), ffi.offsetof("struct kvm_run", union_part)


_IO, _IO_AT = _layout(
    "io", ffi.typeof("avmm_exit_io"), "direction", "size", "port", "count", "data_offset"
)
_MMIO, _MMIO_AT = _layout(
    "mmio", ffi.typeof("avmm_exit_mmio"), "phys_addr", "data", "len", "is_write"
)


class RunPage:
    """One vCPU's `struct kvm_run` and what lies behind it. Belongs to the thread that runs the
    vCPU, except `immediate_exit`."""

    def __init__(self, mapping: mmap.mmap) -> None:
        """`mapping` is the page's from now on."""
        self._mapping = mapping
        self._buffer = ffi.from_buffer(mapping, require_writable=True)
        self.struct = ffi.cast("struct kvm_run *", self._buffer)
        """For the rest of `avmm.kvm`."""
        self._mmio_data = ffi.cast("uint64_t *", self.struct.mmio.data)
        self.io: Callable[[], PortAccess] = partial(_IO.unpack_from, mapping, _IO_AT)
        """The port access that the vCPU has exited with."""
        self.mmio: Callable[[], MemoryAccess] = partial(_MMIO.unpack_from, mapping, _MMIO_AT)
        """The memory access that the vCPU has exited with."""

    @property
    def immediate_exit(self) -> int:
        """1: KVM_RUN is to finish what is pending and return -EINTR, without entering the
        guest."""
        return self.struct.immediate_exit

    @immediate_exit.setter
    def immediate_exit(self, value: int) -> None:
        self.struct.immediate_exit = value

    @property
    def exit_reason(self) -> int:
        """Why KVM_RUN has returned: one of KVM_EXIT_*."""
        return self.struct.exit_reason

    @property
    def flags(self) -> int:
        """`kvm_run.flags` of the last exit."""
        return self.struct.flags

    def exit(self) -> Exit:
        """What the vCPU has exited with."""
        reason = self.exit_reason
        read = _READERS.get(reason)
        return PlainExit(reason) if read is None else read(self)

    # -- answers -------------------------------------------------------------------------

    def answer_mmio(self, value: int) -> None:
        """What the guest's MMIO read gets."""
        self._mmio_data[0] = value

    def io_load(self, offset: int, length: int) -> bytes:
        """The bytes of an output; `offset` tells `io`."""
        return self._mapping[offset : offset + length]

    def io_store(self, offset: int, data: bytes | bytearray) -> None:
        """What the guest's input gets."""
        self._mapping[offset : offset + len(data)] = data

    def answer_msr(self, value: int | None = None) -> None:
        """The guest's RDMSR gets this value, or (None) its WRMSR is done."""
        msr = self.struct.msr
        msr.error = 0
        if value is not None:
            msr.data = value

    def refuse_msr(self) -> None:
        """The guest's RDMSR or WRMSR is a fault, #GP."""
        self.struct.msr.error = 1

    def answer_hypercall(self, value: int) -> None:
        """KVM's hypercall gives this."""
        self.struct.hypercall.ret = value

    def answer_xen(self, value: int) -> None:
        """Xen's hypercall gives this."""
        self.struct.xen.u.hcall.result = value

    def answer_papr(self, value: int, args: Sequence[int] = ()) -> None:
        """PAPR's hypercall gives this, and `args` in place of its own from the first on."""
        call = self.struct.papr_hcall
        for at, arg in enumerate(args):
            call.args[at] = arg
        call.ret = value

    def answer_osi(self, value: int, gprs: Sequence[int] = ()) -> None:
        """The OSI call gives this in register 3, and `gprs` in place of the others from register 0
        on."""
        registers = self.struct.osi.gprs
        for at, register in enumerate(gprs):
            registers[at] = register
        registers[3] = value

    def answer_epr(self, value: int) -> None:
        """PowerPC's external proxy gives this interrupt vector, 32 bits."""
        self.struct.epr.epr = value

    # -- exits with names ----------------------------------------------------------------

    def msr(self) -> MsrExit:
        """The access to an MSR that the vCPU has exited with."""
        return MsrExit(self.struct.msr.index, self.struct.msr.data)

    def hypercall(self) -> HypercallExit:
        """KVM's hypercall that the vCPU has exited with."""
        call = self.struct.hypercall
        return HypercallExit(call.nr, tuple(call.args), bool(call.longmode))

    def xen(self) -> XenExit:
        """Xen's exit that the vCPU has exited with."""
        kind, call = self.struct.xen.type, self.struct.xen.u.hcall
        return XenExit(kind, call.input, tuple(call.params), bool(call.longmode), call.cpl)

    def papr(self) -> PaprExit:
        """PAPR's hypercall that the vCPU has exited with."""
        return PaprExit(self.struct.papr_hcall.nr, tuple(self.struct.papr_hcall.args))

    def osi(self) -> OsiExit:
        """The OSI call that the vCPU has exited with."""
        return OsiExit(tuple(self.struct.osi.gprs))

    def _pio_exit(self) -> PioExit:
        direction, size, port, times, _ = self.io()
        return PioExit(direction == lib.KVM_EXIT_IO_OUT, size, port, times)

    def _mmio_exit(self) -> MmioExit:
        address, _, length, is_write = self.mmio()
        return MmioExit(address, length, bool(is_write))

    def system_event(self) -> SystemEventExit:
        """The guest's own word of its end that the vCPU has exited with."""
        return SystemEventExit(self.struct.system_event.type)

    def _internal_error(self) -> InternalErrorExit:
        error, failure, instruction = self.struct.internal, self.struct.emulation_failure, b""
        if (
            error.suberror == lib.KVM_INTERNAL_ERROR_EMULATION
            and error.ndata >= 3
            and failure.flags & lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        ):
            size = min(failure.insn_size, len(failure.insn_bytes))
            instruction = bytes(failure.insn_bytes[0:size])
        data = tuple(error.data[0 : min(error.ndata, len(error.data))])
        return InternalErrorExit(error.suberror, data, instruction)

    def _fail_entry(self) -> FailEntryExit:
        return FailEntryExit(self.struct.fail_entry.hardware_entry_failure_reason)

    def _unknown(self) -> UnknownExit:
        return UnknownExit(self.struct.hw.hardware_exit_reason)

    # -- the mapping ---------------------------------------------------------------------

    def write_ring(self, page: int) -> _kvm.KvmCoalescedMmioRingPointer:
        """The VM's ring of coalesced writes: each vCPU's mapping shows it, at the page number
        (of the host's pages) that is the value of KVM_CAP_COALESCED_MMIO."""
        if not 0 < page < len(self._mapping) // mmap.PAGESIZE:
            raise KvmError("KVM_CAP_COALESCED_MMIO", errno.ENOSYS, f"no ring at page {page}")
        return ffi.cast("struct kvm_coalesced_mmio_ring *", self._buffer + page * mmap.PAGESIZE)

    def close(self) -> None:
        """Unmap it; idempotent."""
        if self._mapping.closed:
            return
        self.struct = ffi.cast("struct kvm_run *", 0)
        self._mmio_data = ffi.cast("uint64_t *", 0)
        ffi.release(self._buffer)
        self._mapping.close()


_READERS: Final[dict[int, Callable[[RunPage], Exit]]] = {
    lib.KVM_EXIT_IO: RunPage._pio_exit,
    lib.KVM_EXIT_MMIO: RunPage._mmio_exit,
    lib.KVM_EXIT_X86_RDMSR: RunPage.msr,
    lib.KVM_EXIT_X86_WRMSR: RunPage.msr,
    lib.KVM_EXIT_HYPERCALL: RunPage.hypercall,
    lib.KVM_EXIT_XEN: RunPage.xen,
    lib.KVM_EXIT_PAPR_HCALL: RunPage.papr,
    lib.KVM_EXIT_OSI: RunPage.osi,
    lib.KVM_EXIT_SYSTEM_EVENT: RunPage.system_event,
    lib.KVM_EXIT_INTERNAL_ERROR: RunPage._internal_error,
    lib.KVM_EXIT_FAIL_ENTRY: RunPage._fail_entry,
    lib.KVM_EXIT_UNKNOWN: RunPage._unknown,
}
