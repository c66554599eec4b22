"""Types of `avmm.kvm._kvm`, written from build.py by avmm.native.stubs: not to be edited."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, Literal, Self, TypeAlias, TypedDict, TypeVar, overload

from typing_extensions import Buffer

_Item = TypeVar("_Item")
_Decayed = TypeVar("_Decayed")

class CData:
    """A C object: a structure, a pointer, an array or a number."""

class Number(CData):
    """A pointer or number that was cast to a number."""

    def __int__(self) -> int: ...

class Address(CData):
    """A pointer, or an array, which C converts to one."""

    def __bool__(self) -> bool: ...

class Pointer(Address, Generic[_Item]):
    def __getitem__(self, at: int, /) -> _Item: ...
    def __setitem__(self, at: int, value: _Item, /) -> None: ...
    def __add__(self, items: int, /) -> Self: ...

class Array(Address, Generic[_Item, _Decayed]):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_Item]: ...
    @overload
    def __getitem__(self, at: int, /) -> _Item: ...
    @overload
    def __getitem__(self, at: slice, /) -> Self: ...
    @overload
    def __setitem__(self, at: int, value: _Item, /) -> None: ...
    @overload
    def __setitem__(self, at: slice, value: Sequence[_Item], /) -> None: ...
    def __add__(self, items: int, /) -> _Decayed: ...

class CBuffer(Buffer):
    def __len__(self) -> int: ...
    def __getitem__(self, at: slice, /) -> bytes: ...
    def __setitem__(self, at: slice, value: Buffer, /) -> None: ...

class CField:
    type: Final[CType]
    offset: Final[int]

class CType:
    fields: Final[Sequence[tuple[str, CField]]]

class CharPointer(Pointer[bytes]): ...
class CharArray(Array[bytes, CharPointer]): ...
class IntPointer(Pointer[int]): ...
class IntArray(Array[int, IntPointer]): ...
class Int32Pointer(Pointer[int]): ...
class Int32Array(Array[int, Int32Pointer]): ...
class Int64Pointer(Pointer[int]): ...
class Int64Array(Array[int, Int64Pointer]): ...
class SizePointer(Pointer[int]): ...
class SizeArray(Array[int, SizePointer]): ...
class Uint16Pointer(Pointer[int]): ...
class Uint16Array(Array[int, Uint16Pointer]): ...
class Uint32Pointer(Pointer[int]): ...
class Uint32Array(Array[int, Uint32Pointer]): ...
class Uint64Pointer(Pointer[int]): ...
class Uint64Array(Array[int, Uint64Pointer]): ...
class Uint8Pointer(Pointer[int]): ...
class Uint8Array(Array[int, Uint8Pointer]): ...
class UnsignedLongPointer(Pointer[int]): ...
class UnsignedLongArray(Array[int, UnsignedLongPointer]): ...
class UnsignedLongLongPointer(Pointer[int]): ...
class UnsignedLongLongArray(Array[int, UnsignedLongLongPointer]): ...

class KvmUserspaceMemoryRegion(CData):
    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int

class KvmUserspaceMemoryRegionPointer(
    KvmUserspaceMemoryRegion, Pointer[KvmUserspaceMemoryRegion]
): ...

class KvmUserspaceMemoryRegionInit(TypedDict, total=False):
    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int

class KvmCoalescedMmioZone(CData):
    addr: int
    size: int
    pio: int

class KvmCoalescedMmioZonePointer(KvmCoalescedMmioZone, Pointer[KvmCoalescedMmioZone]): ...

class KvmCoalescedMmioZoneInit(TypedDict, total=False):
    addr: int
    size: int
    pio: int

class KvmCoalescedMmio(CData):
    phys_addr: int
    len: int
    pio: int
    data: Uint8Array

class KvmCoalescedMmioPointer(KvmCoalescedMmio, Pointer[KvmCoalescedMmio]): ...

class KvmCoalescedMmioInit(TypedDict, total=False):
    phys_addr: int
    len: int
    pio: int
    data: Sequence[int]

class KvmCoalescedMmioRing(CData):
    first: int
    last: int

class KvmCoalescedMmioRingPointer(KvmCoalescedMmioRing, Pointer[KvmCoalescedMmioRing]): ...

class KvmCoalescedMmioRingInit(TypedDict, total=False):
    first: int
    last: int

class KvmDirtyLog(CData):
    slot: int
    dirty_bitmap: Address

class KvmDirtyLogPointer(KvmDirtyLog, Pointer[KvmDirtyLog]): ...

class KvmDirtyLogInit(TypedDict, total=False):
    slot: int
    dirty_bitmap: Address

class KvmIrqLevel(CData):
    irq: int
    level: int

class KvmIrqLevelPointer(KvmIrqLevel, Pointer[KvmIrqLevel]): ...

class KvmIrqLevelInit(TypedDict, total=False):
    irq: int
    level: int

class KvmIrqfd(CData):
    fd: int
    gsi: int
    flags: int
    resamplefd: int

class KvmIrqfdPointer(KvmIrqfd, Pointer[KvmIrqfd]): ...

class KvmIrqfdInit(TypedDict, total=False):
    fd: int
    gsi: int
    flags: int
    resamplefd: int

class KvmIoeventfd(CData):
    datamatch: int
    addr: int
    len: int
    fd: int
    flags: int

class KvmIoeventfdPointer(KvmIoeventfd, Pointer[KvmIoeventfd]): ...

class KvmIoeventfdInit(TypedDict, total=False):
    datamatch: int
    addr: int
    len: int
    fd: int
    flags: int

class KvmMsi(CData):
    address_lo: int
    address_hi: int
    data: int
    flags: int

class KvmMsiPointer(KvmMsi, Pointer[KvmMsi]): ...

class KvmMsiInit(TypedDict, total=False):
    address_lo: int
    address_hi: int
    data: int
    flags: int

class KvmIrqRoutingIrqchip(CData):
    irqchip: int
    pin: int

class KvmIrqRoutingIrqchipPointer(KvmIrqRoutingIrqchip, Pointer[KvmIrqRoutingIrqchip]): ...

class KvmIrqRoutingIrqchipInit(TypedDict, total=False):
    irqchip: int
    pin: int

class KvmIrqRoutingMsi(CData):
    address_lo: int
    address_hi: int
    data: int

class KvmIrqRoutingMsiPointer(KvmIrqRoutingMsi, Pointer[KvmIrqRoutingMsi]): ...

class KvmIrqRoutingMsiInit(TypedDict, total=False):
    address_lo: int
    address_hi: int
    data: int

class AvmmIrqTarget(CData):
    irqchip: KvmIrqRoutingIrqchip
    msi: KvmIrqRoutingMsi

class AvmmIrqTargetPointer(AvmmIrqTarget, Pointer[AvmmIrqTarget]): ...

class AvmmIrqTargetInit(TypedDict, total=False):
    irqchip: KvmIrqRoutingIrqchipInit
    msi: KvmIrqRoutingMsiInit

class KvmIrqRoutingEntry(CData):
    gsi: int
    type: int
    flags: int
    u: AvmmIrqTarget

class KvmIrqRoutingEntryPointer(KvmIrqRoutingEntry, Pointer[KvmIrqRoutingEntry]): ...
class KvmIrqRoutingEntryArray(Array[KvmIrqRoutingEntry, KvmIrqRoutingEntryPointer]): ...

class KvmIrqRoutingEntryInit(TypedDict, total=False):
    gsi: int
    type: int
    flags: int
    u: AvmmIrqTargetInit

class KvmIrqRouting(CData):
    nr: int
    entries: KvmIrqRoutingEntryArray

class KvmIrqRoutingPointer(KvmIrqRouting, Pointer[KvmIrqRouting]): ...

class KvmIrqRoutingInit(TypedDict, total=False):
    nr: int
    entries: int | Sequence[KvmIrqRoutingEntryInit]

class KvmEnableCap(CData):
    cap: int
    flags: int
    args: UnsignedLongLongArray

class KvmEnableCapPointer(KvmEnableCap, Pointer[KvmEnableCap]): ...

class KvmEnableCapInit(TypedDict, total=False):
    cap: int
    flags: int
    args: Sequence[int]

class AvmmExitHw(CData):
    hardware_exit_reason: int

class AvmmExitHwPointer(AvmmExitHw, Pointer[AvmmExitHw]): ...

class AvmmExitHwInit(TypedDict, total=False):
    hardware_exit_reason: int

class AvmmExitFailEntry(CData):
    hardware_entry_failure_reason: int

class AvmmExitFailEntryPointer(AvmmExitFailEntry, Pointer[AvmmExitFailEntry]): ...

class AvmmExitFailEntryInit(TypedDict, total=False):
    hardware_entry_failure_reason: int

class AvmmExitEx(CData):
    exception: int
    error_code: int

class AvmmExitExPointer(AvmmExitEx, Pointer[AvmmExitEx]): ...

class AvmmExitExInit(TypedDict, total=False):
    exception: int
    error_code: int

class AvmmExitIo(CData):
    direction: int
    size: int
    port: int
    count: int
    data_offset: int

class AvmmExitIoPointer(AvmmExitIo, Pointer[AvmmExitIo]): ...

class AvmmExitIoInit(TypedDict, total=False):
    direction: int
    size: int
    port: int
    count: int
    data_offset: int

class AvmmExitMmio(CData):
    phys_addr: int
    data: Uint8Array
    len: int
    is_write: int

class AvmmExitMmioPointer(AvmmExitMmio, Pointer[AvmmExitMmio]): ...

class AvmmExitMmioInit(TypedDict, total=False):
    phys_addr: int
    data: Sequence[int]
    len: int
    is_write: int

class AvmmExitInternal(CData):
    suberror: int
    ndata: int
    data: UnsignedLongLongArray

class AvmmExitInternalPointer(AvmmExitInternal, Pointer[AvmmExitInternal]): ...

class AvmmExitInternalInit(TypedDict, total=False):
    suberror: int
    ndata: int
    data: Sequence[int]

class AvmmExitEmulation(CData):
    flags: int
    insn_size: int
    insn_bytes: Uint8Array

class AvmmExitEmulationPointer(AvmmExitEmulation, Pointer[AvmmExitEmulation]): ...

class AvmmExitEmulationInit(TypedDict, total=False):
    flags: int
    insn_size: int
    insn_bytes: Sequence[int]

class AvmmExitSystemEvent(CData):
    type: int
    ndata: int

class AvmmExitSystemEventPointer(AvmmExitSystemEvent, Pointer[AvmmExitSystemEvent]): ...

class AvmmExitSystemEventInit(TypedDict, total=False):
    type: int
    ndata: int

class AvmmExitMsr(CData):
    error: int
    reason: int
    index: int
    data: int

class AvmmExitMsrPointer(AvmmExitMsr, Pointer[AvmmExitMsr]): ...

class AvmmExitMsrInit(TypedDict, total=False):
    error: int
    reason: int
    index: int
    data: int

class AvmmExitHypercall(CData):
    nr: int
    args: UnsignedLongLongArray
    ret: int
    longmode: int

class AvmmExitHypercallPointer(AvmmExitHypercall, Pointer[AvmmExitHypercall]): ...

class AvmmExitHypercallInit(TypedDict, total=False):
    nr: int
    args: Sequence[int]
    ret: int
    longmode: int

class AvmmExitOsi(CData):
    gprs: UnsignedLongLongArray

class AvmmExitOsiPointer(AvmmExitOsi, Pointer[AvmmExitOsi]): ...

class AvmmExitOsiInit(TypedDict, total=False):
    gprs: Sequence[int]

class AvmmExitPaprHcall(CData):
    nr: int
    ret: int
    args: UnsignedLongLongArray

class AvmmExitPaprHcallPointer(AvmmExitPaprHcall, Pointer[AvmmExitPaprHcall]): ...

class AvmmExitPaprHcallInit(TypedDict, total=False):
    nr: int
    ret: int
    args: Sequence[int]

class AvmmExitEpr(CData):
    epr: int

class AvmmExitEprPointer(AvmmExitEpr, Pointer[AvmmExitEpr]): ...

class AvmmExitEprInit(TypedDict, total=False):
    epr: int

class AvmmXenHcall(CData):
    longmode: int
    cpl: int
    input: int
    result: int
    params: UnsignedLongLongArray

class AvmmXenHcallPointer(AvmmXenHcall, Pointer[AvmmXenHcall]): ...

class AvmmXenHcallInit(TypedDict, total=False):
    longmode: int
    cpl: int
    input: int
    result: int
    params: Sequence[int]

class AvmmXenUnion(CData):
    hcall: AvmmXenHcall

class AvmmXenUnionPointer(AvmmXenUnion, Pointer[AvmmXenUnion]): ...

class AvmmXenUnionInit(TypedDict, total=False):
    hcall: AvmmXenHcallInit

class KvmXenExit(CData):
    type: int
    u: AvmmXenUnion

class KvmXenExitPointer(KvmXenExit, Pointer[KvmXenExit]): ...

class KvmXenExitInit(TypedDict, total=False):
    type: int
    u: AvmmXenUnionInit

class KvmRun(CData):
    immediate_exit: int
    exit_reason: int
    flags: int
    hw: AvmmExitHw
    fail_entry: AvmmExitFailEntry
    ex: AvmmExitEx
    io: AvmmExitIo
    mmio: AvmmExitMmio
    internal: AvmmExitInternal
    emulation_failure: AvmmExitEmulation
    system_event: AvmmExitSystemEvent
    msr: AvmmExitMsr
    hypercall: AvmmExitHypercall
    osi: AvmmExitOsi
    papr_hcall: AvmmExitPaprHcall
    epr: AvmmExitEpr
    xen: KvmXenExit

class KvmRunPointer(KvmRun, Pointer[KvmRun]): ...
class KvmRunArray(Array[KvmRun, KvmRunPointer]): ...

class KvmRunInit(TypedDict, total=False):
    immediate_exit: int
    exit_reason: int
    flags: int
    hw: AvmmExitHwInit
    fail_entry: AvmmExitFailEntryInit
    ex: AvmmExitExInit
    io: AvmmExitIoInit
    mmio: AvmmExitMmioInit
    internal: AvmmExitInternalInit
    emulation_failure: AvmmExitEmulationInit
    system_event: AvmmExitSystemEventInit
    msr: AvmmExitMsrInit
    hypercall: AvmmExitHypercallInit
    osi: AvmmExitOsiInit
    papr_hcall: AvmmExitPaprHcallInit
    epr: AvmmExitEprInit
    xen: KvmXenExitInit

class AvmmBridge(CData):
    bell: int
    handed: int

class AvmmBridgePointer(AvmmBridge, Pointer[AvmmBridge]): ...
class AvmmBridgeArray(Array[AvmmBridge, AvmmBridgePointer]): ...

class AvmmBridgeInit(TypedDict, total=False):
    bell: int
    handed: int

class AvmmRegister(CData):
    bytes: Uint8Pointer
    size: int
    whole: int
    answers: int
    width: int
    limit: int
    count: int

class AvmmRegisterPointer(AvmmRegister, Pointer[AvmmRegister]): ...
class AvmmRegisterArray(Array[AvmmRegister, AvmmRegisterPointer]): ...

class AvmmRegisterInit(TypedDict, total=False):
    bytes: Uint8Pointer | Uint8Array
    size: int
    whole: int
    answers: int
    width: int
    limit: int
    count: int

class AvmmWay(CData):
    tasks: int
    how: int
    of: AvmmRegisterPointer
    at: int

class AvmmWayPointer(AvmmWay, Pointer[AvmmWay]): ...

class AvmmWayInit(TypedDict, total=False):
    tasks: int
    how: int
    of: AvmmRegisterPointer | AvmmRegisterArray
    at: int

class AvmmClaim(CData):
    first: int
    end: int
    width: int
    reads: AvmmWay
    writes: AvmmWay

class AvmmClaimPointer(AvmmClaim, Pointer[AvmmClaim]): ...
class AvmmClaimArray(Array[AvmmClaim, AvmmClaimPointer]): ...

class AvmmClaimInit(TypedDict, total=False):
    first: int
    end: int
    width: int
    reads: AvmmWayInit
    writes: AvmmWayInit

class AvmmClaims(CData):
    pio_count: int
    mmio_count: int
    pio: AvmmClaimPointer
    mmio: AvmmClaimPointer

class AvmmClaimsPointer(AvmmClaims, Pointer[AvmmClaims]): ...
class AvmmClaimsArray(Array[AvmmClaims, AvmmClaimsPointer]): ...

class AvmmClaimsInit(TypedDict, total=False):
    pio_count: int
    mmio_count: int
    pio: AvmmClaimPointer | AvmmClaimArray
    mmio: AvmmClaimPointer | AvmmClaimArray

class AvmmSpot(CData):
    run: KvmRunPointer
    fd: int
    bridge: AvmmBridgePointer
    claims: AvmmClaimsPointer

class AvmmSpotPointer(AvmmSpot, Pointer[AvmmSpot]): ...
class AvmmSpotArray(Array[AvmmSpot, AvmmSpotPointer]): ...

class AvmmSpotInit(TypedDict, total=False):
    run: KvmRunPointer | KvmRunArray
    fd: int
    bridge: AvmmBridgePointer | AvmmBridgeArray
    claims: AvmmClaimsPointer | AvmmClaimsArray

class AvmmLot(CData):
    bell: int
    always: int
    count: int
    spots: AvmmSpotPointer

class AvmmLotPointer(AvmmLot, Pointer[AvmmLot]): ...

class AvmmLotInit(TypedDict, total=False):
    bell: int
    always: int
    count: int
    spots: AvmmSpotPointer | AvmmSpotArray

class KvmRegs(CData):
    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int

class KvmRegsPointer(KvmRegs, Pointer[KvmRegs]): ...

class KvmRegsInit(TypedDict, total=False):
    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int

class KvmSegment(CData):
    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int
    g: int
    avl: int
    unusable: int

class KvmSegmentPointer(KvmSegment, Pointer[KvmSegment]): ...

class KvmSegmentInit(TypedDict, total=False):
    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int
    g: int
    avl: int
    unusable: int

class KvmDtable(CData):
    base: int
    limit: int

class KvmDtablePointer(KvmDtable, Pointer[KvmDtable]): ...

class KvmDtableInit(TypedDict, total=False):
    base: int
    limit: int

class KvmSregs(CData):
    cs: KvmSegment
    ds: KvmSegment
    es: KvmSegment
    fs: KvmSegment
    gs: KvmSegment
    ss: KvmSegment
    tr: KvmSegment
    ldt: KvmSegment
    gdt: KvmDtable
    idt: KvmDtable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int

class KvmSregsPointer(KvmSregs, Pointer[KvmSregs]): ...

class KvmSregsInit(TypedDict, total=False):
    cs: KvmSegmentInit
    ds: KvmSegmentInit
    es: KvmSegmentInit
    fs: KvmSegmentInit
    gs: KvmSegmentInit
    ss: KvmSegmentInit
    tr: KvmSegmentInit
    ldt: KvmSegmentInit
    gdt: KvmDtableInit
    idt: KvmDtableInit
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int

class KvmCpuidEntry2(CData):
    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int

class KvmCpuidEntry2Pointer(KvmCpuidEntry2, Pointer[KvmCpuidEntry2]): ...
class KvmCpuidEntry2Array(Array[KvmCpuidEntry2, KvmCpuidEntry2Pointer]): ...

class KvmCpuidEntry2Init(TypedDict, total=False):
    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int

class KvmCpuid2(CData):
    nent: int
    entries: KvmCpuidEntry2Array

class KvmCpuid2Pointer(KvmCpuid2, Pointer[KvmCpuid2]): ...

class KvmCpuid2Init(TypedDict, total=False):
    nent: int
    entries: int | Sequence[KvmCpuidEntry2Init]

class KvmMsrEntry(CData):
    index: int
    data: int

class KvmMsrEntryPointer(KvmMsrEntry, Pointer[KvmMsrEntry]): ...
class KvmMsrEntryArray(Array[KvmMsrEntry, KvmMsrEntryPointer]): ...

class KvmMsrEntryInit(TypedDict, total=False):
    index: int
    data: int

class KvmMsrs(CData):
    nmsrs: int
    entries: KvmMsrEntryArray

class KvmMsrsPointer(KvmMsrs, Pointer[KvmMsrs]): ...

class KvmMsrsInit(TypedDict, total=False):
    nmsrs: int
    entries: int | Sequence[KvmMsrEntryInit]

class KvmMsrList(CData):
    nmsrs: int
    indices: Uint32Array

class KvmMsrListPointer(KvmMsrList, Pointer[KvmMsrList]): ...

class KvmMsrListInit(TypedDict, total=False):
    nmsrs: int
    indices: int | Sequence[int]

class KvmFpu(CData):
    fcw: int
    mxcsr: int

class KvmFpuPointer(KvmFpu, Pointer[KvmFpu]): ...

class KvmFpuInit(TypedDict, total=False):
    fcw: int
    mxcsr: int

class KvmLapicState(CData):
    regs: CharArray

class KvmLapicStatePointer(KvmLapicState, Pointer[KvmLapicState]): ...

class KvmLapicStateInit(TypedDict, total=False):
    regs: Sequence[bytes]

class KvmMpState(CData):
    mp_state: int

class KvmMpStatePointer(KvmMpState, Pointer[KvmMpState]): ...

class KvmMpStateInit(TypedDict, total=False):
    mp_state: int

class KvmXsave(CData): ...
class KvmXsavePointer(KvmXsave, Pointer[KvmXsave]): ...
class KvmXsaveInit(TypedDict, total=False): ...

class KvmXcrs(CData):
    nr_xcrs: int

class KvmXcrsPointer(KvmXcrs, Pointer[KvmXcrs]): ...

class KvmXcrsInit(TypedDict, total=False):
    nr_xcrs: int

class KvmDebugregs(CData): ...
class KvmDebugregsPointer(KvmDebugregs, Pointer[KvmDebugregs]): ...
class KvmDebugregsInit(TypedDict, total=False): ...
class KvmVcpuEvents(CData): ...
class KvmVcpuEventsPointer(KvmVcpuEvents, Pointer[KvmVcpuEvents]): ...
class KvmVcpuEventsInit(TypedDict, total=False): ...

class KvmClockData(CData):
    clock: int
    flags: int

class KvmClockDataPointer(KvmClockData, Pointer[KvmClockData]): ...

class KvmClockDataInit(TypedDict, total=False):
    clock: int
    flags: int

class KvmIrqchip(CData):
    chip_id: int

class KvmIrqchipPointer(KvmIrqchip, Pointer[KvmIrqchip]): ...

class KvmIrqchipInit(TypedDict, total=False):
    chip_id: int

class KvmPitState2(CData): ...
class KvmPitState2Pointer(KvmPitState2, Pointer[KvmPitState2]): ...
class KvmPitState2Init(TypedDict, total=False): ...

class KvmMsrFilterRange(CData):
    flags: int
    nmsrs: int
    base: int
    bitmap: Uint8Pointer

class KvmMsrFilterRangePointer(KvmMsrFilterRange, Pointer[KvmMsrFilterRange]): ...
class KvmMsrFilterRangeArray(Array[KvmMsrFilterRange, KvmMsrFilterRangePointer]): ...

class KvmMsrFilterRangeInit(TypedDict, total=False):
    flags: int
    nmsrs: int
    base: int
    bitmap: Uint8Pointer | Uint8Array

class KvmMsrFilter(CData):
    flags: int
    ranges: KvmMsrFilterRangeArray

class KvmMsrFilterPointer(KvmMsrFilter, Pointer[KvmMsrFilter]): ...

class KvmMsrFilterInit(TypedDict, total=False):
    flags: int
    ranges: Sequence[KvmMsrFilterRangeInit]

class KvmXenHvmConfig(CData):
    flags: int
    msr: int

class KvmXenHvmConfigPointer(KvmXenHvmConfig, Pointer[KvmXenHvmConfig]): ...

class KvmXenHvmConfigInit(TypedDict, total=False):
    flags: int
    msr: int

class KvmTranslation(CData):
    linear_address: int
    physical_address: int
    valid: int

class KvmTranslationPointer(KvmTranslation, Pointer[KvmTranslation]): ...

class KvmTranslationInit(TypedDict, total=False):
    linear_address: int
    physical_address: int
    valid: int

class KvmPitConfig(CData):
    flags: int

class KvmPitConfigPointer(KvmPitConfig, Pointer[KvmPitConfig]): ...

class KvmPitConfigInit(TypedDict, total=False):
    flags: int

class KvmDeviceAttr(CData):
    flags: int
    group: int
    attr: int
    addr: int

class KvmDeviceAttrPointer(KvmDeviceAttr, Pointer[KvmDeviceAttr]): ...

class KvmDeviceAttrInit(TypedDict, total=False):
    flags: int
    group: int
    attr: int
    addr: int

_TypeName: TypeAlias = Literal[
    "char",
    "int",
    "int32_t",
    "int64_t",
    "size_t",
    "uint16_t",
    "uint32_t",
    "uint64_t",
    "uint8_t",
    "unsigned long",
    "unsigned long long",
    "struct kvm_userspace_memory_region",
    "struct kvm_coalesced_mmio_zone",
    "struct kvm_coalesced_mmio",
    "struct kvm_coalesced_mmio_ring",
    "struct kvm_dirty_log",
    "struct kvm_irq_level",
    "struct kvm_irqfd",
    "struct kvm_ioeventfd",
    "struct kvm_msi",
    "struct kvm_irq_routing_irqchip",
    "struct kvm_irq_routing_msi",
    "avmm_irq_target",
    "struct kvm_irq_routing_entry",
    "struct kvm_irq_routing",
    "struct kvm_enable_cap",
    "avmm_exit_hw",
    "avmm_exit_fail_entry",
    "avmm_exit_ex",
    "avmm_exit_io",
    "avmm_exit_mmio",
    "avmm_exit_internal",
    "avmm_exit_emulation",
    "avmm_exit_system_event",
    "avmm_exit_msr",
    "avmm_exit_hypercall",
    "avmm_exit_osi",
    "avmm_exit_papr_hcall",
    "avmm_exit_epr",
    "avmm_xen_hcall",
    "avmm_xen_union",
    "struct kvm_xen_exit",
    "struct kvm_run",
    "struct avmm_bridge",
    "struct avmm_register",
    "struct avmm_way",
    "struct avmm_claim",
    "struct avmm_claims",
    "struct avmm_spot",
    "struct avmm_lot",
    "struct kvm_regs",
    "struct kvm_segment",
    "struct kvm_dtable",
    "struct kvm_sregs",
    "struct kvm_cpuid_entry2",
    "struct kvm_cpuid2",
    "struct kvm_msr_entry",
    "struct kvm_msrs",
    "struct kvm_msr_list",
    "struct kvm_fpu",
    "struct kvm_lapic_state",
    "struct kvm_mp_state",
    "struct kvm_xsave",
    "struct kvm_xcrs",
    "struct kvm_debugregs",
    "struct kvm_vcpu_events",
    "struct kvm_clock_data",
    "struct kvm_irqchip",
    "struct kvm_pit_state2",
    "struct kvm_msr_filter_range",
    "struct kvm_msr_filter",
    "struct kvm_xen_hvm_config",
    "struct kvm_translation",
    "struct kvm_pit_config",
    "struct kvm_device_attr",
]
Constant: TypeAlias = Literal[
    "KVM_GET_API_VERSION",
    "KVM_CREATE_VM",
    "KVM_CHECK_EXTENSION",
    "KVM_GET_VCPU_MMAP_SIZE",
    "KVM_CREATE_VCPU",
    "KVM_SET_USER_MEMORY_REGION",
    "KVM_IRQ_LINE",
    "KVM_IRQFD",
    "KVM_SIGNAL_MSI",
    "KVM_SET_GSI_ROUTING",
    "KVM_ENABLE_CAP",
    "KVM_RUN",
    "KVM_REGISTER_COALESCED_MMIO",
    "KVM_IOEVENTFD",
    "KVM_CAP_IRQCHIP",
    "KVM_CAP_USER_MEMORY",
    "KVM_CAP_NR_VCPUS",
    "KVM_CAP_NR_MEMSLOTS",
    "KVM_CAP_MP_STATE",
    "KVM_CAP_COALESCED_MMIO",
    "KVM_CAP_IRQFD",
    "KVM_CAP_IRQ_ROUTING",
    "KVM_CAP_IOEVENTFD",
    "KVM_CAP_MAX_VCPUS",
    "KVM_CAP_MAX_VCPU_ID",
    "KVM_CAP_SIGNAL_MSI",
    "KVM_CAP_READONLY_MEM",
    "KVM_CAP_IRQFD_RESAMPLE",
    "KVM_CAP_IOEVENTFD_ANY_LENGTH",
    "KVM_CAP_CHECK_EXTENSION_VM",
    "KVM_CAP_IMMEDIATE_EXIT",
    "KVM_CAP_COALESCED_PIO",
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
    "KVM_CAP_DIRTY_LOG_RING",
    "KVM_CAP_DIRTY_LOG_RING_ACQ_REL",
    "KVM_CAP_ENABLE_CAP_VM",
    "KVM_EXIT_UNKNOWN",
    "KVM_EXIT_EXCEPTION",
    "KVM_EXIT_IO",
    "KVM_EXIT_HYPERCALL",
    "KVM_EXIT_DEBUG",
    "KVM_EXIT_HLT",
    "KVM_EXIT_MMIO",
    "KVM_EXIT_IRQ_WINDOW_OPEN",
    "KVM_EXIT_SHUTDOWN",
    "KVM_EXIT_FAIL_ENTRY",
    "KVM_EXIT_INTR",
    "KVM_EXIT_SET_TPR",
    "KVM_EXIT_TPR_ACCESS",
    "KVM_EXIT_NMI",
    "KVM_EXIT_INTERNAL_ERROR",
    "KVM_EXIT_OSI",
    "KVM_EXIT_PAPR_HCALL",
    "KVM_EXIT_WATCHDOG",
    "KVM_EXIT_EPR",
    "KVM_EXIT_SYSTEM_EVENT",
    "KVM_EXIT_IOAPIC_EOI",
    "KVM_EXIT_HYPERV",
    "KVM_EXIT_DIRTY_RING_FULL",
    "KVM_EXIT_X86_RDMSR",
    "KVM_EXIT_X86_WRMSR",
    "KVM_EXIT_AP_RESET_HOLD",
    "KVM_EXIT_X86_BUS_LOCK",
    "KVM_EXIT_XEN",
    "KVM_EXIT_NOTIFY",
    "KVM_EXIT_MEMORY_FAULT",
    "KVM_EXIT_XEN_HCALL",
    "KVM_EXIT_IO_IN",
    "KVM_EXIT_IO_OUT",
    "KVM_INTERNAL_ERROR_EMULATION",
    "KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES",
    "KVM_SYSTEM_EVENT_SHUTDOWN",
    "KVM_SYSTEM_EVENT_RESET",
    "KVM_SYSTEM_EVENT_CRASH",
    "KVM_API_VERSION",
    "KVM_MEM_READONLY",
    "KVM_MEM_LOG_DIRTY_PAGES",
    "KVM_GET_DIRTY_LOG",
    "KVM_IRQ_ROUTING_IRQCHIP",
    "KVM_IRQ_ROUTING_MSI",
    "KVM_IRQFD_FLAG_DEASSIGN",
    "KVM_IRQFD_FLAG_RESAMPLE",
    "KVM_IOEVENTFD_FLAG_DATAMATCH",
    "KVM_IOEVENTFD_FLAG_PIO",
    "KVM_IOEVENTFD_FLAG_DEASSIGN",
    "KVM_GET_SUPPORTED_CPUID",
    "KVM_GET_MSR_INDEX_LIST",
    "KVM_SET_TSS_ADDR",
    "KVM_SET_IDENTITY_MAP_ADDR",
    "KVM_CREATE_IRQCHIP",
    "KVM_CREATE_PIT2",
    "KVM_GET_REGS",
    "KVM_SET_REGS",
    "KVM_GET_SREGS",
    "KVM_SET_SREGS",
    "KVM_SET_CPUID2",
    "KVM_GET_MSRS",
    "KVM_SET_MSRS",
    "KVM_GET_LAPIC",
    "KVM_SET_LAPIC",
    "KVM_GET_MP_STATE",
    "KVM_SET_MP_STATE",
    "KVM_SET_FPU",
    "KVM_GET_TSC_KHZ",
    "KVM_TRANSLATE",
    "KVM_GET_XSAVE",
    "KVM_GET_XSAVE2",
    "KVM_SET_XSAVE",
    "KVM_GET_XCRS",
    "KVM_SET_XCRS",
    "KVM_GET_DEBUGREGS",
    "KVM_SET_DEBUGREGS",
    "KVM_GET_VCPU_EVENTS",
    "KVM_SET_VCPU_EVENTS",
    "KVM_GET_CPUID2",
    "KVM_SET_TSC_KHZ",
    "KVM_KVMCLOCK_CTRL",
    "KVM_HAS_DEVICE_ATTR",
    "KVM_GET_DEVICE_ATTR",
    "KVM_SET_DEVICE_ATTR",
    "KVM_GET_CLOCK",
    "KVM_SET_CLOCK",
    "KVM_GET_IRQCHIP",
    "KVM_SET_IRQCHIP",
    "KVM_GET_PIT2",
    "KVM_SET_PIT2",
    "KVM_X86_SET_MSR_FILTER",
    "KVM_XEN_HVM_CONFIG",
    "KVM_CAP_SET_TSS_ADDR",
    "KVM_CAP_EXT_CPUID",
    "KVM_CAP_PIT2",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR",
    "KVM_CAP_ADJUST_CLOCK",
    "KVM_CAP_VCPU_EVENTS",
    "KVM_CAP_DEBUGREGS",
    "KVM_CAP_XSAVE",
    "KVM_CAP_XSAVE2",
    "KVM_CAP_XCRS",
    "KVM_CAP_TSC_CONTROL",
    "KVM_CAP_GET_TSC_KHZ",
    "KVM_CAP_TSC_DEADLINE_TIMER",
    "KVM_CAP_X86_USER_SPACE_MSR",
    "KVM_CAP_X86_MSR_FILTER",
    "KVM_CAP_EXIT_HYPERCALL",
    "KVM_CAP_XEN_HVM",
    "KVM_MSR_EXIT_REASON_FILTER",
    "KVM_MSR_FILTER_MAX_RANGES",
    "KVM_MSR_FILTER_READ",
    "KVM_MSR_FILTER_WRITE",
    "KVM_MSR_FILTER_DEFAULT_ALLOW",
    "KVM_HC_MAP_GPA_RANGE",
    "KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL",
    "KVM_PIT_SPEAKER_DUMMY",
    "KVM_IRQCHIP_PIC_MASTER",
    "KVM_IRQCHIP_PIC_SLAVE",
    "KVM_IRQCHIP_IOAPIC",
    "KVM_MP_STATE_UNINITIALIZED",
    "KVM_MP_STATE_INIT_RECEIVED",
    "KVM_MP_STATE_HALTED",
    "KVM_VCPU_TSC_CTRL",
    "KVM_VCPU_TSC_OFFSET",
]
Capability: TypeAlias = Literal[
    "KVM_CAP_IRQCHIP",
    "KVM_CAP_USER_MEMORY",
    "KVM_CAP_NR_VCPUS",
    "KVM_CAP_NR_MEMSLOTS",
    "KVM_CAP_MP_STATE",
    "KVM_CAP_COALESCED_MMIO",
    "KVM_CAP_IRQFD",
    "KVM_CAP_IRQ_ROUTING",
    "KVM_CAP_IOEVENTFD",
    "KVM_CAP_MAX_VCPUS",
    "KVM_CAP_MAX_VCPU_ID",
    "KVM_CAP_SIGNAL_MSI",
    "KVM_CAP_READONLY_MEM",
    "KVM_CAP_IRQFD_RESAMPLE",
    "KVM_CAP_IOEVENTFD_ANY_LENGTH",
    "KVM_CAP_CHECK_EXTENSION_VM",
    "KVM_CAP_IMMEDIATE_EXIT",
    "KVM_CAP_COALESCED_PIO",
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
    "KVM_CAP_DIRTY_LOG_RING",
    "KVM_CAP_DIRTY_LOG_RING_ACQ_REL",
    "KVM_CAP_ENABLE_CAP_VM",
    "KVM_CAP_SET_TSS_ADDR",
    "KVM_CAP_EXT_CPUID",
    "KVM_CAP_PIT2",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR",
    "KVM_CAP_ADJUST_CLOCK",
    "KVM_CAP_VCPU_EVENTS",
    "KVM_CAP_DEBUGREGS",
    "KVM_CAP_XSAVE",
    "KVM_CAP_XSAVE2",
    "KVM_CAP_XCRS",
    "KVM_CAP_TSC_CONTROL",
    "KVM_CAP_GET_TSC_KHZ",
    "KVM_CAP_TSC_DEADLINE_TIMER",
    "KVM_CAP_X86_USER_SPACE_MSR",
    "KVM_CAP_X86_MSR_FILTER",
    "KVM_CAP_EXIT_HYPERCALL",
    "KVM_CAP_XEN_HVM",
]

class FFI:
    NULL: Final[Address]
    errno: int
    @overload
    def new(
        self,
        c_type: Literal["struct kvm_userspace_memory_region *"],
        init: KvmUserspaceMemoryRegionInit = ...,
        /,
    ) -> KvmUserspaceMemoryRegionPointer: ...
    @overload
    def new(
        self,
        c_type: Literal["struct kvm_coalesced_mmio_zone *"],
        init: KvmCoalescedMmioZoneInit = ...,
        /,
    ) -> KvmCoalescedMmioZonePointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_coalesced_mmio *"], init: KvmCoalescedMmioInit = ..., /
    ) -> KvmCoalescedMmioPointer: ...
    @overload
    def new(
        self,
        c_type: Literal["struct kvm_coalesced_mmio_ring *"],
        init: KvmCoalescedMmioRingInit = ...,
        /,
    ) -> KvmCoalescedMmioRingPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_dirty_log *"], init: KvmDirtyLogInit = ..., /
    ) -> KvmDirtyLogPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_irq_level *"], init: KvmIrqLevelInit = ..., /
    ) -> KvmIrqLevelPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_irqfd *"], init: KvmIrqfdInit = ..., /
    ) -> KvmIrqfdPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_ioeventfd *"], init: KvmIoeventfdInit = ..., /
    ) -> KvmIoeventfdPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_msi *"], init: KvmMsiInit = ..., /
    ) -> KvmMsiPointer: ...
    @overload
    def new(
        self,
        c_type: Literal["struct kvm_irq_routing_irqchip *"],
        init: KvmIrqRoutingIrqchipInit = ...,
        /,
    ) -> KvmIrqRoutingIrqchipPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_irq_routing_msi *"], init: KvmIrqRoutingMsiInit = ..., /
    ) -> KvmIrqRoutingMsiPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_irq_target *"], init: AvmmIrqTargetInit = ..., /
    ) -> AvmmIrqTargetPointer: ...
    @overload
    def new(
        self,
        c_type: Literal["struct kvm_irq_routing_entry *"],
        init: KvmIrqRoutingEntryInit = ...,
        /,
    ) -> KvmIrqRoutingEntryPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_irq_routing *"], init: KvmIrqRoutingInit = ..., /
    ) -> KvmIrqRoutingPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_enable_cap *"], init: KvmEnableCapInit = ..., /
    ) -> KvmEnableCapPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_hw *"], init: AvmmExitHwInit = ..., /
    ) -> AvmmExitHwPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_fail_entry *"], init: AvmmExitFailEntryInit = ..., /
    ) -> AvmmExitFailEntryPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_ex *"], init: AvmmExitExInit = ..., /
    ) -> AvmmExitExPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_io *"], init: AvmmExitIoInit = ..., /
    ) -> AvmmExitIoPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_mmio *"], init: AvmmExitMmioInit = ..., /
    ) -> AvmmExitMmioPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_internal *"], init: AvmmExitInternalInit = ..., /
    ) -> AvmmExitInternalPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_emulation *"], init: AvmmExitEmulationInit = ..., /
    ) -> AvmmExitEmulationPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_system_event *"], init: AvmmExitSystemEventInit = ..., /
    ) -> AvmmExitSystemEventPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_msr *"], init: AvmmExitMsrInit = ..., /
    ) -> AvmmExitMsrPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_hypercall *"], init: AvmmExitHypercallInit = ..., /
    ) -> AvmmExitHypercallPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_osi *"], init: AvmmExitOsiInit = ..., /
    ) -> AvmmExitOsiPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_papr_hcall *"], init: AvmmExitPaprHcallInit = ..., /
    ) -> AvmmExitPaprHcallPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_exit_epr *"], init: AvmmExitEprInit = ..., /
    ) -> AvmmExitEprPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_xen_hcall *"], init: AvmmXenHcallInit = ..., /
    ) -> AvmmXenHcallPointer: ...
    @overload
    def new(
        self, c_type: Literal["avmm_xen_union *"], init: AvmmXenUnionInit = ..., /
    ) -> AvmmXenUnionPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_xen_exit *"], init: KvmXenExitInit = ..., /
    ) -> KvmXenExitPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_run *"], init: KvmRunInit = ..., /
    ) -> KvmRunPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_bridge *"], init: AvmmBridgeInit = ..., /
    ) -> AvmmBridgePointer: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_register *"], init: AvmmRegisterInit = ..., /
    ) -> AvmmRegisterPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_way *"], init: AvmmWayInit = ..., /
    ) -> AvmmWayPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_claim *"], init: AvmmClaimInit = ..., /
    ) -> AvmmClaimPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_claims *"], init: AvmmClaimsInit = ..., /
    ) -> AvmmClaimsPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_spot *"], init: AvmmSpotInit = ..., /
    ) -> AvmmSpotPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_lot *"], init: AvmmLotInit = ..., /
    ) -> AvmmLotPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_regs *"], init: KvmRegsInit = ..., /
    ) -> KvmRegsPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_segment *"], init: KvmSegmentInit = ..., /
    ) -> KvmSegmentPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_dtable *"], init: KvmDtableInit = ..., /
    ) -> KvmDtablePointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_sregs *"], init: KvmSregsInit = ..., /
    ) -> KvmSregsPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_cpuid_entry2 *"], init: KvmCpuidEntry2Init = ..., /
    ) -> KvmCpuidEntry2Pointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_cpuid2 *"], init: KvmCpuid2Init = ..., /
    ) -> KvmCpuid2Pointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_msr_entry *"], init: KvmMsrEntryInit = ..., /
    ) -> KvmMsrEntryPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_msrs *"], init: KvmMsrsInit = ..., /
    ) -> KvmMsrsPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_msr_list *"], init: KvmMsrListInit = ..., /
    ) -> KvmMsrListPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_fpu *"], init: KvmFpuInit = ..., /
    ) -> KvmFpuPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_lapic_state *"], init: KvmLapicStateInit = ..., /
    ) -> KvmLapicStatePointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_mp_state *"], init: KvmMpStateInit = ..., /
    ) -> KvmMpStatePointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_xsave *"], init: KvmXsaveInit = ..., /
    ) -> KvmXsavePointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_xcrs *"], init: KvmXcrsInit = ..., /
    ) -> KvmXcrsPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_debugregs *"], init: KvmDebugregsInit = ..., /
    ) -> KvmDebugregsPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_vcpu_events *"], init: KvmVcpuEventsInit = ..., /
    ) -> KvmVcpuEventsPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_clock_data *"], init: KvmClockDataInit = ..., /
    ) -> KvmClockDataPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_irqchip *"], init: KvmIrqchipInit = ..., /
    ) -> KvmIrqchipPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_pit_state2 *"], init: KvmPitState2Init = ..., /
    ) -> KvmPitState2Pointer: ...
    @overload
    def new(
        self,
        c_type: Literal["struct kvm_msr_filter_range *"],
        init: KvmMsrFilterRangeInit = ...,
        /,
    ) -> KvmMsrFilterRangePointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_msr_filter *"], init: KvmMsrFilterInit = ..., /
    ) -> KvmMsrFilterPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_xen_hvm_config *"], init: KvmXenHvmConfigInit = ..., /
    ) -> KvmXenHvmConfigPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_translation *"], init: KvmTranslationInit = ..., /
    ) -> KvmTranslationPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_pit_config *"], init: KvmPitConfigInit = ..., /
    ) -> KvmPitConfigPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_device_attr *"], init: KvmDeviceAttrInit = ..., /
    ) -> KvmDeviceAttrPointer: ...
    @overload
    def new(
        self,
        c_type: Literal["struct kvm_irq_routing_entry[]"],
        init: int | Sequence[KvmIrqRoutingEntryInit],
        /,
    ) -> KvmIrqRoutingEntryArray: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_run[]"], init: int | Sequence[KvmRunInit], /
    ) -> KvmRunArray: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_bridge[]"], init: int | Sequence[AvmmBridgeInit], /
    ) -> AvmmBridgeArray: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_register[]"], init: int | Sequence[AvmmRegisterInit], /
    ) -> AvmmRegisterArray: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_claim[]"], init: int | Sequence[AvmmClaimInit], /
    ) -> AvmmClaimArray: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_claims[]"], init: int | Sequence[AvmmClaimsInit], /
    ) -> AvmmClaimsArray: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_spot[]"], init: int | Sequence[AvmmSpotInit], /
    ) -> AvmmSpotArray: ...
    @overload
    def new(
        self,
        c_type: Literal["struct kvm_cpuid_entry2[]"],
        init: int | Sequence[KvmCpuidEntry2Init],
        /,
    ) -> KvmCpuidEntry2Array: ...
    @overload
    def new(
        self, c_type: Literal["struct kvm_msr_entry[]"], init: int | Sequence[KvmMsrEntryInit], /
    ) -> KvmMsrEntryArray: ...
    @overload
    def new(
        self,
        c_type: Literal["struct kvm_msr_filter_range[]"],
        init: int | Sequence[KvmMsrFilterRangeInit],
        /,
    ) -> KvmMsrFilterRangeArray: ...
    @overload
    def new(self, c_type: Literal["char *"], init: bytes = ..., /) -> CharPointer: ...
    @overload
    def new(self, c_type: Literal["char[]"], init: int | Sequence[bytes], /) -> CharArray: ...
    @overload
    def new(self, c_type: Literal["int *"], init: int = ..., /) -> IntPointer: ...
    @overload
    def new(self, c_type: Literal["int[]"], init: int | Sequence[int], /) -> IntArray: ...
    @overload
    def new(self, c_type: Literal["int32_t *"], init: int = ..., /) -> Int32Pointer: ...
    @overload
    def new(self, c_type: Literal["int32_t[]"], init: int | Sequence[int], /) -> Int32Array: ...
    @overload
    def new(self, c_type: Literal["int64_t *"], init: int = ..., /) -> Int64Pointer: ...
    @overload
    def new(self, c_type: Literal["int64_t[]"], init: int | Sequence[int], /) -> Int64Array: ...
    @overload
    def new(self, c_type: Literal["size_t *"], init: int = ..., /) -> SizePointer: ...
    @overload
    def new(self, c_type: Literal["size_t[]"], init: int | Sequence[int], /) -> SizeArray: ...
    @overload
    def new(self, c_type: Literal["uint16_t *"], init: int = ..., /) -> Uint16Pointer: ...
    @overload
    def new(self, c_type: Literal["uint16_t[]"], init: int | Sequence[int], /) -> Uint16Array: ...
    @overload
    def new(self, c_type: Literal["uint32_t *"], init: int = ..., /) -> Uint32Pointer: ...
    @overload
    def new(self, c_type: Literal["uint32_t[]"], init: int | Sequence[int], /) -> Uint32Array: ...
    @overload
    def new(self, c_type: Literal["uint64_t *"], init: int = ..., /) -> Uint64Pointer: ...
    @overload
    def new(self, c_type: Literal["uint64_t[]"], init: int | Sequence[int], /) -> Uint64Array: ...
    @overload
    def new(self, c_type: Literal["uint8_t *"], init: int = ..., /) -> Uint8Pointer: ...
    @overload
    def new(self, c_type: Literal["uint8_t[]"], init: int | Sequence[int], /) -> Uint8Array: ...
    @overload
    def new(
        self, c_type: Literal["unsigned long *"], init: int = ..., /
    ) -> UnsignedLongPointer: ...
    @overload
    def new(
        self, c_type: Literal["unsigned long[]"], init: int | Sequence[int], /
    ) -> UnsignedLongArray: ...
    @overload
    def new(
        self, c_type: Literal["unsigned long long *"], init: int = ..., /
    ) -> UnsignedLongLongPointer: ...
    @overload
    def new(
        self, c_type: Literal["unsigned long long[]"], init: int | Sequence[int], /
    ) -> UnsignedLongLongArray: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_userspace_memory_region *"], value: Address | int, /
    ) -> KvmUserspaceMemoryRegionPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_coalesced_mmio_zone *"], value: Address | int, /
    ) -> KvmCoalescedMmioZonePointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_coalesced_mmio *"], value: Address | int, /
    ) -> KvmCoalescedMmioPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_coalesced_mmio_ring *"], value: Address | int, /
    ) -> KvmCoalescedMmioRingPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_dirty_log *"], value: Address | int, /
    ) -> KvmDirtyLogPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_irq_level *"], value: Address | int, /
    ) -> KvmIrqLevelPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_irqfd *"], value: Address | int, /
    ) -> KvmIrqfdPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_ioeventfd *"], value: Address | int, /
    ) -> KvmIoeventfdPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_msi *"], value: Address | int, /
    ) -> KvmMsiPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_irq_routing_irqchip *"], value: Address | int, /
    ) -> KvmIrqRoutingIrqchipPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_irq_routing_msi *"], value: Address | int, /
    ) -> KvmIrqRoutingMsiPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_irq_target *"], value: Address | int, /
    ) -> AvmmIrqTargetPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_irq_routing_entry *"], value: Address | int, /
    ) -> KvmIrqRoutingEntryPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_irq_routing *"], value: Address | int, /
    ) -> KvmIrqRoutingPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_enable_cap *"], value: Address | int, /
    ) -> KvmEnableCapPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_hw *"], value: Address | int, /
    ) -> AvmmExitHwPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_fail_entry *"], value: Address | int, /
    ) -> AvmmExitFailEntryPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_ex *"], value: Address | int, /
    ) -> AvmmExitExPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_io *"], value: Address | int, /
    ) -> AvmmExitIoPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_mmio *"], value: Address | int, /
    ) -> AvmmExitMmioPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_internal *"], value: Address | int, /
    ) -> AvmmExitInternalPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_emulation *"], value: Address | int, /
    ) -> AvmmExitEmulationPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_system_event *"], value: Address | int, /
    ) -> AvmmExitSystemEventPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_msr *"], value: Address | int, /
    ) -> AvmmExitMsrPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_hypercall *"], value: Address | int, /
    ) -> AvmmExitHypercallPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_osi *"], value: Address | int, /
    ) -> AvmmExitOsiPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_papr_hcall *"], value: Address | int, /
    ) -> AvmmExitPaprHcallPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_exit_epr *"], value: Address | int, /
    ) -> AvmmExitEprPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_xen_hcall *"], value: Address | int, /
    ) -> AvmmXenHcallPointer: ...
    @overload
    def cast(
        self, c_type: Literal["avmm_xen_union *"], value: Address | int, /
    ) -> AvmmXenUnionPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_xen_exit *"], value: Address | int, /
    ) -> KvmXenExitPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_run *"], value: Address | int, /
    ) -> KvmRunPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_bridge *"], value: Address | int, /
    ) -> AvmmBridgePointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_register *"], value: Address | int, /
    ) -> AvmmRegisterPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_way *"], value: Address | int, /
    ) -> AvmmWayPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_claim *"], value: Address | int, /
    ) -> AvmmClaimPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_claims *"], value: Address | int, /
    ) -> AvmmClaimsPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_spot *"], value: Address | int, /
    ) -> AvmmSpotPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_lot *"], value: Address | int, /
    ) -> AvmmLotPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_regs *"], value: Address | int, /
    ) -> KvmRegsPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_segment *"], value: Address | int, /
    ) -> KvmSegmentPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_dtable *"], value: Address | int, /
    ) -> KvmDtablePointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_sregs *"], value: Address | int, /
    ) -> KvmSregsPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_cpuid_entry2 *"], value: Address | int, /
    ) -> KvmCpuidEntry2Pointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_cpuid2 *"], value: Address | int, /
    ) -> KvmCpuid2Pointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_msr_entry *"], value: Address | int, /
    ) -> KvmMsrEntryPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_msrs *"], value: Address | int, /
    ) -> KvmMsrsPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_msr_list *"], value: Address | int, /
    ) -> KvmMsrListPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_fpu *"], value: Address | int, /
    ) -> KvmFpuPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_lapic_state *"], value: Address | int, /
    ) -> KvmLapicStatePointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_mp_state *"], value: Address | int, /
    ) -> KvmMpStatePointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_xsave *"], value: Address | int, /
    ) -> KvmXsavePointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_xcrs *"], value: Address | int, /
    ) -> KvmXcrsPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_debugregs *"], value: Address | int, /
    ) -> KvmDebugregsPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_vcpu_events *"], value: Address | int, /
    ) -> KvmVcpuEventsPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_clock_data *"], value: Address | int, /
    ) -> KvmClockDataPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_irqchip *"], value: Address | int, /
    ) -> KvmIrqchipPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_pit_state2 *"], value: Address | int, /
    ) -> KvmPitState2Pointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_msr_filter_range *"], value: Address | int, /
    ) -> KvmMsrFilterRangePointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_msr_filter *"], value: Address | int, /
    ) -> KvmMsrFilterPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_xen_hvm_config *"], value: Address | int, /
    ) -> KvmXenHvmConfigPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_translation *"], value: Address | int, /
    ) -> KvmTranslationPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_pit_config *"], value: Address | int, /
    ) -> KvmPitConfigPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct kvm_device_attr *"], value: Address | int, /
    ) -> KvmDeviceAttrPointer: ...
    @overload
    def cast(self, c_type: Literal["char *"], value: Address | int, /) -> CharPointer: ...
    @overload
    def cast(self, c_type: Literal["int *"], value: Address | int, /) -> IntPointer: ...
    @overload
    def cast(self, c_type: Literal["int32_t *"], value: Address | int, /) -> Int32Pointer: ...
    @overload
    def cast(self, c_type: Literal["int64_t *"], value: Address | int, /) -> Int64Pointer: ...
    @overload
    def cast(self, c_type: Literal["size_t *"], value: Address | int, /) -> SizePointer: ...
    @overload
    def cast(self, c_type: Literal["uint16_t *"], value: Address | int, /) -> Uint16Pointer: ...
    @overload
    def cast(self, c_type: Literal["uint32_t *"], value: Address | int, /) -> Uint32Pointer: ...
    @overload
    def cast(self, c_type: Literal["uint64_t *"], value: Address | int, /) -> Uint64Pointer: ...
    @overload
    def cast(self, c_type: Literal["uint8_t *"], value: Address | int, /) -> Uint8Pointer: ...
    @overload
    def cast(
        self, c_type: Literal["unsigned long *"], value: Address | int, /
    ) -> UnsignedLongPointer: ...
    @overload
    def cast(
        self, c_type: Literal["unsigned long long *"], value: Address | int, /
    ) -> UnsignedLongLongPointer: ...
    @overload
    def cast(self, c_type: Literal["uintptr_t"], value: Address, /) -> Number: ...
    @overload
    def from_buffer(self, data: Buffer, /, require_writable: bool = ...) -> CharArray: ...
    @overload
    def from_buffer(
        self,
        c_type: Literal["struct kvm_irq_routing_entry[]"],
        data: Buffer,
        /,
        require_writable: bool = ...,
    ) -> KvmIrqRoutingEntryArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["struct kvm_run[]"], data: Buffer, /, require_writable: bool = ...
    ) -> KvmRunArray: ...
    @overload
    def from_buffer(
        self,
        c_type: Literal["struct avmm_bridge[]"],
        data: Buffer,
        /,
        require_writable: bool = ...,
    ) -> AvmmBridgeArray: ...
    @overload
    def from_buffer(
        self,
        c_type: Literal["struct avmm_register[]"],
        data: Buffer,
        /,
        require_writable: bool = ...,
    ) -> AvmmRegisterArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["struct avmm_claim[]"], data: Buffer, /, require_writable: bool = ...
    ) -> AvmmClaimArray: ...
    @overload
    def from_buffer(
        self,
        c_type: Literal["struct avmm_claims[]"],
        data: Buffer,
        /,
        require_writable: bool = ...,
    ) -> AvmmClaimsArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["struct avmm_spot[]"], data: Buffer, /, require_writable: bool = ...
    ) -> AvmmSpotArray: ...
    @overload
    def from_buffer(
        self,
        c_type: Literal["struct kvm_cpuid_entry2[]"],
        data: Buffer,
        /,
        require_writable: bool = ...,
    ) -> KvmCpuidEntry2Array: ...
    @overload
    def from_buffer(
        self,
        c_type: Literal["struct kvm_msr_entry[]"],
        data: Buffer,
        /,
        require_writable: bool = ...,
    ) -> KvmMsrEntryArray: ...
    @overload
    def from_buffer(
        self,
        c_type: Literal["struct kvm_msr_filter_range[]"],
        data: Buffer,
        /,
        require_writable: bool = ...,
    ) -> KvmMsrFilterRangeArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["char[]"], data: Buffer, /, require_writable: bool = ...
    ) -> CharArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["int[]"], data: Buffer, /, require_writable: bool = ...
    ) -> IntArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["int32_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> Int32Array: ...
    @overload
    def from_buffer(
        self, c_type: Literal["int64_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> Int64Array: ...
    @overload
    def from_buffer(
        self, c_type: Literal["size_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> SizeArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["uint16_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> Uint16Array: ...
    @overload
    def from_buffer(
        self, c_type: Literal["uint32_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> Uint32Array: ...
    @overload
    def from_buffer(
        self, c_type: Literal["uint64_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> Uint64Array: ...
    @overload
    def from_buffer(
        self, c_type: Literal["uint8_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> Uint8Array: ...
    @overload
    def from_buffer(
        self, c_type: Literal["unsigned long[]"], data: Buffer, /, require_writable: bool = ...
    ) -> UnsignedLongArray: ...
    @overload
    def from_buffer(
        self,
        c_type: Literal["unsigned long long[]"],
        data: Buffer,
        /,
        require_writable: bool = ...,
    ) -> UnsignedLongLongArray: ...
    def buffer(self, data: Address, size: int = ..., /) -> CBuffer: ...
    def sizeof(self, what: CData | CType | _TypeName, /) -> int: ...
    def typeof(self, name: _TypeName, /) -> CType: ...
    def offsetof(self, name: _TypeName, field: str, /) -> int: ...
    @overload
    def addressof(self, array: Array[_Item, _Decayed], at: int, /) -> _Decayed: ...
    @overload
    def addressof(self, lib: Lib, function: str, /) -> Address: ...
    def memmove(self, to: Address | Buffer, from_: Address | Buffer, size: int, /) -> None: ...
    def release(self, data: CData, /) -> None: ...
    def gc(
        self, data: _Decayed, destructor: Callable[[_Decayed], None], size: int, /
    ) -> _Decayed: ...

class Lib:
    KVM_GET_API_VERSION: Final[int]
    KVM_CREATE_VM: Final[int]
    KVM_CHECK_EXTENSION: Final[int]
    KVM_GET_VCPU_MMAP_SIZE: Final[int]
    KVM_CREATE_VCPU: Final[int]
    KVM_SET_USER_MEMORY_REGION: Final[int]
    KVM_IRQ_LINE: Final[int]
    KVM_IRQFD: Final[int]
    KVM_SIGNAL_MSI: Final[int]
    KVM_SET_GSI_ROUTING: Final[int]
    KVM_ENABLE_CAP: Final[int]
    KVM_RUN: Final[int]
    KVM_REGISTER_COALESCED_MMIO: Final[int]
    KVM_IOEVENTFD: Final[int]
    KVM_CAP_IRQCHIP: Final[int]
    KVM_CAP_USER_MEMORY: Final[int]
    KVM_CAP_NR_VCPUS: Final[int]
    KVM_CAP_NR_MEMSLOTS: Final[int]
    KVM_CAP_MP_STATE: Final[int]
    KVM_CAP_COALESCED_MMIO: Final[int]
    KVM_CAP_IRQFD: Final[int]
    KVM_CAP_IRQ_ROUTING: Final[int]
    KVM_CAP_IOEVENTFD: Final[int]
    KVM_CAP_MAX_VCPUS: Final[int]
    KVM_CAP_MAX_VCPU_ID: Final[int]
    KVM_CAP_SIGNAL_MSI: Final[int]
    KVM_CAP_READONLY_MEM: Final[int]
    KVM_CAP_IRQFD_RESAMPLE: Final[int]
    KVM_CAP_IOEVENTFD_ANY_LENGTH: Final[int]
    KVM_CAP_CHECK_EXTENSION_VM: Final[int]
    KVM_CAP_IMMEDIATE_EXIT: Final[int]
    KVM_CAP_COALESCED_PIO: Final[int]
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: Final[int]
    KVM_CAP_DIRTY_LOG_RING: Final[int]
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL: Final[int]
    KVM_CAP_ENABLE_CAP_VM: Final[int]
    KVM_EXIT_UNKNOWN: Final[int]
    KVM_EXIT_EXCEPTION: Final[int]
    KVM_EXIT_IO: Final[int]
    KVM_EXIT_HYPERCALL: Final[int]
    KVM_EXIT_DEBUG: Final[int]
    KVM_EXIT_HLT: Final[int]
    KVM_EXIT_MMIO: Final[int]
    KVM_EXIT_IRQ_WINDOW_OPEN: Final[int]
    KVM_EXIT_SHUTDOWN: Final[int]
    KVM_EXIT_FAIL_ENTRY: Final[int]
    KVM_EXIT_INTR: Final[int]
    KVM_EXIT_SET_TPR: Final[int]
    KVM_EXIT_TPR_ACCESS: Final[int]
    KVM_EXIT_NMI: Final[int]
    KVM_EXIT_INTERNAL_ERROR: Final[int]
    KVM_EXIT_OSI: Final[int]
    KVM_EXIT_PAPR_HCALL: Final[int]
    KVM_EXIT_WATCHDOG: Final[int]
    KVM_EXIT_EPR: Final[int]
    KVM_EXIT_SYSTEM_EVENT: Final[int]
    KVM_EXIT_IOAPIC_EOI: Final[int]
    KVM_EXIT_HYPERV: Final[int]
    KVM_EXIT_DIRTY_RING_FULL: Final[int]
    KVM_EXIT_X86_RDMSR: Final[int]
    KVM_EXIT_X86_WRMSR: Final[int]
    KVM_EXIT_AP_RESET_HOLD: Final[int]
    KVM_EXIT_X86_BUS_LOCK: Final[int]
    KVM_EXIT_XEN: Final[int]
    KVM_EXIT_NOTIFY: Final[int]
    KVM_EXIT_MEMORY_FAULT: Final[int]
    KVM_EXIT_XEN_HCALL: Final[int]
    KVM_EXIT_IO_IN: Final[int]
    KVM_EXIT_IO_OUT: Final[int]
    KVM_INTERNAL_ERROR_EMULATION: Final[int]
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: Final[int]
    KVM_SYSTEM_EVENT_SHUTDOWN: Final[int]
    KVM_SYSTEM_EVENT_RESET: Final[int]
    KVM_SYSTEM_EVENT_CRASH: Final[int]
    KVM_API_VERSION: Final[int]
    KVM_MEM_READONLY: Final[int]
    KVM_MEM_LOG_DIRTY_PAGES: Final[int]
    KVM_GET_DIRTY_LOG: Final[int]
    KVM_IRQ_ROUTING_IRQCHIP: Final[int]
    KVM_IRQ_ROUTING_MSI: Final[int]
    KVM_IRQFD_FLAG_DEASSIGN: Final[int]
    KVM_IRQFD_FLAG_RESAMPLE: Final[int]
    KVM_IOEVENTFD_FLAG_DATAMATCH: Final[int]
    KVM_IOEVENTFD_FLAG_PIO: Final[int]
    KVM_IOEVENTFD_FLAG_DEASSIGN: Final[int]
    AVMM_SERVED: Final[int]
    AVMM_TO_DEVICE: Final[int]
    AVMM_STORES: Final[int]
    AVMM_IGNORES: Final[int]
    AVMM_CLEARS: Final[int]
    AVMM_COLLECTS: Final[int]
    KVM_GET_SUPPORTED_CPUID: Final[int]
    KVM_GET_MSR_INDEX_LIST: Final[int]
    KVM_SET_TSS_ADDR: Final[int]
    KVM_SET_IDENTITY_MAP_ADDR: Final[int]
    KVM_CREATE_IRQCHIP: Final[int]
    KVM_CREATE_PIT2: Final[int]
    KVM_GET_REGS: Final[int]
    KVM_SET_REGS: Final[int]
    KVM_GET_SREGS: Final[int]
    KVM_SET_SREGS: Final[int]
    KVM_SET_CPUID2: Final[int]
    KVM_GET_MSRS: Final[int]
    KVM_SET_MSRS: Final[int]
    KVM_GET_LAPIC: Final[int]
    KVM_SET_LAPIC: Final[int]
    KVM_GET_MP_STATE: Final[int]
    KVM_SET_MP_STATE: Final[int]
    KVM_SET_FPU: Final[int]
    KVM_GET_TSC_KHZ: Final[int]
    KVM_TRANSLATE: Final[int]
    KVM_GET_XSAVE: Final[int]
    KVM_GET_XSAVE2: Final[int]
    KVM_SET_XSAVE: Final[int]
    KVM_GET_XCRS: Final[int]
    KVM_SET_XCRS: Final[int]
    KVM_GET_DEBUGREGS: Final[int]
    KVM_SET_DEBUGREGS: Final[int]
    KVM_GET_VCPU_EVENTS: Final[int]
    KVM_SET_VCPU_EVENTS: Final[int]
    KVM_GET_CPUID2: Final[int]
    KVM_SET_TSC_KHZ: Final[int]
    KVM_KVMCLOCK_CTRL: Final[int]
    KVM_HAS_DEVICE_ATTR: Final[int]
    KVM_GET_DEVICE_ATTR: Final[int]
    KVM_SET_DEVICE_ATTR: Final[int]
    KVM_GET_CLOCK: Final[int]
    KVM_SET_CLOCK: Final[int]
    KVM_GET_IRQCHIP: Final[int]
    KVM_SET_IRQCHIP: Final[int]
    KVM_GET_PIT2: Final[int]
    KVM_SET_PIT2: Final[int]
    KVM_X86_SET_MSR_FILTER: Final[int]
    KVM_XEN_HVM_CONFIG: Final[int]
    KVM_CAP_SET_TSS_ADDR: Final[int]
    KVM_CAP_EXT_CPUID: Final[int]
    KVM_CAP_PIT2: Final[int]
    KVM_CAP_SET_IDENTITY_MAP_ADDR: Final[int]
    KVM_CAP_ADJUST_CLOCK: Final[int]
    KVM_CAP_VCPU_EVENTS: Final[int]
    KVM_CAP_DEBUGREGS: Final[int]
    KVM_CAP_XSAVE: Final[int]
    KVM_CAP_XSAVE2: Final[int]
    KVM_CAP_XCRS: Final[int]
    KVM_CAP_TSC_CONTROL: Final[int]
    KVM_CAP_GET_TSC_KHZ: Final[int]
    KVM_CAP_TSC_DEADLINE_TIMER: Final[int]
    KVM_CAP_X86_USER_SPACE_MSR: Final[int]
    KVM_CAP_X86_MSR_FILTER: Final[int]
    KVM_CAP_EXIT_HYPERCALL: Final[int]
    KVM_CAP_XEN_HVM: Final[int]
    KVM_MSR_EXIT_REASON_FILTER: Final[int]
    KVM_MSR_FILTER_MAX_RANGES: Final[int]
    KVM_MSR_FILTER_READ: Final[int]
    KVM_MSR_FILTER_WRITE: Final[int]
    KVM_MSR_FILTER_DEFAULT_ALLOW: Final[int]
    KVM_HC_MAP_GPA_RANGE: Final[int]
    KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL: Final[int]
    KVM_PIT_SPEAKER_DUMMY: Final[int]
    KVM_IRQCHIP_PIC_MASTER: Final[int]
    KVM_IRQCHIP_PIC_SLAVE: Final[int]
    KVM_IRQCHIP_IOAPIC: Final[int]
    KVM_MP_STATE_UNINITIALIZED: Final[int]
    KVM_MP_STATE_INIT_RECEIVED: Final[int]
    KVM_MP_STATE_HALTED: Final[int]
    KVM_VCPU_TSC_CTRL: Final[int]
    KVM_VCPU_TSC_OFFSET: Final[int]
    def avmm_engine_set(self, arg0: int, arg1: int, arg2: int, arg3: int, /) -> None: ...
    def avmm_close(self, arg0: int, /) -> int: ...
    def avmm_map(self, arg0: int, arg1: int, /) -> int: ...
    def avmm_unmap(self, arg0: KvmRunPointer | KvmRunArray, arg1: int, /) -> None: ...
    def avmm_ioctl(self, arg0: int, arg1: int, arg2: Address, /) -> int: ...
    def avmm_ioctl_value(self, arg0: int, arg1: int, arg2: int, /) -> int: ...
    def avmm_run(self, arg0: int, arg1: KvmRunPointer | KvmRunArray, /) -> int: ...
    def avmm_run_raw(
        self,
        arg0: int,
        arg1: KvmRunPointer | KvmRunArray,
        arg2: CharPointer | CharArray,
        arg3: int,
        /,
    ) -> int: ...
    def avmm_ring_peek(
        self, arg0: KvmCoalescedMmioRingPointer, arg1: KvmCoalescedMmioPointer, /
    ) -> int: ...
    def avmm_ring_drop(self, arg0: KvmCoalescedMmioRingPointer, /) -> None: ...
    def avmm_kick_install(self) -> int: ...
    def avmm_kick_accept(self) -> int: ...
    def avmm_kick(self, arg0: int, /) -> int: ...
    def avmm_kick_raw(
        self,
        arg0: int,
        arg1: KvmRunPointer | KvmRunArray,
        arg2: int,
        arg3: Int64Pointer | Int64Array,
        /,
    ) -> int: ...
    def avmm_bridge_call(
        self, arg0: AvmmBridgePointer | AvmmBridgeArray, arg1: int, /
    ) -> None: ...
    def avmm_bridge_poll(self, arg0: AvmmBridgePointer | AvmmBridgeArray, arg1: int, /) -> int: ...
    def avmm_bridge_woken(self, arg0: AvmmBridgePointer | AvmmBridgeArray, /) -> int: ...
    def avmm_bridge_answer(self, arg0: AvmmBridgePointer | AvmmBridgeArray, /) -> None: ...
    def avmm_bridge_answer_and_poll(
        self, arg0: AvmmBridgePointer | AvmmBridgeArray, arg1: int, /
    ) -> int: ...
    def avmm_bridge_leave(self, arg0: AvmmBridgePointer | AvmmBridgeArray, /) -> None: ...
    def avmm_register_init(self, arg0: AvmmRegisterPointer | AvmmRegisterArray, /) -> None: ...
    def avmm_register_read(
        self,
        arg0: AvmmRegisterPointer | AvmmRegisterArray,
        arg1: int,
        arg2: int,
        arg3: Uint64Pointer | Uint64Array,
        /,
    ) -> int: ...
    def avmm_register_write(
        self,
        arg0: AvmmRegisterPointer | AvmmRegisterArray,
        arg1: int,
        arg2: int,
        arg3: int,
        arg4: int,
        /,
    ) -> int: ...
    def avmm_register_change(
        self, arg0: AvmmRegisterPointer | AvmmRegisterArray, arg1: int, arg2: int, arg3: int, /
    ) -> int: ...
    def avmm_register_answer(
        self, arg0: AvmmRegisterPointer | AvmmRegisterArray, arg1: int, arg2: int, arg3: int, /
    ) -> None: ...
    def avmm_register_copy(
        self,
        arg0: AvmmRegisterPointer | AvmmRegisterArray,
        arg1: Uint8Pointer | Uint8Array,
        arg2: int,
        arg3: int,
        arg4: int,
        /,
    ) -> None: ...
    def avmm_register_push(
        self, arg0: AvmmRegisterPointer | AvmmRegisterArray, arg1: int, /
    ) -> int: ...
    def avmm_register_limit(
        self, arg0: AvmmRegisterPointer | AvmmRegisterArray, arg1: int, /
    ) -> None: ...
    def avmm_register_take(
        self,
        arg0: AvmmRegisterPointer | AvmmRegisterArray,
        arg1: Uint8Pointer | Uint8Array,
        arg2: int,
        arg3: int,
        /,
    ) -> int: ...
    def avmm_register_fill(
        self,
        arg0: AvmmRegisterPointer | AvmmRegisterArray,
        arg1: Uint8Pointer | Uint8Array,
        arg2: int,
        /,
    ) -> None: ...
    def avmm_lot_init(self, arg0: AvmmLotPointer, /) -> None: ...
    def avmm_lot_ask(self, arg0: AvmmLotPointer, /) -> int: ...
    def avmm_lot_release(self, arg0: AvmmLotPointer, /) -> None: ...
    def avmm_lot_poll(self, arg0: AvmmLotPointer, arg1: int, /) -> int: ...
    def avmm_lot_woken(self, arg0: AvmmLotPointer, /) -> None: ...
    def avmm_spot_enter(self, arg0: AvmmSpotPointer | AvmmSpotArray, /) -> None: ...
    def avmm_spot_park(self, arg0: AvmmSpotPointer | AvmmSpotArray, /) -> None: ...
    def avmm_spot_leave(self, arg0: AvmmSpotPointer | AvmmSpotArray, /) -> None: ...
    def avmm_spot_stop(self, arg0: AvmmSpotPointer | AvmmSpotArray, /) -> int: ...
    def avmm_spot_is_parked(self, arg0: AvmmSpotPointer | AvmmSpotArray, /) -> int: ...
    def avmm_spot_run(self, arg0: AvmmSpotPointer | AvmmSpotArray, /) -> int: ...

ffi: FFI
lib: Lib
