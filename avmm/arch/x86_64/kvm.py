"""What KVM has only on x86: registers, MSRs, CPUID, the PC's chips, Xen."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

from avmm.kvm._kvm import ffi, lib
from avmm.kvm.errors import KvmError
from avmm.kvm.handle import Capability, Part, fill
from avmm.kvm.system import System
from avmm.kvm.vcpu import Vcpu
from avmm.kvm.vm import Vm

if TYPE_CHECKING:
    from avmm.kvm import _kvm

Cpuid: TypeAlias = "_kvm.KvmCpuid2Pointer"
"""`struct kvm_cpuid2`: CPUID's leaves."""
Regs: TypeAlias = "_kvm.KvmRegsPointer"
"""`struct kvm_regs`: the general registers."""
Sregs: TypeAlias = "_kvm.KvmSregsPointer"
"""`struct kvm_sregs`: segments and control registers."""
Segment: TypeAlias = "_kvm.KvmSegment"
"""`struct kvm_segment`."""
Lapic: TypeAlias = "_kvm.KvmLapicStatePointer"
"""`struct kvm_lapic_state`: `regs` holds the local APIC's register page."""
LapicRegisters: TypeAlias = "_kvm.CharArray"
"""The local APIC's register page."""
Leaf: TypeAlias = tuple[int, ...]
"""A leaf of CPUID: (function, index, flags, eax, ebx, ecx, edx)."""

_MOST_LEAVES: Final = 4096
_LEAVES: Final = 256
"""More than any CPU has."""


def copy_cpuid(cpuid: Cpuid) -> Cpuid:
    """Another `struct kvm_cpuid2` with the same leaves."""
    size = ffi.sizeof("struct kvm_cpuid2") + cpuid.nent * ffi.sizeof("struct kvm_cpuid_entry2")
    copy = _room_for_leaves(cpuid.nent)
    ffi.memmove(copy, cpuid, size)
    return copy


def _room_for_leaves(count: int) -> Cpuid:
    return ffi.new("struct kvm_cpuid2 *", {"nent": count, "entries": count})


class X86System(System):
    """/dev/kvm of an x86 host."""

    REQUIRED: ClassVar[Mapping[Capability, str]] = {**System.REQUIRED, "KVM_CAP_PIT2": "2.6.33"}

    def create_vm(self) -> X86Vm:
        """A new, empty VM."""
        return X86Vm(self._ioctl_value("KVM_CREATE_VM"), self.run_size)

    def supported_cpuid(self) -> Cpuid:
        """The CPUID that this host can offer a guest (`struct kvm_cpuid2`)."""
        room = 64
        while True:
            cpuid = _room_for_leaves(room)
            try:
                self._ioctl("KVM_GET_SUPPORTED_CPUID", cpuid)
            except KvmError as error:
                if error.errno != errno.E2BIG or room > _MOST_LEAVES:
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


class X86Vm(Vm):
    """A VM with the chips of a PC."""

    PARTS: ClassVar[Mapping[str, Part]] = {
        "pit": Part("KVM_GET_PIT2", "KVM_SET_PIT2", lambda: ffi.new("struct kvm_pit_state2 *")),
    }

    def create_vcpu(self, index: int) -> X86Vcpu:
        """The vCPU number `index` (which is its APIC id too)."""
        return X86Vcpu(self._ioctl_value("KVM_CREATE_VCPU", index), index, self._run_size)

    def create_irqchip(self, identity_map: int, tss: int) -> None:
        """Create PIC, IOAPIC and a LAPIC for each vCPU, in the kernel. Call it before any vCPU is
        created.

        `identity_map` (one page) and `tss` (three pages) are guest-physical addresses that
        Intel hosts without unrestricted-guest need for themselves.
        """
        if self.check("KVM_CAP_SET_IDENTITY_MAP_ADDR"):
            self._ioctl("KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", identity_map))
        if self.check("KVM_CAP_SET_TSS_ADDR"):
            self._ioctl_value("KVM_SET_TSS_ADDR", tss)
        self._ioctl_value("KVM_CREATE_IRQCHIP")

    def create_pit(self) -> None:
        """Create the 8254 timer in the kernel, with port 0x61 as guests use it to calibrate."""
        config = ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY})
        self._ioctl("KVM_CREATE_PIT2", config)

    def irqchip(self, chip: int) -> bytes:
        """KVM_GET_IRQCHIP: the state of a PIC or of the IOAPIC."""
        state = ffi.new("struct kvm_irqchip *", {"chip_id": chip})
        return bytes(ffi.buffer(self._get("KVM_GET_IRQCHIP", state)))

    def set_irqchip(self, data: bytes) -> None:
        """KVM_SET_IRQCHIP. The data say which chip it is. Raises `ValueError` for a wrong size."""
        state = ffi.new("struct kvm_irqchip *")
        fill(state, "irqchip", data)
        self._ioctl("KVM_SET_IRQCHIP", state)

    def clock(self) -> int:
        """KVM_GET_CLOCK: the guest's kvmclock in ns."""
        return self._get("KVM_GET_CLOCK", ffi.new("struct kvm_clock_data *")).clock

    def set_clock(self, value: int) -> None:
        """KVM_SET_CLOCK: let the guest's kvmclock go on from `value`, in ns."""
        self._ioctl("KVM_SET_CLOCK", ffi.new("struct kvm_clock_data *", {"clock": value}))

    def intercept_xen(self, msr: int) -> bool:
        """KVM_XEN_HVM_CONFIG: from now on hypercalls are Xen's and cause exits. When the guest
        writes a GPA to `msr`, KVM fills the page at that address with code for making hypercalls.
        Returns False if this KVM cannot do that."""
        if not self.check("KVM_CAP_XEN_HVM") & lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL:
            return False
        config: _kvm.KvmXenHvmConfigInit = {
            "flags": lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL,
            "msr": msr,
        }
        self._ioctl("KVM_XEN_HVM_CONFIG", ffi.new("struct kvm_xen_hvm_config *", config))
        return True

    def filter_msrs(self, ranges: Sequence[tuple[int, int]]) -> None:
        """KVM_X86_SET_MSR_FILTER: accesses to the MSRs in these ranges (first, count) cause exits.
        KVM handles all other MSRs. At most `KVM_MSR_FILTER_MAX_RANGES` ranges."""
        if len(ranges) > lib.KVM_MSR_FILTER_MAX_RANGES:
            raise KvmError("KVM_X86_SET_MSR_FILTER", errno.E2BIG, f"{len(ranges)} ranges of MSRs")
        filter_ = ffi.new("struct kvm_msr_filter *", {"flags": lib.KVM_MSR_FILTER_DEFAULT_ALLOW})
        bitmaps = []  # a clear bit denies the MSR; kept alive until the ioctl has copied them
        for entry, (first, count) in zip(filter_.ranges, ranges, strict=False):
            bitmap = ffi.new("uint8_t[]", (count + 63) // 64 * 8)  # KVM copies whole longs
            bitmaps.append(bitmap)
            entry.flags = lib.KVM_MSR_FILTER_READ | lib.KVM_MSR_FILTER_WRITE
            entry.base, entry.nmsrs, entry.bitmap = first, count, bitmap + 0
        self.enable("KVM_CAP_X86_USER_SPACE_MSR", lib.KVM_MSR_EXIT_REASON_FILTER)
        self._ioctl("KVM_X86_SET_MSR_FILTER", filter_)


class X86Vcpu(Vcpu):
    """An x86 vCPU."""

    PARTS: ClassVar[Mapping[str, Part]] = {
        "regs": Part("KVM_GET_REGS", "KVM_SET_REGS", lambda: ffi.new("struct kvm_regs *")),
        "sregs": Part("KVM_GET_SREGS", "KVM_SET_SREGS", lambda: ffi.new("struct kvm_sregs *")),
        "xcrs": Part("KVM_GET_XCRS", "KVM_SET_XCRS", lambda: ffi.new("struct kvm_xcrs *")),
        "debugregs": Part(
            "KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS", lambda: ffi.new("struct kvm_debugregs *")
        ),
        "lapic": Part(
            "KVM_GET_LAPIC", "KVM_SET_LAPIC", lambda: ffi.new("struct kvm_lapic_state *")
        ),
        "mp_state": Part(
            "KVM_GET_MP_STATE", "KVM_SET_MP_STATE", lambda: ffi.new("struct kvm_mp_state *")
        ),
        "events": Part(
            "KVM_GET_VCPU_EVENTS",
            "KVM_SET_VCPU_EVENTS",
            lambda: ffi.new("struct kvm_vcpu_events *"),
        ),
    }

    def pc(self) -> int:
        """RIP."""
        return self.regs().rip

    def regs(self) -> Regs:
        """KVM_GET_REGS."""
        return self._get("KVM_GET_REGS", ffi.new("struct kvm_regs *"))

    def set_regs(self, regs: Regs) -> None:
        """KVM_SET_REGS."""
        self._ioctl("KVM_SET_REGS", regs)

    def sregs(self) -> Sregs:
        """KVM_GET_SREGS."""
        return self._get("KVM_GET_SREGS", ffi.new("struct kvm_sregs *"))

    def set_sregs(self, sregs: Sregs) -> None:
        """KVM_SET_SREGS."""
        self._ioctl("KVM_SET_SREGS", sregs)

    def set_fpu(self, fcw: int, mxcsr: int) -> None:
        """KVM_SET_FPU: empty x87 and SSE registers with these control words."""
        self._ioctl("KVM_SET_FPU", ffi.new("struct kvm_fpu *", {"fcw": fcw, "mxcsr": mxcsr}))

    def set_cpuid(self, cpuid: Cpuid) -> None:
        """KVM_SET_CPUID2. Call it before the first run."""
        self._ioctl("KVM_SET_CPUID2", cpuid)

    def lapic(self) -> Lapic:
        """KVM_GET_LAPIC: `regs` holds the local APIC's register page."""
        return self._get("KVM_GET_LAPIC", ffi.new("struct kvm_lapic_state *"))

    def set_lapic(self, lapic: Lapic) -> None:
        """KVM_SET_LAPIC."""
        self._ioctl("KVM_SET_LAPIC", lapic)

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS. Sets all of them, or raises a `KvmError` that names the MSR at which KVM
        stopped."""
        count = len(values)
        msrs = ffi.new("struct kvm_msrs *", {"nmsrs": count, "entries": count})
        for entry, (index, value) in zip(msrs.entries, values.items(), strict=False):
            entry.index, entry.data = index, value
        done = self._ioctl("KVM_SET_MSRS", msrs)
        if done < count:
            raise KvmError("KVM_SET_MSRS", errno.EINVAL, f"MSR {list(values)[done]:#x} refused")

    def msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS. Returns all of them, or raises a `KvmError` that names the MSR at which
        KVM stopped."""
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
        """The FPU and vector registers. `size` is the value of KVM_CAP_XSAVE2. If it is 0,
        KVM_GET_XSAVE is used instead of KVM_GET_XSAVE2."""
        area = ffi.new("uint8_t[]", size or ffi.sizeof("struct kvm_xsave"))
        self._ioctl("KVM_GET_XSAVE2" if size else "KVM_GET_XSAVE", area)
        return bytes(ffi.buffer(area))

    def set_xsave(self, data: bytes) -> None:
        """KVM_SET_XSAVE. `data` must be as long as what `xsave` returns on this host."""
        self._ioctl("KVM_SET_XSAVE", ffi.from_buffer("uint8_t[]", data))

    def cpuid(self) -> list[Leaf]:
        """KVM_GET_CPUID2: each leaf."""
        cpuid = self._get("KVM_GET_CPUID2", _room_for_leaves(_LEAVES))
        entries = (cpuid.entries[at] for at in range(cpuid.nent))
        return [(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries]

    def set_cpuid_leaves(self, leaves: Sequence[Leaf]) -> None:
        """KVM_SET_CPUID2 with the leaves that `cpuid` returned. Call it before the first run."""
        cpuid = _room_for_leaves(len(leaves))
        for at, leaf in enumerate(leaves):
            entry = cpuid.entries[at]
            entry.function, entry.index, entry.flags = leaf[:3]
            entry.eax, entry.ebx, entry.ecx, entry.edx = leaf[3:]
        self._ioctl("KVM_SET_CPUID2", cpuid)

    def mp_state(self) -> int:
        """KVM_GET_MP_STATE: one of KVM_MP_STATE_*."""
        return self._get("KVM_GET_MP_STATE", ffi.new("struct kvm_mp_state *")).mp_state

    def clock_paused(self) -> bool:
        """KVM_KVMCLOCK_CTRL: tell the guest's watchdogs that it stood still. Returns False if the
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
        None if this KVM does not tell (Linux before 5.16)."""
        value = ffi.new("uint64_t *")
        try:
            self._tsc_offset("KVM_HAS_DEVICE_ATTR", value)
        except KvmError:
            return None
        self._tsc_offset("KVM_GET_DEVICE_ATTR", value)
        return value[0]

    def set_tsc_offset(self, offset: int) -> None:
        """Set KVM_VCPU_TSC_OFFSET. Call it only if `tsc_offset` does not return None."""
        self._tsc_offset("KVM_SET_DEVICE_ATTR", ffi.new("uint64_t *", offset))

    def _tsc_offset(self, ioctl: _kvm.Constant, value: _kvm.Uint64Pointer) -> None:
        where: _kvm.KvmDeviceAttrInit = {
            "group": lib.KVM_VCPU_TSC_CTRL,
            "attr": lib.KVM_VCPU_TSC_OFFSET,
            "addr": int(ffi.cast("uintptr_t", value)),
        }
        self._ioctl(ioctl, ffi.new("struct kvm_device_attr *", where))

    def translate(self, linear: int) -> int | None:
        """KVM_TRANSLATE: the guest-physical address of `linear`, or None if it is unmapped."""
        translation = ffi.new("struct kvm_translation *", {"linear_address": linear})
        self._ioctl("KVM_TRANSLATE", translation)
        return translation.physical_address if translation.valid else None
