"""Runs a stream of instructions (tests/soft/streams.py) on a processor of KVM's or the software
engine's, and says what came of it."""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import capstone

from avmm.arch.x86_64.kvm import X86System
from avmm.kvm._kvm import ffi, lib
from tests.soft import streams
from tests.soft.streams import DATA, DATA_SIZE, READ_ONLY, STACK, STACK_SIZE, SUPERVISOR, Stream

_TABLES, _GDT, _IDT, _TSS, _ENTRY, _HANDLERS = 0x1000, 0x5000, 0x6000, 0x7000, 0x9000, 0xA000
_HANDLERS_STACK: Final = 0xC000
CODE, CODE_SIZE, STEP = 0x20_0000, 0x20_0000, 1024
"""Where the streams are, each `STEP` after the one before."""
MOST: Final = CODE_SIZE // STEP
_CS, _SS = {0: 0x08, 3: 0x1B}, {0: 0x10, 3: 0x23}
_NAMES: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
_FXSAVE: Final = 512


@dataclass(frozen=True)
class Result:
    """What a stream has come to."""

    vector: int
    error: int
    """-1: none was pushed."""
    rip: int
    rflags: int
    cr2: int
    regs: tuple[int, ...]
    fxsave: bytes
    data: bytes
    stack: bytes


class UnexpectedExit(Exception):
    """A stream has come to another end than a fault."""


class Twin:
    """One processor with the guest in which streams run.

    A stream begins with IRETQ. Any exception ends it, in a handler that is a HLT, on a stack of
    its own; so no register changes, and what the processor has pushed is read from there.
    """

    def __init__(self, system: X86System) -> None:
        self._ram = mmap.mmap(-1, CODE + CODE_SIZE)
        self._view = memoryview(self._ram)
        self._vm = system.create_vm()
        self._vm.set_memory(0, 0, self._view)
        self._vcpu = self._vm.create_vcpu(0)
        self._vcpu.set_cpuid(system.supported_cpuid())
        self._size = system.check("KVM_CAP_XSAVE2") or 4096
        self._regs = ffi.new("struct kvm_regs *")
        self._watch: Any = None
        if system.watcher:
            self._watch = ffi.cast("void (*)(int, const void *, uint64_t)", system.watcher)
        self._address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._view)))
        self._set_up()

    def close(self) -> None:
        self._vcpu.close()
        self._vm.close()
        self._view.release()

    def _set_up(self) -> None:
        put = self._put
        put(_TABLES, struct.pack("<Q", _TABLES + 0x1000 | 7))
        put(_TABLES + 0x1000, struct.pack("<Q", _TABLES + 0x2000 | 7))
        put(_TABLES + 0x2000, struct.pack("<QQ", _TABLES + 0x3000 | 7, CODE | 0x87))
        users = [*range(DATA, DATA + DATA_SIZE, 4096), *range(STACK, STACK + STACK_SIZE, 4096)]
        for page in range(0, CODE, 4096):
            rights = 7 if page in users else 5 if page == READ_ONLY else 3 if page < DATA else 0
            put(_TABLES + 0x3000 + page // 512, struct.pack("<Q", page | rights if rights else 0))
        assert SUPERVISOR < DATA
        tss = 0x00008B00_00000067 | (_TSS & 0xFFFFFF) << 16
        gdt = (0, 0xAF9B000000FFFF, 0xCF93000000FFFF, 0xAFFB000000FFFF, 0xCFF3000000FFFF, tss, 0)
        absent = (0xCF73000000FFFF, 0xAF7B000000FFFF, 0x0000890000000067 & ~(1 << 47), 0)
        put(_GDT, struct.pack("<11Q", *gdt, *absent))
        put(_TSS, bytes(36) + struct.pack("<Q", _HANDLERS_STACK) + bytes(58) + b"\x68\0")
        for vector in range(32):
            at = _HANDLERS + 16 * vector
            put(at, b"\xf4")
            kind = 0xEE if vector == 3 else 0x8E
            gate = struct.pack("<HHBBHII", at & 0xFFFF, 8, 1, kind, at >> 16, 0, 0)
            put(_IDT + 16 * vector, gate)
        put(_ENTRY, b"\x48\xcf")
        sregs = self._vcpu.sregs()
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 0x23
            segment.type, segment.present, segment.dpl, segment.s = 3, 1, 3, 1
            segment.g, segment.db, segment.l, segment.unusable = 1, 1, 0, 0
        for segment, kind in ((sregs.cs, 11), (sregs.ss, 3)):
            segment.type, segment.dpl, segment.selector = kind, 0, 8 if kind == 11 else 0x10
        sregs.cs.l, sregs.cs.db = 1, 0
        sregs.gdt.base, sregs.gdt.limit = _GDT, 11 * 8 - 1
        sregs.idt.base, sregs.idt.limit = _IDT, 32 * 16 - 1
        sregs.tr.base, sregs.tr.limit, sregs.tr.selector = _TSS, 0x67, 0x28
        sregs.tr.type, sregs.tr.present, sregs.tr.s, sregs.tr.unusable = 11, 1, 0, 0
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x8005_0033, _TABLES, 0x620, 0xD01
        self._vcpu.set_sregs(sregs)

    def map(self, page: int, entry: int) -> None:
        """Set the entry of a 4 KiB page below `CODE`, before anything has run."""
        self._put(_TABLES + 0x3000 + page // 512, struct.pack("<Q", entry))

    def map_wrongly(self) -> None:
        """At 512 GiB: an entry with a bit that must be 0."""
        self._put(_TABLES + 8, struct.pack("<Q", _TABLES + 0x1000 | 0x87))

    def set_cr4(self, bits: int) -> None:
        """Set more bits of CR4. The code is then a supervisor's."""
        self._put(_TABLES + 0x2008, struct.pack("<Q", CODE | 0x83))
        sregs = self._vcpu.sregs()
        sregs.cr4 |= bits
        self._vcpu.set_sregs(sregs)

    def _put(self, at: int, data: bytes) -> None:
        self._ram[at : at + len(data)] = data

    def load(self, place: int, stream: Stream) -> None:
        """Put a stream at the place for which it was made."""
        at = CODE + STEP * place
        assert stream.origin == at and len(stream.code) < STEP
        self._put(at, bytes(stream.code))
        if self._watch is not None:
            self._watch(self._vm.fd, ffi.cast("void *", self._address + at), STEP)

    def run(self, stream: Stream) -> Result:
        data, stack, vectors = _memory_of(stream)
        self._put(DATA, data)
        self._put(STACK, stack)
        self._vcpu.set_xsave(vectors.ljust(self._size, b"\0"))
        frame = (stream.origin, _CS[stream.ring], stream.flags, stream.regs[4], _SS[stream.ring])
        self._put(_HANDLERS_STACK - 40, struct.pack("<5Q", *frame))
        regs = self._regs
        for name, value in zip(_NAMES, stream.regs, strict=True):
            setattr(regs, name, value)
        regs.rip, regs.rsp, regs.rflags = _ENTRY, _HANDLERS_STACK - 40, 2
        self._vcpu.set_regs(regs)
        reason = self._vcpu.run()
        if reason != lib.KVM_EXIT_HLT:
            raise UnexpectedExit(f"seed {stream.seed}: {reason}, {self._vcpu.page.exit()}")
        return self._result(stream)

    def _result(self, stream: Stream) -> Result:
        regs = self._vcpu.regs()
        vector = (regs.rip - _HANDLERS) // 16
        frame = struct.unpack("<6Q", self._ram[_HANDLERS_STACK - 48 : _HANDLERS_STACK])
        has_error = regs.rsp == _HANDLERS_STACK - 48  # it has not, if it comes of an INT
        if not has_error and regs.rsp != _HANDLERS_STACK - 40:  # its own HLT
            raise UnexpectedExit(f"seed {stream.seed}: halted at {regs.rip:#x}")
        values = [getattr(regs, name) for name in _NAMES]
        values[4] = frame[4]
        return Result(
            vector,
            frame[0] if has_error else -1,
            frame[1],
            frame[3],
            self._vcpu.sregs().cr2 if vector == 14 else 0,
            tuple(values),
            self._vcpu.xsave(self._size)[:_FXSAVE],
            self._ram[DATA : DATA + DATA_SIZE],
            self._ram[STACK : STACK + STACK_SIZE],
        )


_pool: Final = random.Random(1).randbytes(1 << 16)
_FLOATS: Final = (
    *(struct.pack("<f", value) for value in (0.0, -0.0, 1.0, -1.5, 3e38, 1e-38, 1e-42, 7.25)),
    *(b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\0\0\xc0\x7f", b"\1\0\x80\x7f", b"\x0b\0\xc0\xff"),
)
_DOUBLES: Final = (
    *(struct.pack("<d", value) for value in (0.0, -0.0, 1.0, -1.5, 1e308, 1e-308, 1e-320, 7.25)),
    *(bytes(6) + end for end in (b"\xf0\x7f", b"\xf0\xff", b"\xf8\x7f", b"\xf9\xff")),
    b"\1" + bytes(5) + b"\xf0\x7f",
)


def _memory_of(stream: Stream) -> tuple[bytes, bytes, bytes]:
    """What data, stack and the FPU hold at its start: random, with numbers among it."""
    rng = random.Random(stream.seed ^ 0x5EED)
    data = bytearray(_chunk(rng, DATA_SIZE))
    for at in range(0, DATA_SIZE, 256):
        data[at : at + 32] = _numbers(rng, 32)
    area = bytearray(576)
    struct.pack_into("<H", area, 0, stream.fcw)
    struct.pack_into("<II", area, 24, stream.mxcsr, 0xFFFF)
    for at in range(160, 416, 16):
        area[at : at + 16] = _numbers(rng, 16) if rng.random() < 0.7 else rng.randbytes(16)
    area[512] = 3
    return bytes(data), _chunk(rng, STACK_SIZE), bytes(area)


def _chunk(rng: random.Random, size: int) -> bytes:
    at = rng.randrange(len(_pool) - size)
    return _pool[at : at + size]


def _numbers(rng: random.Random, size: int) -> bytes:
    """Floats or doubles; some are of an ordinary size, some special."""
    if rng.random() < 0.5:
        made = [
            rng.choice(_FLOATS)
            if rng.random() < 0.4
            else struct.pack("<f", rng.uniform(-4, 4) * 2.0 ** rng.randrange(-20, 20))
            for _ in range(size // 4)
        ]
    else:
        made = [
            rng.choice(_DOUBLES)
            if rng.random() < 0.4
            else struct.pack("<d", rng.uniform(-4, 4) * 2.0 ** rng.randrange(-40, 40))
            for _ in range(size // 8)
        ]
    return b"".join(made)


_FSW_COMPARED: Final = 0x3800
"""TOP. The rest: docs/engines.md, and what is undefined."""


def differences(stream: Stream, one: Result, other: Result) -> list[str]:
    """What differs, of all that must not."""
    found = []

    def compare(what: str, here: int, there: int) -> None:
        if here != there:
            found.append(f"{what}: {here:#x}, {there:#x}")

    compare("vector", one.vector, other.vector)
    compare("error code", one.error, other.error)
    compare("RIP", one.rip - stream.origin, other.rip - stream.origin)
    if found:
        return found
    compare("CR2", one.cr2, other.cr2)
    undefined = stream.undefined_at(one.rip - stream.origin)
    compare("RFLAGS", one.rflags & ~undefined, other.rflags & ~undefined)
    for name, here, there in zip(_NAMES, one.regs, other.regs, strict=True):
        compare(name, here, there)
    word = lambda result, at: struct.unpack_from("<H", result.fxsave, at)[0]  # noqa: E731
    compare("FCW", word(one, 0), word(other, 0))
    compare("FSW", word(one, 2) & _FSW_COMPARED, word(other, 2) & _FSW_COMPARED)
    compare("FTW", one.fxsave[4], other.fxsave[4])
    compare("MXCSR", word(one, 24) & ~0x3F, word(other, 24) & ~0x3F)
    for at in range(8):
        if one.fxsave[4] >> (at + (word(one, 2) >> 11)) % 8 & 1:
            here, there = (r.fxsave[32 + 16 * at : 42 + 16 * at] for r in (one, other))
            compare(f"ST{at}", int.from_bytes(here, "little"), int.from_bytes(there, "little"))
    for at in range(16):
        here, there = (r.fxsave[160 + 16 * at : 176 + 16 * at] for r in (one, other))
        compare(f"XMM{at}", int.from_bytes(here, "little"), int.from_bytes(there, "little"))
    for what, mine, theirs in (("data", one.data, other.data), ("stack", one.stack, other.stack)):
        if mine != theirs:
            at = next(i for i in range(len(mine)) if mine[i] != theirs[i])
            at &= ~7
            compare(
                f"{what}+{at:#x}",
                *(int.from_bytes(m[at : at + 8], "little") for m in (mine, theirs)),
            )
    return found


def disassembly(code: bytes, at: int) -> str:
    """The instruction there, with its bytes."""
    machine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    text = " ".join(f"{found.mnemonic} {found.op_str}" for found in machine.disasm(code, at))
    return f"{code.hex()} {text}"


def first_wrong(one: Twin, other: Twin, stream: Stream) -> str:
    """The first instruction after which the two differ, and how. The stream is ended after each
    in turn."""
    whole, place = bytes(stream.code), (stream.origin - CODE) // STEP
    ends = [mark.offset for mark in stream.marks[1:]]
    try:
        for start, end in pairwise((0, *ends)):
            stream.code[:] = whole[:end] + b"\x0f\x0b"
            one.load(place, stream)
            other.load(place, stream)
            if wrong := differences(stream, one.run(stream), other.run(stream)):
                return (
                    f"{disassembly(whole[start:end], stream.origin + start)}: {'; '.join(wrong)}"
                )
    finally:
        stream.code[:] = whole
    return "only at its end"


def compared(one: Twin, other: Twin, seeds: Sequence[int], options: streams.Options) -> list[str]:
    """Run the streams of these seeds on both; a text for each that differs."""
    found = []
    for place, seed in enumerate(seeds):
        at = place % MOST
        stream = streams.make(seed, CODE + STEP * at, options)
        one.load(at, stream)
        other.load(at, stream)
        if differences(stream, one.run(stream), other.run(stream)):
            found.append(f"seed {seed}: {first_wrong(one, other, stream)}")
    return found
