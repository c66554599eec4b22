"""Handles for the three things KVM has: the system, a VM, a vCPU.

Each owns a file descriptor, is closed explicitly and only once, and turns every failed ioctl
into a `KvmError`. Structures are cffi's own objects with the fields of <linux/kvm.h>; they are
typed `Struct` because only the C compiler knows more. Source throughout:
Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from avmm.kvm._kvm import ffi, lib
from avmm.kvm.errors import KvmError, too_old, unavailable

Struct: TypeAlias = Any
"""A C structure (cffi); its fields are those of <linux/kvm.h>."""

REQUIRED: Final = {
    "KVM_CAP_USER_MEMORY": "2.6.25",
    "KVM_CAP_IRQCHIP": "2.6.25",
    "KVM_CAP_PIT2": "2.6.33",
    "KVM_CAP_IRQFD": "2.6.32",
    "KVM_CAP_IRQ_ROUTING": "2.6.30",
    "KVM_CAP_SIGNAL_MSI": "3.5",
    "KVM_CAP_MP_STATE": "2.6.26",
    "KVM_CAP_IMMEDIATE_EXIT": "4.13",
}
"""What avmm cannot do without, and the Linux that brought it."""


def capabilities() -> tuple[str, ...]:
    """The names of all capabilities that avmm knows."""
    return tuple(name for name in dir(lib) if name.startswith("KVM_CAP_"))


def exit_name(reason: int) -> str:
    """`"KVM_EXIT_MMIO"` for its number; `"exit reason 99"` where it is unknown."""
    return _EXIT_NAMES.get(reason, f"exit reason {reason}")


def copy_cpuid(cpuid: Struct) -> Struct:
    """Another `struct kvm_cpuid2` with the same leaves."""
    size = ffi.sizeof("struct kvm_cpuid2") + cpuid.nent * ffi.sizeof("struct kvm_cpuid_entry2")
    copy = ffi.new("struct kvm_cpuid2 *", {"nent": cpuid.nent, "entries": cpuid.nent})
    ffi.memmove(copy, cpuid, size)
    return copy


_NO_REASONS: Final = {"KVM_EXIT_IO_IN", "KVM_EXIT_IO_OUT", "KVM_EXIT_XEN_HCALL"}
_EXIT_NAMES: Final = {
    getattr(lib, name): name
    for name in dir(lib)
    if name.startswith("KVM_EXIT_") and name not in _NO_REASONS
}


IO_FIELDS: Final = ("direction", "size", "port", "count", "data_offset")
MMIO_FIELDS: Final = ("phys_addr", "data", "len", "is_write")


def _unpacker(
    mapping: mmap.mmap, exit_: str, names: tuple[str, ...]
) -> Callable[[], tuple[int, ...]]:
    """Reads these fields of `kvm_run`'s part for an exit, where the compiler put them."""
    fields = dict(ffi.typeof(f"avmm_exit_{exit_}").fields)
    pattern, end = "=", 0
    for name in names:
        field, size = fields[name], ffi.sizeof(fields[name].type)
        pattern += f"{field.offset - end}x{_CODES[size]}"
        end = field.offset + size
    base: int = ffi.offsetof("struct kvm_run", exit_)
    return partial(struct.Struct(pattern).unpack_from, mapping, base)


_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


_STATE: Final = {
    "regs": ("KVM_GET_REGS", "KVM_SET_REGS", "struct kvm_regs"),
    "sregs": ("KVM_GET_SREGS", "KVM_SET_SREGS", "struct kvm_sregs"),
    "xcrs": ("KVM_GET_XCRS", "KVM_SET_XCRS", "struct kvm_xcrs"),
    "debugregs": ("KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS", "struct kvm_debugregs"),
    "lapic": ("KVM_GET_LAPIC", "KVM_SET_LAPIC", "struct kvm_lapic_state"),
    "mp_state": ("KVM_GET_MP_STATE", "KVM_SET_MP_STATE", "struct kvm_mp_state"),
    "events": ("KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", "struct kvm_vcpu_events"),
    "pit": ("KVM_GET_PIT2", "KVM_SET_PIT2", "struct kvm_pit_state2"),
}
"""The parts of a vCPU's and a VM's state that are one structure: (get, set, structure)."""


class _Handle:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def _ioctl(self, name: str, argument: Struct = ffi.NULL) -> int:
        answer: int = lib.avmm_ioctl(self.fd, getattr(lib, name), argument)
        if answer < 0:
            raise KvmError(name, -answer)
        return answer

    def _ioctl_value(self, name: str, argument: int = 0) -> int:
        answer: int = lib.avmm_ioctl_value(self.fd, getattr(lib, name), argument)
        if answer < 0:
            raise KvmError(name, -answer)
        return answer

    def _get(self, name: str, ctype: str) -> Struct:
        struct = ffi.new(ctype)
        self._ioctl(name, struct)
        return struct

    def state(self, part: str) -> bytes:
        """A part of the state (`VCPU_STATE`, `VM_STATE`), as the kernel's structure has it."""
        get, _, ctype = _STATE[part]
        return bytes(ffi.buffer(self._get(get, f"{ctype} *")))

    def set_state(self, part: str, data: bytes) -> None:
        """Set what `state` gave. Raises `ValueError` where the structure has another size."""
        _, set_, ctype = _STATE[part]
        if len(data) != ffi.sizeof(ctype):
            raise ValueError(f"{part}: {len(data)} bytes, expected {ffi.sizeof(ctype)}")
        struct_ = ffi.new(f"{ctype} *")
        ffi.buffer(struct_)[:] = data
        self._ioctl(set_, struct_)

    def check(self, capability: str) -> int:
        """KVM_CHECK_EXTENSION: 0 where the capability is missing, else 1 or its value."""
        return self._ioctl_value("KVM_CHECK_EXTENSION", getattr(lib, capability))

    def announces(self, number: int) -> bool:
        """Does KVM_CHECK_EXTENSION answer for the capability with this number, known or not?"""
        return bool(lib.avmm_ioctl_value(self.fd, lib.KVM_CHECK_EXTENSION, number) > 0)

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class System(_Handle):
    """/dev/kvm. Raises `KvmUnavailable` where it cannot be used, saying why."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise unavailable(path, error.errno or errno.EIO) from None
        try:
            if (version := self._ioctl_value("KVM_GET_API_VERSION")) != lib.KVM_API_VERSION:
                raise too_old(f"API version 12 (it has {version})", "2.6.22")
            for name, since in REQUIRED.items():
                if not self.check(name):
                    raise too_old(name, since)
        except KvmError as error:
            self.close()
            if error.errno == errno.ENOTTY:
                raise unavailable(path, errno.ENODEV) from None
            raise

    def create_vm(self) -> Vm:
        """A new, empty VM."""
        return Vm(self._ioctl_value("KVM_CREATE_VM"), self)

    @property
    def run_size(self) -> int:
        """Bytes of a vCPU's `kvm_run` mapping."""
        return self._ioctl_value("KVM_GET_VCPU_MMAP_SIZE")

    @property
    def max_vcpus(self) -> int:
        """The most vCPUs that one VM may have."""
        return self.check("KVM_CAP_MAX_VCPUS") or self.check("KVM_CAP_NR_VCPUS") or 4

    def supported_cpuid(self) -> Struct:
        """The CPUID that this host can offer a guest (`struct kvm_cpuid2`)."""
        room = 64
        while True:
            cpuid = ffi.new("struct kvm_cpuid2 *", {"nent": room, "entries": room})
            try:
                self._ioctl("KVM_GET_SUPPORTED_CPUID", cpuid)
            except KvmError as error:
                if error.errno != errno.E2BIG or room > 4096:
                    raise
                room *= 2
                continue
            return cpuid

    def msr_indices(self) -> tuple[int, ...]:
        """The MSRs that make up a vCPU's state on this host."""
        probe = ffi.new("struct kvm_msr_list *", {"nmsrs": 0, "indices": 0})
        answer = lib.avmm_ioctl(self.fd, lib.KVM_GET_MSR_INDEX_LIST, probe)
        if answer < 0 and answer != -errno.E2BIG:
            raise KvmError("KVM_GET_MSR_INDEX_LIST", -answer)
        msrs = ffi.new("struct kvm_msr_list *", {"nmsrs": probe.nmsrs, "indices": probe.nmsrs})
        self._ioctl("KVM_GET_MSR_INDEX_LIST", msrs)
        return tuple(msrs.indices[0 : msrs.nmsrs])


class Vm(_Handle):
    """One VM: memory slots, interrupt chips, vCPUs."""

    def __init__(self, fd: int, system: System) -> None:
        super().__init__(fd)
        self._system = system

    def create_vcpu(self, index: int) -> Vcpu:
        """The vCPU number `index` (which is its APIC id too)."""
        return Vcpu(self._ioctl_value("KVM_CREATE_VCPU", index), index, self._system.run_size)

    def set_memory(
        self,
        slot: int,
        gpa: int,
        view: memoryview,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
    ) -> None:
        """Back `gpa` onwards with the memory under `view`, which must outlive the VM.

        With `log_dirty` KVM logs which pages are written from now on (`dirty_log`); calling it
        again with everything else the same turns that on or off.
        """
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot = slot
        region.flags = lib.KVM_MEM_READONLY if readonly else 0
        region.flags |= lib.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        region.guest_phys_addr = gpa
        region.memory_size = view.nbytes
        region.userspace_addr = int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
        self._ioctl("KVM_SET_USER_MEMORY_REGION", region)

    def dirty_log(self, slot: int, bitmap: bytearray) -> None:
        """KVM_GET_DIRTY_LOG: which pages of the slot were written since the last call, a bit for
        each, in 64-bit words; `bitmap` must have room for all of them."""
        pointer = ffi.from_buffer(bitmap)
        log = ffi.new("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": pointer})
        self._ioctl("KVM_GET_DIRTY_LOG", log)

    def create_irqchip(self, identity_map: int, tss: int) -> None:
        """PIC, IOAPIC and a LAPIC for each vCPU, in the kernel; before any vCPU.

        `identity_map` (one page) and `tss` (three pages) are guest-physical addresses that
        Intel hosts without unrestricted-guest need for themselves.
        """
        if self.check("KVM_CAP_SET_IDENTITY_MAP_ADDR"):
            self._ioctl("KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", identity_map))
        if self.check("KVM_CAP_SET_TSS_ADDR"):
            self._ioctl_value("KVM_SET_TSS_ADDR", tss)
        self._ioctl_value("KVM_CREATE_IRQCHIP")

    def create_pit(self) -> None:
        """The 8254 timer in the kernel, with port 0x61 as guests use it to calibrate."""
        config = ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY})
        self._ioctl("KVM_CREATE_PIT2", config)

    def irqfd(self, fd: int, gsi: int, *, assign: bool = True) -> None:
        """Let a write to eventfd `fd` raise the interrupt `gsi` (an edge), or stop it."""
        flags = 0 if assign else lib.KVM_IRQFD_FLAG_DEASSIGN
        self._ioctl(
            "KVM_IRQFD", ffi.new("struct kvm_irqfd *", {"fd": fd, "gsi": gsi, "flags": flags})
        )

    def ioeventfd(
        self,
        fd: int,
        address: int,
        size: int,
        value: int,
        *,
        port: bool = False,
        assign: bool = True,
    ) -> bool:
        """KVM_IOEVENTFD: let a write of `value` (`size` bytes) at `address` raise eventfd `fd`,
        without an exit, or stop it. False where this KVM cannot do that."""
        if not self.check("KVM_CAP_IOEVENTFD"):
            return False
        flags = lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        flags |= lib.KVM_IOEVENTFD_FLAG_PIO if port else 0
        flags |= 0 if assign else lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        watch = {"datamatch": value, "addr": address, "len": size, "fd": fd, "flags": flags}
        self._ioctl("KVM_IOEVENTFD", ffi.new("struct kvm_ioeventfd *", watch))
        return True

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drive the interrupt input `gsi`."""
        self._ioctl(
            "KVM_IRQ_LINE", ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": level})
        )

    def coalesce(self, address: int, size: int, *, port: bool) -> bool:
        """KVM_REGISTER_COALESCED_MMIO: collect writes there in the ring (`avmm.kvm.ring`).

        False where this KVM has no ring for them.
        """
        if not self.check("KVM_CAP_COALESCED_PIO" if port else "KVM_CAP_COALESCED_MMIO"):
            return False
        zone = {"addr": address, "size": size, "pio": port}
        self._ioctl(
            "KVM_REGISTER_COALESCED_MMIO", ffi.new("struct kvm_coalesced_mmio_zone *", zone)
        )
        return True

    def signal_msi(self, address: int, data: int) -> int:
        """Deliver a message-signalled interrupt; 0 where the guest's LAPICs dropped it."""
        message = ffi.new("struct kvm_msi *")
        message.address_lo, message.address_hi = address & 0xFFFF_FFFF, address >> 32
        message.data = data
        return self._ioctl("KVM_SIGNAL_MSI", message)

    def irqchip(self, chip: int) -> bytes:
        """KVM_GET_IRQCHIP: the state of a PIC or of the IOAPIC."""
        state = ffi.new("struct kvm_irqchip *", {"chip_id": chip})
        self._ioctl("KVM_GET_IRQCHIP", state)
        return bytes(ffi.buffer(state))

    def set_irqchip(self, data: bytes) -> None:
        """KVM_SET_IRQCHIP; which chip it is stands in the data. `ValueError` for a wrong size."""
        state = ffi.new("struct kvm_irqchip *")
        if len(data) != ffi.sizeof("struct kvm_irqchip"):
            raise ValueError(f"irqchip: {len(data)} bytes, expected {ffi.sizeof(state[0])}")
        ffi.buffer(state)[:] = data
        self._ioctl("KVM_SET_IRQCHIP", state)

    def clock(self) -> int:
        """KVM_GET_CLOCK: the guest's kvmclock in ns."""
        value: int = self._get("KVM_GET_CLOCK", "struct kvm_clock_data *").clock
        return value

    def set_clock(self, value: int) -> None:
        """KVM_SET_CLOCK: let the guest's kvmclock go on from there."""
        self._ioctl("KVM_SET_CLOCK", ffi.new("struct kvm_clock_data *", {"clock": value}))

    def enable(self, capability: str, argument: int) -> None:
        """KVM_ENABLE_CAP with one argument."""
        enable = ffi.new("struct kvm_enable_cap *", {"cap": getattr(lib, capability)})
        enable.args[0] = argument
        self._ioctl("KVM_ENABLE_CAP", enable)

    def intercept_xen(self, msr: int) -> bool:
        """KVM_XEN_HVM_CONFIG: hypercalls are Xen's from now on, and leave the guest; a write of a
        GPA to `msr` puts a page there by which to make them. False where this KVM cannot."""
        if not self.check("KVM_CAP_XEN_HVM") & lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL:
            return False
        config = {"flags": lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, "msr": msr}
        self._ioctl("KVM_XEN_HVM_CONFIG", ffi.new("struct kvm_xen_hvm_config *", config))
        return True

    def filter_msrs(self, ranges: Sequence[tuple[int, int]]) -> None:
        """KVM_X86_SET_MSR_FILTER: accesses to these (first, count) leave the guest, all other
        MSRs stay KVM's. At most `KVM_MSR_FILTER_MAX_RANGES` ranges."""
        if len(ranges) > lib.KVM_MSR_FILTER_MAX_RANGES:
            raise KvmError("KVM_X86_SET_MSR_FILTER", errno.E2BIG, f"{len(ranges)} ranges of MSRs")
        filter_ = ffi.new("struct kvm_msr_filter *", {"flags": lib.KVM_MSR_FILTER_DEFAULT_ALLOW})
        bitmaps = []  # a clear bit denies the MSR; kept alive until the ioctl has copied them
        for entry, (first, count) in zip(filter_.ranges, ranges, strict=False):
            bitmap = ffi.new("uint8_t[]", (count + 63) // 64 * 8)  # KVM copies whole longs
            bitmaps.append(bitmap)
            entry.flags = lib.KVM_MSR_FILTER_READ | lib.KVM_MSR_FILTER_WRITE
            entry.base, entry.nmsrs, entry.bitmap = first, count, bitmap
        self.enable("KVM_CAP_X86_USER_SPACE_MSR", lib.KVM_MSR_EXIT_REASON_FILTER)
        self._ioctl("KVM_X86_SET_MSR_FILTER", filter_)

    def set_routing(
        self, pins: Iterable[tuple[int, int, int]], messages: Mapping[int, tuple[int, int]]
    ) -> None:
        """Replace the table from interrupt numbers (GSIs) to chips and messages.

        `pins` holds (gsi, chip, pin), `messages` GSI → (MSI address, MSI data).
        """
        pins = list(pins)
        total = len(pins) + len(messages)
        table = ffi.new("struct kvm_irq_routing *", {"nr": total, "entries": total})
        for entry, (gsi, chip, pin) in zip(table.entries, pins, strict=False):
            entry.gsi, entry.type = gsi, lib.KVM_IRQ_ROUTING_IRQCHIP
            entry.u.irqchip.irqchip, entry.u.irqchip.pin = chip, pin
        for index, (gsi, (address, data)) in enumerate(messages.items(), len(pins)):
            entry = table.entries[index]
            entry.gsi, entry.type = gsi, lib.KVM_IRQ_ROUTING_MSI
            entry.u.msi.address_lo, entry.u.msi.address_hi = address & 0xFFFF_FFFF, address >> 32
            entry.u.msi.data = data
        self._ioctl("KVM_SET_GSI_ROUTING", table)


class Vcpu(_Handle):
    """One vCPU. All of it belongs to the thread that runs it, except `page.immediate_exit`."""

    def __init__(self, fd: int, index: int, run_size: int) -> None:
        super().__init__(fd)
        self.index = index
        try:
            self._mapping = mmap.mmap(fd, run_size)
        except OSError as error:
            self.close()
            raise KvmError("mmap of kvm_run", error.errno or errno.ENOMEM) from None
        self._buffer = ffi.from_buffer(self._mapping, require_writable=True)
        self.page: Struct = ffi.cast("struct kvm_run *", self._buffer)
        """The `struct kvm_run` shared with the kernel."""

        self.run: Callable[[], int] = partial(lib.avmm_run, fd, self.page)
        """KVM_RUN without the GIL: the exit reason, else -errno; -EINTR after a kick, or where it
        was entered with `immediate_exit`."""
        # Called once an exit: one call that unpacks a whole exit costs what a single field of
        # a cffi structure does.
        self.io: Callable[[], tuple[int, ...]] = _unpacker(self._mapping, "io", IO_FIELDS)
        """The PIO exit in `kvm_run`: its `IO_FIELDS`."""
        self.mmio: Callable[[], tuple[int, ...]] = _unpacker(self._mapping, "mmio", MMIO_FIELDS)
        """The MMIO exit in `kvm_run`: its `MMIO_FIELDS`, the data as a number."""
        self._mmio_data = ffi.cast("uint64_t *", self.page.mmio.data)

    def write_ring(self, page: int) -> Struct:
        """The VM's ring of coalesced writes: each vCPU's mapping shows it, at the page number
        that is the value of KVM_CAP_COALESCED_MMIO."""
        if not 0 < page < len(self._mapping) // mmap.PAGESIZE:
            raise KvmError("KVM_CAP_COALESCED_MMIO", errno.ENOSYS, f"no ring at page {page}")
        return ffi.cast("struct kvm_coalesced_mmio_ring *", self._buffer + page * mmap.PAGESIZE)

    def answer_mmio(self, value: int) -> None:
        """What the guest's MMIO read gets."""
        self._mmio_data[0] = value

    def io_load(self, offset: int, length: int) -> bytes:
        """The bytes of an output, `offset` being the exit's `data_offset`."""
        return self._mapping[offset : offset + length]

    def io_store(self, offset: int, data: bytes | bytearray) -> None:
        """What the guest's input gets."""
        self._mapping[offset : offset + len(data)] = data

    def run_raw(self) -> bytes:
        """KVM_RUN in a C loop until the guest writes to its exit-status port (shim.c): the
        baseline that avmm measures itself against. Gives the guest's serial output."""
        output = ffi.new("char[]", 4096)
        length = lib.avmm_run_raw(self.fd, self.page, output, len(output))
        if length < 0:
            raise KvmError("KVM_RUN", errno.EIO, f"unexpected {exit_name(self.page.exit_reason)}")
        return bytes(ffi.buffer(output, length))

    def kick_raw(self, rounds: int) -> list[int]:
        """Nanoseconds from a kick to `KVM_RUN`'s return, in C alone (shim.c): the baseline that
        pauses are measured against. The guest must be one that never exits by itself."""
        times = ffi.new("int64_t[]", rounds)
        if (answer := lib.avmm_kick_raw(self.fd, self.page, rounds, times)) < 0:
            raise KvmError("KVM_RUN", -answer)
        return list(times)

    def regs(self) -> Struct:
        """KVM_GET_REGS."""
        return self._get("KVM_GET_REGS", "struct kvm_regs *")

    def set_regs(self, regs: Struct) -> None:
        """KVM_SET_REGS."""
        self._ioctl("KVM_SET_REGS", regs)

    def sregs(self) -> Struct:
        """KVM_GET_SREGS."""
        return self._get("KVM_GET_SREGS", "struct kvm_sregs *")

    def set_sregs(self, sregs: Struct) -> None:
        """KVM_SET_SREGS."""
        self._ioctl("KVM_SET_SREGS", sregs)

    def set_fpu(self, fcw: int, mxcsr: int) -> None:
        """KVM_SET_FPU: empty x87 and SSE registers with these control words."""
        self._ioctl("KVM_SET_FPU", ffi.new("struct kvm_fpu *", {"fcw": fcw, "mxcsr": mxcsr}))

    def set_cpuid(self, cpuid: Struct) -> None:
        """KVM_SET_CPUID2; before the first run."""
        self._ioctl("KVM_SET_CPUID2", cpuid)

    def lapic(self) -> Struct:
        """KVM_GET_LAPIC: `regs` holds the local APIC's register page."""
        return self._get("KVM_GET_LAPIC", "struct kvm_lapic_state *")

    def set_lapic(self, lapic: Struct) -> None:
        """KVM_SET_LAPIC."""
        self._ioctl("KVM_SET_LAPIC", lapic)

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS, all or an error that names the MSR at which KVM stopped."""
        count = len(values)
        msrs = ffi.new("struct kvm_msrs *", {"nmsrs": count, "entries": count})
        for entry, (index, value) in zip(msrs.entries, values.items(), strict=False):
            entry.index, entry.data = index, value
        done = self._ioctl("KVM_SET_MSRS", msrs)
        if done < count:
            raise KvmError("KVM_SET_MSRS", errno.EINVAL, f"MSR {list(values)[done]:#x} refused")

    def msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS, all or an error that names the MSR at which KVM stopped."""
        indices = list(indices)
        count = len(indices)
        msrs = ffi.new("struct kvm_msrs *", {"nmsrs": count, "entries": count})
        for entry, index in zip(msrs.entries, indices, strict=False):
            entry.index = index
        done = self._ioctl("KVM_GET_MSRS", msrs)
        if done < count:
            raise KvmError("KVM_GET_MSRS", errno.EINVAL, f"MSR {indices[done]:#x} refused")
        return {msrs.entries[at].index: msrs.entries[at].data for at in range(count)}

    def xsave(self, size: int) -> bytes:
        """The FPU and vector registers: KVM_GET_XSAVE2, `size` by KVM_CAP_XSAVE2, or
        KVM_GET_XSAVE where that is 0."""
        area = ffi.new("uint8_t[]", size or 4096)
        self._ioctl("KVM_GET_XSAVE2" if size else "KVM_GET_XSAVE", area)
        return bytes(ffi.buffer(area))

    def set_xsave(self, data: bytes) -> None:
        """KVM_SET_XSAVE; `data` must be as long as this host's KVM has it."""
        self._ioctl("KVM_SET_XSAVE", ffi.from_buffer("uint8_t[]", data))

    def cpuid(self) -> list[tuple[int, ...]]:
        """KVM_GET_CPUID2: (function, index, flags, eax, ebx, ecx, edx) of each leaf."""
        room = 256
        cpuid = ffi.new("struct kvm_cpuid2 *", {"nent": room, "entries": room})
        self._ioctl("KVM_GET_CPUID2", cpuid)
        entries = (cpuid.entries[at] for at in range(cpuid.nent))
        return [(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries]

    def set_cpuid_leaves(self, leaves: list[tuple[int, ...]]) -> None:
        """KVM_SET_CPUID2 with what `cpuid` gave; before the first run."""
        count = len(leaves)
        cpuid = ffi.new("struct kvm_cpuid2 *", {"nent": count, "entries": count})
        for at, leaf in enumerate(leaves):
            entry = cpuid.entries[at]
            entry.function, entry.index, entry.flags = leaf[:3]
            entry.eax, entry.ebx, entry.ecx, entry.edx = leaf[3:]
        self._ioctl("KVM_SET_CPUID2", cpuid)

    def clock_paused(self) -> bool:
        """KVM_KVMCLOCK_CTRL: tell the guest's watchdogs that it stood still; False where the
        guest has no kvmclock."""
        try:
            self._ioctl_value("KVM_KVMCLOCK_CTRL")
        except KvmError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ."""
        self._ioctl_value("KVM_SET_TSC_KHZ", khz)

    def tsc_khz(self) -> int:
        """The guest's TSC frequency in kHz."""
        return self._ioctl_value("KVM_GET_TSC_KHZ")

    def tsc_offset(self) -> int | None:
        """KVM_VCPU_TSC_OFFSET: by how much the guest's TSC is ahead of the host's, modulo 2**64;
        None where this KVM does not tell (Linux before 5.16)."""
        value = ffi.new("uint64_t *")
        try:
            self._tsc_offset("KVM_HAS_DEVICE_ATTR", value)
        except KvmError:
            return None
        self._tsc_offset("KVM_GET_DEVICE_ATTR", value)
        return int(value[0])

    def set_tsc_offset(self, offset: int) -> None:
        """KVM_VCPU_TSC_OFFSET; where `tsc_offset` gives one."""
        self._tsc_offset("KVM_SET_DEVICE_ATTR", ffi.new("uint64_t *", offset))

    def _tsc_offset(self, ioctl: str, value: Struct) -> None:
        where = {"group": lib.KVM_VCPU_TSC_CTRL, "attr": lib.KVM_VCPU_TSC_OFFSET}
        address = int(ffi.cast("uintptr_t", value))
        self._ioctl(ioctl, ffi.new("struct kvm_device_attr *", {**where, "addr": address}))

    def translate(self, linear: int) -> int | None:
        """KVM_TRANSLATE: the guest-physical address of `linear`, None where it is unmapped."""
        translation = ffi.new("struct kvm_translation *", {"linear_address": linear})
        self._ioctl("KVM_TRANSLATE", translation)
        return translation.physical_address if translation.valid else None

    def close(self) -> None:
        """Unmap `kvm_run` and close; idempotent."""
        if self.fd >= 0 and hasattr(self, "_buffer"):
            self.page = self._mmio_data = ffi.NULL
            self.run = lambda: -errno.EBADF
            ffi.release(self._buffer)
            self._mapping.close()
        super().close()
