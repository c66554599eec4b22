"""A vCPU's registers and the bytes of its instruction, as text for error messages."""

from __future__ import annotations

from typing import Final

from avmm.arch.x86_64.kvm import Sregs, X86Vcpu
from avmm.errors import GuestMemoryError
from avmm.kvm import KvmError
from avmm.memory.pages import PAGE
from avmm.memory.ram import GuestMemory

_ROWS: Final = (
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "rsp", "rbp"),
    ("r8", "r9", "r10", "r11"),
    ("r12", "r13", "r14", "r15"),
)
_LONGEST_INSTRUCTION: Final = 15


def registers(vcpu: X86Vcpu, memory: GuestMemory) -> str:
    """The registers and the code, as text. Call it only while the vCPU is not inside `KVM_RUN`."""
    try:
        regs, sregs = vcpu.regs(), vcpu.sregs()
    except KvmError as error:
        return f"  the registers cannot be read: {error}"
    lines = [
        "  " + " ".join(f"{name:>3}={getattr(regs, name):016x}" for name in row) for row in _ROWS
    ]
    lines.append(
        f"  rip={regs.rip:016x} rflags={regs.rflags:08x} cs={sregs.cs.selector:04x} "
        f"base={sregs.cs.base:x} cpl={sregs.cs.dpl} {_mode(sregs)}"
    )
    lines.append(
        f"  cr0={sregs.cr0:x} cr2={sregs.cr2:x} cr3={sregs.cr3:x} cr4={sregs.cr4:x} "
        f"efer={sregs.efer:x}"
    )
    linear = sregs.cs.base + regs.rip
    code = _code(vcpu, memory, linear)
    shown = code.hex(" ") or f"none, because {linear:#x} is not mapped to guest memory"
    lines.append(f"  code at rip: {shown}")
    if text := instruction(code, regs.rip, sregs):
        lines.append(f"  instruction: {text}")
    return "\n".join(lines)


def _mode(sregs: Sregs) -> str:
    if not sregs.cr0 & 1:
        return "real mode"
    if sregs.cs.l:
        return "64-bit"
    return "32-bit" if sregs.cs.db else "16-bit protected"


def instruction(code: bytes, rip: int, sregs: Sregs) -> str:
    """The instruction at the start of `code`, as an assembler writes it. Empty if `code` does not
    start with one.
    """
    import capstone  # noqa: PLC0415 - only for a guest that has failed

    modes = {"64-bit": capstone.CS_MODE_64, "32-bit": capstone.CS_MODE_32}
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, modes.get(_mode(sregs), capstone.CS_MODE_16))
    for _, _, mnemonic, operands in disassembler.disasm_lite(code, rip, count=1):
        return f"{mnemonic} {operands}".strip()
    return ""


def _code(vcpu: X86Vcpu, memory: GuestMemory, linear: int) -> bytes:
    """As many bytes as an instruction may have, or fewer if an unmapped page follows."""
    code = b""
    while len(code) < _LONGEST_INSTRUCTION:
        here = linear + len(code)
        length = min(_LONGEST_INSTRUCTION - len(code), PAGE - here % PAGE)
        try:
            gpa = vcpu.translate(here)
            if gpa is None:
                break
            code += memory.read(gpa, length)
        except (KvmError, GuestMemoryError):
            break
    return code
