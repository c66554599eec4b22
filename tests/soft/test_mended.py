"""What Unicorn does wrong, and the engine does right (avmm/soft/native/corrections.c).

The values are a processor's. The streams of test_differential.py would show the same, where there
is a KVM to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.assembler import assemble

from avmm import arch, engine
from avmm.arch.x86_64.kvm import X86System
from avmm.engine import EngineUnavailable
from tests.soft.bare import Bare, check, ioctl, kvm
from tests.soft.streams import AF, CF, HOLE, OF, PF, SF, WILD, ZF, Stream
from tests.soft.twins import CODE, Result, Twin

DE, UD, GP, PF_VECTOR = 0, 6, 13, 14
ALL = CF | PF | AF | ZF | SF | OF
RF = 1 << 16
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    try:
        system = engine.software(arch.host())
    except EngineUnavailable as error:
        pytest.skip(str(error))
    assert isinstance(system, X86System)
    twin = Twin(system)

    def run_code(source: str, *, flags: int = 2, mxcsr: int = 0x1F80, fcw: int = 0x37F) -> Result:
        stream = Stream(0, 3, CODE, flags=flags, mxcsr=mxcsr, fcw=fcw)
        stream.code += assemble(source, origin=CODE) + b"\x0f\x0b"
        stream.regs = [0] * 16
        stream.regs[4], stream.regs[13] = 0x12_0800, WILD
        twin.load(0, stream)
        return twin.run(stream)

    yield run_code
    twin.close()
    system.close()


def xmm(result: Result, number: int) -> int:
    return int.from_bytes(result.fxsave[160 + 16 * number :][:16], "little")


def st0(result: Result) -> int:
    return int.from_bytes(result.fxsave[32:42], "little")


# ---- what has ended the process ----


@pytest.mark.parametrize("prefix", ["", "rex.w "])
def test_the_smallest_length_of_a_string(run: Run, prefix: str) -> None:
    source = "mov rax, 0x8000000080000000; mov rdx, rax; pcmpeqb xmm1, xmm1; pcmpeqb xmm2, xmm2; "
    result = run(source + prefix + "pcmpestrm xmm1, xmm2, 0x78")
    assert xmm(result, 0) == 0  # all are equal, negated
    assert result.rflags & ALL == 0


def test_the_smallest_number_divided_by_minus_one(run: Run) -> None:
    assert run("mov edx, 0x80000000; xor eax, eax; mov ecx, -1; idiv ecx").vector == DE
    assert run("mov rdx, 1; shl rdx, 63; xor eax, eax; mov rcx, -1; idiv rcx").vector == DE
    assert run("mov edx, 0x8000; xor eax, eax; mov ecx, -1; idiv cx").vector == DE
    result = run("mov edx, -1; mov eax, -7; mov ecx, 2; idiv ecx")
    assert result.regs[0] == 0xFFFF_FFFD
    assert result.regs[2] == 0xFFFF_FFFF


def test_a_fault_in_ring_3_without_a_task_register() -> None:
    with Bare(b"\x0f\x0b") as guest:
        sregs = guest.sregs()
        sregs.cs.dpl = sregs.ss.dpl = 3
        sregs.cs.selector, sregs.ss.selector = 0x1B, 0x23
        sregs.tr.present, sregs.tr.unusable = 0, 1
        sregs.idt.base, sregs.idt.limit = 0x7000, 0xFFF
        sregs.gdt.base, sregs.gdt.limit = 0x6800, 23
        guest.ram[0x6808:0x6810] = 0xAF9B000000FFFF.to_bytes(8, "little")
        guest.ram[0x7060:0x7068] = (0x8E00_0008_0000).to_bytes(8, "little")
        check(ioctl(guest.vcpus[0], kvm.KVM_SET_SREGS, sregs))
        assert guest.run() == kvm.KVM_EXIT_INTERNAL_ERROR


# ---- flags ----


@pytest.mark.parametrize("instruction", ["cmpxchg8b", "cmpxchg16b"])
def test_cmpxchg8b_keeps_the_flags(run: Run, instruction: str) -> None:
    source = f"add al, 0x7f; add al, 1; stc; {instruction} [0x100000]; pushf; pop rcx"
    result = run(source, flags=0x202)
    assert result.regs[1] & ~0x200 == 2 | CF | AF | SF | OF


def test_no_flag_comes_of_what_is_none(run: Run) -> None:
    source = "mov eax, 0x12345678; mov ecx, 1; add rax, rax; 1: loopne 1b; pushf; pop rcx"
    assert run(source).regs[1] & ~(ALL | 0x202) == 0


CONDITIONS = [
    "o",
    "no",
    "b",
    "nb",
    "e",
    "ne",
    "be",
    "nbe",
    "s",
    "ns",
    "p",
    "np",
    "l",
    "nl",
    "le",
    "nle",
]
BEFORE = (
    "mov eax, 0x7f; add al, 1",
    "mov eax, 5; cmp al, 9",
    "mov eax, 0xc1; and al, 0x81",
    "stc; mov eax, 0xff; inc al",
    "mov eax, 0x80; mov ecx, 1; shl al, cl",
    "mov eax, 0x80; add al, al; mov ecx, 0; shl al, cl",
    "mov ah, 0xd5; sahf",
)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_setcc_whose_store_faults_leaves_the_flags(
    run: Run, condition: str, before: str
) -> None:
    expected = run(before).rflags & ALL
    result = run(f"{before}; set{condition} byte ptr [{HOLE}]")
    assert (result.vector, result.rflags & ALL) == (PF_VECTOR, expected)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_setcc_to_a_device_stores_what_is_so(run: Run, condition: str, before: str) -> None:
    source = f"{before}; set{condition} dl; mov r8d, edx; mov ebx, 0xd0000000"
    # What comes between keeps the flags. The device gets what DL has.
    code = assemble(f"{source}; set{condition} byte ptr [rbx]", origin=CODE)
    with Bare(code) as guest:
        assert guest.run() == kvm.KVM_EXIT_MMIO
        _, _, size, value = guest.mmio()
        assert (size, value) == (1, guest.regs().r8 & 1)


@pytest.mark.parametrize(
    ("source", "vector", "flag"),
    [("ud2", UD, RF), ("mov eax, [r13]", GP, RF), ("int3", 3, 0), ("idiv ecx", DE, RF)],
)
def test_faults_push_rf(run: Run, source: str, vector: int, flag: int) -> None:
    result = run(source)
    assert (result.vector, result.rflags & RF) == (vector, flag)


# ---- SSE and x87 ----


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("phaddw", 0x000E_000A_0006_0002), ("phaddd", 0x000E_000A_0006_0002),
        ("phaddsw", 0x000E_000A_0006_0002), ("phsubw", 0xFFFE_FFFE_FFFE_FFFE),
        ("phsubd", 0xFFFD_FFFE_FFFD_FFFE), ("phsubsw", 0xFFFE_FFFE_FFFE_FFFE),
    ],
)  # fmt: skip
def test_one_register_for_both_operands(run: Run, instruction: str, expected: int) -> None:
    source = "mov rax, 0x0004000200020000; movq xmm1, rax; mov rax, 0x0008000600060004;"
    result = run(source + f"movq xmm2, rax; punpcklqdq xmm1, xmm2; {instruction} xmm1, xmm1")
    assert xmm(result, 1) == expected << 64 | expected


@pytest.mark.parametrize("control", [0x0C, 0x4C, 0x1C])
def test_a_string_that_ends_within_the_other(run: Run, control: int) -> None:
    """The one that is looked for is "ab"; it is not at the end of the other, "xab-a"."""
    source = "mov eax, 0x6261; movd xmm1, eax; mov rax, 0x612d626178; movq xmm2, rax;"
    result = run(source + f"pcmpistri xmm1, xmm2, {control}")
    assert result.regs[1] == {0x0C: 1, 0x4C: 1, 0x1C: 0}[control]
    assert result.rflags & ALL == CF | SF | ZF | (OF if control == 0x1C else 0)


def test_dpps_adds_in_pairs(run: Run) -> None:
    """2**24 + 1 + 1 + 1 - 2**24... of which only pairs keep the small ones."""
    source = "mov rax, 0x3f8000004b800000; movq xmm1, rax; mov rax, 0xcb8000003f800000;"
    source += "movq xmm2, rax; punpcklqdq xmm1, xmm2; mov rax, 0x3f8000003f800000;"
    source += "movq xmm2, rax; punpcklqdq xmm2, xmm2; dpps xmm1, xmm2, 0xf1"
    assert xmm(run(source), 1) == 0x3F80_0000  # (2**24 + 1) + (1 - 2**24), each rounded


def test_dppd_of_negative_zeros(run: Run) -> None:
    source = "mov rax, 1; shl rax, 63; movq xmm1, rax; punpcklqdq xmm1, xmm1;"
    source += "mov rax, 0x3ff0000000000000; movq xmm2, rax; punpcklqdq xmm2, xmm2;"
    assert xmm(run(source + "dppd xmm1, xmm2, 0x31"), 1) == 1 << 63


SMALL = "mov eax, 1; movd xmm1, eax; mov eax, 0x3f800000; movd xmm2, eax; "
"""The smallest denormal, and 1."""


@pytest.mark.parametrize(
    ("source", "mxcsr", "expected"),
    [
        ("mulss xmm1, xmm2", 0x1F80, 1), ("mulss xmm1, xmm2", 0x9F80, 0),
        ("mulss xmm1, xmm2", 0x1FC0, 0), ("minss xmm1, xmm2", 0x1F80, 1),
        ("minss xmm1, xmm2", 0x1FC0, 0), ("maxss xmm1, xmm1", 0x1FC0, 0),
    ],
)  # fmt: skip
def test_denormals(run: Run, source: str, mxcsr: int, expected: int) -> None:
    result = run(SMALL + source, mxcsr=mxcsr)
    assert xmm(result, 1) == expected
    source = SMALL + f"push 0x1f80; ldmxcsr [rsp]; push {mxcsr}; ldmxcsr [rsp]; " + source
    assert xmm(run(source), 1) == expected


@pytest.mark.parametrize("mode", range(4))
def test_constants_are_rounded(run: Run, mode: int) -> None:
    for instruction, down, nearest in (
        ("fldpi", 0x4000_C90F_DAA2_2168_C234, 1), ("fldl2t", 0x4000_D49A_784B_CD1B_8AFE, 0),
        ("fldl2e", 0x3FFF_B8AA_3B29_5C17_F0BB, 1), ("fldlg2", 0x3FFD_9A20_9A84_FBCF_F798, 1),
        ("fldln2", 0x3FFE_B172_17F7_D1CF_79AB, 1),
    ):  # fmt: skip
        expected = down + {0: nearest, 1: 0, 2: 1, 3: 0}[mode]
        assert st0(run(instruction, fcw=0x37F | mode << 10)) == expected


def test_a_signalling_nan_is_loaded_as_a_quiet_one(run: Run) -> None:
    result = run("push 0x7f800001; fld dword ptr [rsp]")
    assert st0(result) == 0x7FFF_C000_0100_0000_0000


def test_ins_shows_a_device_no_zero() -> None:
    code = assemble("mov dx, 0x80; mov edi, 0xd0000000; insd; hlt")
    with Bare(code) as guest:
        assert guest.run() == kvm.KVM_EXIT_IO
        guest.answer_io(0x1122_3344)
        assert guest.run() == kvm.KVM_EXIT_MMIO
        seen: Any = guest.mmio()
        assert seen == (1, 0xD000_0000, 4, 0x1122_3344)
        assert guest.run() == kvm.KVM_EXIT_HLT
