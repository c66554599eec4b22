"""The table of docs/engines.md: what the software engine does not do, or does otherwise.

Each row is tried here, by the test of its name. A row whose test fails is no longer true: then the
row goes, and the rule of tests/soft/streams.py with its name.
"""

from __future__ import annotations

import errno
import re
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from support.assembler import assemble

from avmm import arch, engine
from avmm.arch.x86_64.kvm import X86System
from avmm.engine import EngineUnavailable
from avmm.kvm._kvm import ffi, lib
from tests.soft import streams
from tests.soft.bare import Bare, ioctl, kicked_by, kvm, soft
from tests.soft.streams import AF, CF, DATA, HOLE, OF, PF, READ_ONLY, SF, WILD, ZF, Stream
from tests.soft.twins import CODE, Result, Twin

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "engines.md"
ROWS: Final[dict[str, Callable[..., None]]] = {}
UD, NP, SS, GP, PAGE_FAULT = 6, 11, 12, 13, 14
STATUS: Final = CF | PF | AF | ZF | SF | OF


def row(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks the test of a row."""

    def note(test: Callable[..., None]) -> Callable[..., None]:
        ROWS[name] = test
        return test

    return note


def test_the_table_has_the_rows_that_are_tried() -> None:
    names = re.findall(r"^\| `([a-z0-9-]+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert len(names) == len(set(names))
    assert sorted(names) == sorted(ROWS)


def test_what_the_streams_leave_out_of_the_engines_is_in_the_table() -> None:
    rules = {name for name, why in streams.RULES.items() if why.startswith("engine:")}
    assert rules <= set(ROWS)


@pytest.fixture(scope="module")
def system() -> Iterator[X86System]:
    try:
        found = engine.software(arch.host())
    except EngineUnavailable as error:
        pytest.skip(str(error))
    assert isinstance(found, X86System)
    yield found
    found.close()


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def run(system: X86System) -> Iterator[Run]:
    """Runs code to its UD2 or to a fault; keywords are registers, by number."""
    twin = Twin(system)

    def run_code(
        source: str | bytes,
        *,
        ring: int = 3,
        flags: int = 2,
        mxcsr: int = 0x1F80,
        fcw: int = 0x37F,
        **regs: int,
    ) -> Result:
        stream = Stream(0, ring, CODE, flags=flags, mxcsr=mxcsr, fcw=fcw)
        code = source if isinstance(source, bytes) else assemble(source, origin=CODE)
        stream.code += code + b"\x0f\x0b"
        stream.regs = [0] * 16
        stream.regs[4], stream.regs[13], stream.regs[14] = 0x12_0800, WILD, DATA
        names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
        for name, value in regs.items():
            stream.regs[names.index(name)] = value
        twin.load(0, stream)
        return twin.run(stream)

    yield run_code
    twin.close()


def word(data: bytes, at: int = 0) -> int:
    return int(struct.unpack_from("<Q", data, at)[0])


# ---- the CPU ----


@row("bmi")
def test_bmi(run: Run) -> None:
    assert run("andn rax, rcx, rdx").vector == UD
    result = run("mov eax, 7; tzcnt eax, ecx")  # a BSF, which leaves the register for 0
    assert (result.regs[0], result.rflags & ZF) == (7, ZF)
    leaf = run("mov eax, 7; xor ecx, ecx; cpuid").regs[3]
    assert not leaf & (1 << 3 | 1 << 8)


@row("avx")
def test_avx(run: Run) -> None:
    assert not run("mov eax, 1; cpuid").regs[1] & 1 << 28
    assert run("vaddps ymm0, ymm0, ymm0").vector == UD


@row("nested")
def test_nested(run: Run) -> None:
    assert not run("mov eax, 1; cpuid").regs[1] & 1 << 5
    assert not run("mov eax, 0x80000001; cpuid").regs[1] & 1 << 2
    assert run("vmrun", ring=0).vector == UD


@row("pmu")
def test_pmu(run: Run) -> None:
    assert run("rdpmc", ring=0).vector == GP
    assert run("mov ecx, 0xc1; rdmsr", ring=0).vector == GP


@row("smm")
def test_smm(system: X86System, run: Run) -> None:
    assert not lib.avmm_ioctl_value(system.fd, kvm.KVM_CHECK_EXTENSION, 117)  # KVM_CAP_X86_SMM
    assert run(b"\x0f\xaa", ring=0).vector == UD  # rsm


# ---- instructions ----


@row("cmpxchg-32")
def test_cmpxchg_32(run: Run) -> None:
    assert run("cmpxchg ecx, edx", rax=1, rcx=0x1_0000_0002).regs[1] == 2
    assert run("mov dword ptr [r14], 2; cmpxchg [r14], edx", rax=0x1_0000_0002).regs[0] == 2


@row("lock-refused")
def test_lock_refused(run: Run) -> None:
    result = run(b"\xf0\x41\x89\x06", rax=5)  # lock mov [r14], eax
    assert (result.vector, result.rip) == (UD, CODE + 4)  # that of the UD2 behind it
    assert word(result.data) & 0xFFFF_FFFF == 5


@row("lock-neg")
def test_lock_neg(run: Run) -> None:
    result = run("mov qword ptr [r14], 5; lock neg qword ptr [r14]")
    assert word(result.data) == (-5) & (1 << 64) - 1
    assert not result.rflags & SF


@row("loop-flags")
def test_loop_flags(run: Run) -> None:
    source = "mov ecx, 1; cmp eax, edx; 1: loopne 1b"
    results = [run(source, rax=a, rdx=b).rflags & STATUS for a, b in ((1, 2), (5, 3), (1, 1))]
    assert results != [CF | PF | AF | SF, 0, PF | ZF]


@row("relative-shift")
def test_relative_shift(run: Run) -> None:
    source = f"mov qword ptr [r14], 0x100; shld qword ptr [rip + {DATA - CODE - 16}], rax, 8"
    code = assemble(source, origin=CODE)
    assert len(code) == 16
    assert word(run(code).data) != 0x1_0000


@row("faults-of-changes")
def test_faults_of_changes(run: Run) -> None:
    result = run(f"inc dword ptr [{HOLE}]")
    assert (result.vector, result.error) == (PAGE_FAULT, 4)
    result = run(f"inc dword ptr [{READ_ONLY}]")
    assert (result.vector, result.error) == (PAGE_FAULT, 7)


@row("faults-of-halves")
def test_faults_of_halves(run: Run) -> None:
    source = f"xorps xmm0, xmm0; movups [{HOLE - 8}], xmm0"
    result = run(source)
    assert (result.vector, result.cr2) == (PAGE_FAULT, HOLE)
    assert word(result.data, len(result.data) - 8) == 0
    source = f"xorps xmm0, xmm0; movups xmm0, [{HOLE - 8}]"
    result = run(source)
    assert (result.vector, result.cr2) == (PAGE_FAULT, HOLE)
    assert result.fxsave[160:168] != bytes(8)


@row("stack-fault")
def test_stack_fault(run: Run) -> None:
    assert run("mov eax, [rsp]", rsp=WILD).vector == GP


@row("wild-branch")
def test_wild_branch(run: Run) -> None:
    result = run("jmp rax", rax=WILD)
    assert (result.vector, result.rip) == (GP, WILD)


@row("segment-limits")
def test_segment_limits() -> None:
    code = assemble("mov ebx, 0x12345; mov eax, [ebx]; mov dx, 0x3f8; out dx, eax", 16)
    with Bare() as guest:
        guest.ram[0x500 : 0x500 + len(code)] = code
        guest.ram[0x12345:0x12349] = b"abcd"
        sregs = guest.sregs()
        sregs.cr0, sregs.cr4, sregs.efer, sregs.cr3 = 0x10, 0, 0, 0
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            segment.base, segment.selector, segment.limit = 0, 0, 0xFFFF
            segment.db = segment.l = segment.g = 0
        assert ioctl(guest.vcpus[0], kvm.KVM_SET_SREGS, sregs) == 0
        guest.set_regs(rip=0x500, rsp=0x8000)
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.io()[3] == int.from_bytes(b"abcd", "little")


@row("alignment-check")
def test_alignment_check(run: Run) -> None:
    source = "push 0x40002; popf; mov eax, [r14 + 1]; pushf; pop rcx"
    result = run(source)
    assert (result.vector, result.regs[1] & 0x40000) == (UD, 0x40000)


@row("descriptor-bases")
def test_descriptor_bases(run: Run) -> None:
    source = "sgdt [r14]; mov rax, [r14 + 2]; mov [r14 + 18], rax; mov word ptr [r14 + 16], 55"
    source += "; bts rax, 62; mov [r14 + 34], rax; mov word ptr [r14 + 32], 55; lgdt [r14 + 32]"
    source += "; lgdt [r14 + 16]"
    assert run(source, ring=0).vector == UD  # not #GP


# ---- SSE and x87 ----


@row("sse-alignment")
def test_sse_alignment(run: Run) -> None:
    assert run("movaps xmm0, [r14 + 1]; paddb xmm0, [r14 + 3]").vector == UD


@row("mxcsr-flags")
def test_mxcsr_flags(run: Run) -> None:
    source = "mov eax, 3; cvtsi2ss xmm0, eax; mov eax, 1; cvtsi2ss xmm1, eax; divss xmm1, xmm0"
    source += "; stmxcsr [r14]"
    assert word(run(source).data) & 0x3F == 0
    assert run(source, mxcsr=0).vector == UD  # not #XM


@row("two-nans")
def test_two_nans(run: Run) -> None:
    source = "mov eax, 0x7fc00001; movd xmm0, eax; mov eax, 0x7fc00002; movd xmm1, eax"
    result = run(source + "; addss xmm0, xmm1; movd eax, xmm0")
    assert result.regs[0] == 0x7FC0_0002


@row("x87-stack")
def test_x87_stack(run: Run) -> None:
    result = run("fldz; " * 9 + "fnstsw ax")
    assert not result.regs[0] & 0x41  # neither IE nor SF
    result = run("fstp st(0); fnstsw ax")
    assert not result.regs[0] & 0x41


@row("x87-flags")
def test_x87_flags(run: Run) -> None:
    source = "fld1; fldpi; fmulp; fldpi; fldpi; fmulp; fnstsw ax"  # pi times pi is rounded
    assert not run(source).regs[0] & 0x20
    assert run(source + "; fwait", fcw=0x340).vector == UD  # unmasked, and not #MF


@row("x87-precision")
def test_x87_precision(run: Run) -> None:
    result = run("fld1; fsin; sub rsp, 16; fstp tbyte ptr [rsp]; pop rax; pop rcx")
    assert (result.regs[1] & 0xFFFF, result.regs[0] & 0x7FF) == (0x3FFE, 0)  # a double's digits
    result = run("fldpi; fld1; fldl2e; faddp; fprem; sub rsp, 16; fstp tbyte ptr [rsp]; pop rax")
    assert result.regs[0] & 0x7FF == 0


# ---- debugging ----


@row("breakpoints")
def test_breakpoints(run: Run) -> None:
    source = "lea rax, [rip + 1f]; mov dr0, rax; mov eax, 1; mov dr7, rax; nop; 1: nop"
    source += "; xor eax, eax; mov dr7, rax"
    assert run(source, ring=0).vector == UD


@row("int1")
def test_int1(run: Run) -> None:
    assert run(b"\xf1").vector == UD  # not #DB


@row("guest-debug")
def test_guest_debug() -> None:
    request = 0x4048_AE9B  # KVM_SET_GUEST_DEBUG
    with Bare() as guest:
        assert ioctl(guest.vcpus[0], request, ffi.new("char[72]")) == -errno.ENOTTY


# ---- exits and devices ----


@row("string-exits")
def test_string_exits() -> None:
    code = assemble("mov ecx, 4; mov dx, 0x80; mov esi, 0x200000; rep outsb; hlt")
    with Bare(code) as guest:
        for _ in range(4):
            assert guest.run() == kvm.KVM_EXIT_IO
            assert guest.runs[0].io.count == 1
        assert guest.run() == kvm.KVM_EXIT_HLT


@row("cmps-order")
def test_cmps_order() -> None:
    with Bare(assemble("mov esi, 0xd0000000; mov edi, 0xd0000008; cmpsd")) as guest:
        assert guest.run() == kvm.KVM_EXIT_MMIO
        assert guest.mmio()[1] == 0xD000_0008


@row("zero-of-ins")
def test_zero_of_ins() -> None:
    with Bare(assemble("mov dx, 0x80; mov edi, 0x200000; insd")) as guest:
        guest.ram[0x20_0000:0x20_0004] = b"abcd"
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.ram[0x20_0000:0x20_0004] == bytes(4)


@row("x2apic-always")
def test_x2apic_always(system: X86System) -> None:
    vm = system.create_vm()
    vm.create_irqchip(0xFEFF_C000, 0xFEFF_D000)
    vcpu = vm.create_vcpu(0)
    cpuid = system.supported_cpuid()
    for at in range(cpuid.nent):
        if cpuid.entries[at].function == 1:
            cpuid.entries[at].ecx &= ~(1 << 21 | 1 << 24)
    vcpu.set_cpuid(cpuid)
    vcpu.set_msrs({0x1B: 0xFEE0_0D00})
    assert vcpu.msrs([0x1B]) == {0x1B: 0xFEE0_0D00}
    vcpu.close()
    vm.close()


@row("pit-ticks")
def test_pit_ticks() -> None:
    """Five ticks pass while the guest does not look; it gets one."""
    from tests.soft.chips import Chips  # noqa: PLC0415 - it compiles them

    with Chips() as chips:
        chips.enable()
        chips.out(0x20, 0x11)
        chips.out(0x21, 0x20, 4, 1, 0)
        chips.apic(0x350, 0x700)  # LVT0 takes the PIC's interrupts
        chips.vm("REINJECT_CONTROL", "int *", 1)
        chips.out(0x43, 0x34)
        chips.out(0x40, 0xE8, 0x03)  # every 1000 ticks
        chips.at(chips.fake.ns + 5500 * 1_000_000_000 // 1_193_182)
        taken = 0
        while chips.take() == 0x20:
            taken += 1
            chips.out(0x20, 0x20)
        assert taken == 1


@row("one-core")
def test_one_core() -> None:
    with Bare(assemble("1: jmp 1b"), cpus=2) as guest, kicked_by(signal.SIGUSR2):
        threads = [threading.Thread(target=guest.run, args=(cpu,)) for cpu in range(2)]
        used, begin = time.process_time(), time.monotonic()
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        used, passed = time.process_time() - used, time.monotonic() - begin
        for thread in threads:
            while thread.is_alive():
                signal.pthread_kill(thread.ident or 0, signal.SIGUSR2)
                thread.join(0.01)
        assert used < 1.3 * passed


@row("paravirtual")
def test_paravirtual(run: Run) -> None:
    features = run("mov eax, 0x40000001; cpuid").regs[0]
    assert not features & (1 << 6 | 1 << 11)  # PV EOI, PV IPI
    assert features & 1 << 3  # kvmclock


@row("xen")
def test_xen(system: X86System) -> None:
    assert not system.check("KVM_CAP_XEN_HVM")


@row("vcpus")
def test_vcpus() -> None:
    with Bare() as guest:
        made = [ioctl(guest.vm, kvm.KVM_CREATE_VCPU, i) for i in range(1, 33)]
        assert all(fd >= 0 for fd in made[:-1])
        assert made[-1] == -errno.EINVAL
        for fd in made[:-1]:
            soft.lib.soft_close(fd)
