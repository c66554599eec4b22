"""`struct kvm_run`: the page that a vCPU shares with the kernel, as typed values.

Port and memory accesses are read once per exit: `io` and `mmio` unpack a whole access in a single
call, which costs as much as reading one field of a cffi structure, and return plain tuples. All
other exits may cost more, and are an `Exit` with names.

`exit_reason` can only be read here. It must not change before an exit is completed, because on
arm64 and RISC-V KVM decides by that very field whether there is something to complete.
"""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

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
    """A struct format that unpacks these fields of a part of `kvm_run`'s union, at the compiler's
    offsets, and the offset at which that part begins."""
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


def _unmap(size: int, struct: _kvm.KvmRunPointer) -> None:
    lib.avmm_unmap(struct, size)


def _closed() -> NoReturn:
    raise ValueError("the vCPU is closed")


class RunPage:
    """One vCPU's `struct kvm_run` and what lies behind it. Belongs to the thread that runs the
    vCPU, except `immediate_exit`."""

    def __init__(self, fd: int, size: int) -> None:
        """Map `size` bytes of a vCPU's descriptor, or of nothing if it is -1. Raises `KvmError`.

        Not by `mmap.mmap`, which keeps a second descriptor for as long as the mapping exists.
        """
        if (address := lib.avmm_map(fd, size)) < 0:
            raise KvmError("mmap of kvm_run", -address)
        unmap = partial(_unmap, size)
        self.struct = ffi.gc(ffi.cast("struct kvm_run *", address), unmap, size)
        """For use in the other modules of `avmm.kvm`."""
        self._size = size
        self._is_closed = False
        mapping = self._mapping = ffi.buffer(self.struct, size)
        self._mmio_data = ffi.cast("uint64_t *", self.struct.mmio.data)
        self.io: Callable[[], PortAccess] = partial(_IO.unpack_from, mapping, _IO_AT)
        """The port access that the vCPU has exited with."""
        self.mmio: Callable[[], MemoryAccess] = partial(_MMIO.unpack_from, mapping, _MMIO_AT)
        """The memory access that the vCPU has exited with."""

    @property
    def immediate_exit(self) -> int:
        """If it is 1, KVM_RUN finishes what is pending and returns -EINTR without entering the
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
        """Set the value that the guest's MMIO read gets."""
        self._mmio_data[0] = value

    def io_load(self, offset: int, length: int) -> bytes:
        """The bytes that the guest's OUT writes; `io` returns the `offset`."""
        return self._mapping[offset : offset + length]

    def io_store(self, offset: int, data: bytes | bytearray) -> None:
        """Set the bytes that the guest's IN gets."""
        self._mapping[offset : offset + len(data)] = data

    def answer_msr(self, value: int | None = None) -> None:
        """Let the guest's RDMSR return this value. With None, its WRMSR is done."""
        msr = self.struct.msr
        msr.error = 0
        if value is not None:
            msr.data = value

    def refuse_msr(self) -> None:
        """Let the guest's RDMSR or WRMSR raise a #GP."""
        self.struct.msr.error = 1

    def answer_hypercall(self, value: int) -> None:
        """Set the result of KVM's hypercall."""
        self.struct.hypercall.ret = value

    def answer_xen(self, value: int) -> None:
        """Set the result of Xen's hypercall."""
        self.struct.xen.u.hcall.result = value

    def answer_papr(self, value: int, args: Sequence[int] = ()) -> None:
        """Set the result of PAPR's hypercall. `args` replace its arguments, starting with the
        first."""
        call = self.struct.papr_hcall
        for at, arg in enumerate(args):
            call.args[at] = arg
        call.ret = value

    def answer_osi(self, value: int, gprs: Sequence[int] = ()) -> None:
        """Set the result of the OSI call, which goes to register 3. `gprs` replace the other
        registers, starting with register 0."""
        registers = self.struct.osi.gprs
        for at, register in enumerate(gprs):
            registers[at] = register
        registers[3] = value

    def answer_epr(self, value: int) -> None:
        """Set the interrupt vector (32 bits) that PowerPC's external proxy returns."""
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
        """The system event that the vCPU has exited with: the guest's own report of its end."""
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
        """The VM's ring of coalesced writes. It is visible in each vCPU's mapping, at the page (of
        the host's size) whose number is the value of KVM_CAP_COALESCED_MMIO."""
        if self._is_closed or not 0 < page < self._size // mmap.PAGESIZE:
            raise KvmError("KVM_CAP_COALESCED_MMIO", errno.ENOSYS, f"no ring at page {page}")
        start = ffi.cast("char *", self.struct)
        return ffi.cast("struct kvm_coalesced_mmio_ring *", start + page * mmap.PAGESIZE)

    def close(self) -> None:
        """Unmap it; idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        # Whoever uses it after that finds an empty one.
        mapped, self.struct = self.struct, ffi.new("struct kvm_run *")
        self._mmio_data = ffi.cast("uint64_t *", self.struct.mmio.data)
        self._mapping = ffi.buffer(self.struct, ffi.sizeof("struct kvm_run"))
        self.io, self.mmio = _closed, _closed
        ffi.release(mapped)


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
