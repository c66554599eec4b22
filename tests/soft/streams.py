"""Random streams of x86-64 instructions, for a comparison of two processors.

`make(seed)` gives the same stream for the same seed. A stream is straight code with a few short
jumps; it ends with UD2, or with the first instruction that faults.

What the architecture leaves undefined must not be compared, and must not flow into what is
compared. So a stream knows at each instruction which flags are undefined there (`Mark.undefined`,
after the sections "Flags Affected" of Intel's SDM, volume 2), and no instruction that reads such a
flag is put there.

What is known to differ, or must not be compared, is left out by a rule with a name (`RULES`). A
rule of the kind "engine" is a row of docs/engines.md.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

# Where things are, in the guest that runs them (tests/soft/twins.py).
DATA, DATA_SIZE = 0x10_0000, 0x2000
HOLE = DATA + DATA_SIZE  # a page that is not there
READ_ONLY = HOLE + 0x1000
SUPERVISOR = 0x8000
STACK, STACK_SIZE = 0x12_0000, 0x1000
WILD = 0x1234_5678_9ABC_0000  # no canonical address

CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
ARITHMETIC: Final = CF | PF | AF | ZF | SF | OF
DF: Final = 0x400

RULES: Final = {
    "undefined-flags": "architecture: what a 'Flags Affected' section calls undefined",
    "undefined-results": "architecture: BSF/BSR of 0, SHLD/SHRD of 16 bits by more than 16, "
    "MOVSXD to 16 bits",
    "approximations": "architecture: RCP*, RSQRT* and x87's transcendental functions",
    "x87-pointers": "architecture: FIP, FDP and FOP, which processors keep or not",
    "emulated": "host: what QEMU 7.2 does wrong: RCL, RCR, FLD and FRNDINT under x87's "
    "precision, DAZ, PUSH of 16 bits at a page's end, FSTP of 80 bits over it, INVD and WBINVD "
    "in ring 3",
    "interpreter": "host: a KVM that interprets ring 0 makes #UD of a #GP; other descriptors",
    "bmi": "engine: no BMI1 and BMI2",
    "cmpxchg-32": "engine: CMPXCHG of 32 bits clears upper halves",
    "faults-of-changes": "engine: a fault of an instruction that reads, then writes, is a read's",
    "faults-of-halves": "engine: of a 16-byte move that faults at its second half, one is done",
    "lock-neg": "engine: the flags of LOCK NEG",
    "lock-refused": "engine: LOCK before some instructions that must not have it",
    "loop-flags": "engine: the flags after LOOPE and LOOPNE",
    "mxcsr-flags": "engine: no status flags in MXCSR",
    "relative-shift": "engine: SHLD and SHRD by an immediate of an operand relative to RIP",
    "sse-alignment": "engine: an operand of SSE's that is not aligned",
    "stack-fault": "engine: #GP instead of #SS",
    "two-nans": "engine: of two NaNs SSE gives the larger",
    "x87-flags": "engine: x87's status flags and condition codes",
    "x87-stack": "engine: x87's stack overflows",
    "zero-of-ins": "engine: INS stores before it asks whether it may",
}
"""The rules' names, and what each leaves out. "architecture": it need not be the same on any two
processors. "engine": a row of docs/engines.md. "host": of one of the hosts that it is compared
with."""

# The registers that instructions may write: not RSP, not R14 (the data) and R13 (`WILD`).
FREE: Final = (0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 15)
ANY: Final = tuple(range(16))
CONDITIONS: Final = (OF, CF, ZF, CF | ZF, SF, PF, SF | OF, SF | OF | ZF)
"""The flags that condition code 2n and 2n+1 read."""


@dataclass(frozen=True)
class Options:
    """What the processors that are compared have, and in which ring it runs."""

    ring: int = 3
    without: frozenset[str] = frozenset()
    """Kinds of instructions that are not made: names of `_KINDS`, and of `RULES` that need not be
    obeyed always: "bmi", "emulated" and "interpreter"."""


@dataclass(frozen=True)
class Mark:
    """The start of an instruction."""

    offset: int
    undefined: int
    """The flags that are undefined there."""


@dataclass(frozen=True)
class Mem:
    """A memory operand: ModRM's bytes without the register, or an offset from RIP."""

    mod: int
    rm: int
    tail: bytes
    extension: int = 0
    """REX.X and REX.B."""
    target: int | None = None
    """Of an operand that is relative to RIP."""


Operand = int | Mem


@dataclass
class Stream:
    """A stream, while it is made and after."""

    seed: int
    ring: int
    origin: int
    code: bytearray = field(default_factory=bytearray)
    marks: list[Mark] = field(default_factory=list)
    undefined: int = 0
    x87_depth: int = 0
    flags: int = 2
    """RFLAGS at its start."""
    mxcsr: int = 0x1F80
    fcw: int = 0x37F
    regs: list[int] = field(default_factory=list)

    def begin(self) -> None:
        self.marks.append(Mark(len(self.code), self.undefined))

    def undefined_at(self, offset: int) -> int:
        return next((m.undefined for m in reversed(self.marks) if m.offset <= offset), 0)

    # -- encoding --------------------------------------------------------------------------

    def put(
        self,
        opcode: bytes,
        reg: int | None = None,
        rm: Operand | None = None,
        *,
        size: int = 4,
        prefix: bytes = b"",
        imm: bytes = b"",
        byte_regs: tuple[int, ...] = (),
        rex: int = 0,
    ) -> None:
        """An instruction: legacy prefixes, REX, opcode, ModRM and immediate. `size` gives 0x66 and
        REX.W; `byte_regs` are the byte registers among its operands, which may need a REX."""
        self.begin()
        if size == 2:
            prefix = b"\x66" + prefix
        rex |= 8 if size == 8 else 0
        if any(4 <= r <= 7 for r in byte_regs):
            rex |= 0x40
        body = b""
        if rm is not None:
            assert reg is not None
            rex |= 4 if reg & 8 else 0
            if isinstance(rm, Mem):
                rex |= rm.extension
                body = bytes([rm.mod << 6 | (reg & 7) << 3 | rm.rm]) + rm.tail
            else:
                rex |= 1 if rm & 8 else 0
                body = bytes([0xC0 | (reg & 7) << 3 | rm & 7])
        elif reg is not None:  # in the opcode
            rex |= 1 if reg & 8 else 0
            opcode = opcode[:-1] + bytes([opcode[-1] + (reg & 7)])
        if rex:
            prefix += bytes([0x40 | rex & 15])
        whole = prefix + opcode
        if isinstance(rm, Mem) and rm.target is not None:
            end = self.origin + len(self.code) + len(whole) + 5 + len(imm)
            body = body[:1] + struct.pack("<i", rm.target - end)
        self.code += whole + body + imm

    def vex(
        self,
        opmap: int,
        pp: int,
        opcode: int,
        reg: int,
        v: int,
        rm: Operand,
        *,
        size: int,
        imm: bytes = b"",
    ) -> None:
        """An instruction of BMI with a three-byte VEX prefix."""
        self.begin()
        x, b = (rm.extension >> 1 & 1, rm.extension & 1) if isinstance(rm, Mem) else (0, rm >> 3)
        first = (~reg >> 3 & 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | opmap
        second = (size == 8) << 7 | (~v & 15) << 3 | pp
        whole = bytes([0xC4, first, second, opcode])
        if isinstance(rm, Mem):
            body = bytes([rm.mod << 6 | (reg & 7) << 3 | rm.rm]) + rm.tail
            if rm.target is not None:
                end = self.origin + len(self.code) + len(whole) + 5 + len(imm)
                body = body[:1] + struct.pack("<i", rm.target - end)
        else:
            body = bytes([0xC0 | (reg & 7) << 3 | rm & 7])
        self.code += whole + body + imm


class Maker:
    """Makes one stream."""

    def __init__(self, seed: int, origin: int, options: Options) -> None:
        self.rng = random.Random(seed)
        self.options = options
        self.s = Stream(seed, options.ring, origin)

    # -- choices ---------------------------------------------------------------------------

    def any_of(self, things: tuple[int, ...]) -> int:
        return self.rng.choice(things)

    def free(self) -> int:
        return self.rng.choice(FREE)

    def size(self) -> int:
        return self.rng.choice((1, 2, 4, 4, 8, 8))

    def wide(self) -> int:
        return self.rng.choice((2, 4, 8))

    def number(self, size: int) -> int:
        """Often one at an edge."""
        bits = 8 * size
        edge = self.rng.choice((0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1))
        return edge if self.rng.random() < 0.3 else self.rng.getrandbits(bits)

    def imm(self, size: int) -> bytes:
        return self.number(min(size, 4)).to_bytes(min(size, 4), "little")

    def byte_reg(self, *, write: bool) -> int:
        """A byte register. 4 to 7 are AH to BH, or SPL to DIL (`_bytes`)."""
        return self.rng.choice(FREE if write else ANY)

    def mem(self, size: int = 8, *, align: int = 1, write: bool = False, bad: bool = True) -> Mem:
        """An operand in the data; now and then, with `bad`, where an access faults. (Rule
        "faults-of-changes": `bad` is for what only reads or only writes.)"""
        rng = self.rng
        if align == 1 and bad and rng.random() < 0.03:
            return self._bad(size, write)
        if rng.random() < 0.15:  # over the border of a page
            at = 0x1000 - rng.randrange(size + 1)
        else:
            at = rng.randrange(DATA_SIZE - max(size, 16))
        at -= at % align
        shape = rng.randrange(5)
        if shape == 0:
            return Mem(0, 5, b"\0\0\0\0", target=DATA + at)
        if shape == 1:  # an address, by SIB without base and index
            return Mem(0, 4, b"\x25" + struct.pack("<i", DATA + at))
        if shape == 2:
            small = rng.randrange(0, 128)
            return Mem(1, 6, bytes([small - small % align]), 1)
        if shape == 3 and align == 1:
            index, scale = rng.choice(FREE), rng.randrange(4)
            self.s.put(b"\x0f\xb6", index, index, byte_regs=(index,))  # movzx: below 256
            disp = rng.randrange(DATA_SIZE - (256 << scale) - 64)
            sib = scale << 6 | (index & 7) << 3 | 6
            extension = 1 | (2 if index & 8 else 0)
            return Mem(2, 4, bytes([sib]) + struct.pack("<i", disp), extension)
        return Mem(2, 6, struct.pack("<i", at), 1)

    def _bad(self, size: int, write: bool) -> Mem:
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0 and "interpreter" not in self.options.without:
            return Mem(1, 5, bytes([rng.randrange(128)]), 1)  # [r13 + n]: not canonical
        if kind == 1 and write:
            return Mem(0, 4, b"\x25" + struct.pack("<i", READ_ONLY + rng.randrange(0x100)))
        if kind == 2 and self.options.ring:
            return Mem(0, 4, b"\x25" + struct.pack("<i", SUPERVISOR + rng.randrange(0x100)))
        return Mem(0, 4, b"\x25" + struct.pack("<i", HOLE - rng.randrange(size)))

    def rm(self, size: int, *, write: bool = False, only: bool = False) -> Operand:
        """A register or memory; `only` if what is written is not read."""
        if self.rng.random() < 0.4:
            return self.mem(size, write=write, bad=only or not write)
        return self.byte_reg(write=write) if size == 1 else self.any_of(FREE if write else ANY)

    # -- flags -----------------------------------------------------------------------------

    def needs(self, flags: int) -> None:
        """The next instruction reads these: define them if they are undefined."""
        if self.s.undefined & flags:
            self.s.put(b"\x01", self.any_of(ANY), self.free(), size=self.wide())  # add
            self.s.undefined = 0

    def sets(self, defined: int, undefined: int = 0) -> None:
        self.s.undefined = self.s.undefined & ~defined | undefined

    # -- integers --------------------------------------------------------------------------

    def alu(self) -> None:
        which = self.rng.randrange(8)  # add or adc sbb and sub xor cmp
        if which in (2, 3):
            self.needs(CF)
        size, form = self.size(), self.rng.randrange(4)
        code = which << 3 | (size != 1)
        writes = which != 7
        if form == 0:
            rm = self.rm(size, write=writes)
            reg = self.any_of(ANY)
            lock = b"\xf0" if writes and isinstance(rm, Mem) and self.rng.random() < 0.3 else b""
            regs = self._bytes(size, reg, rm)
            self.s.put(bytes([code]), reg, rm, size=size, byte_regs=regs, prefix=lock)
        elif form == 1:
            reg, rm = self.any_of(FREE if writes else ANY), self.rm(size)
            self.s.put(bytes([code | 2]), reg, rm, size=size, byte_regs=self._bytes(size, reg, rm))
        elif form == 2:
            rm = self.rm(size, write=writes)
            short = size == 1 or self.rng.random() < 0.5
            opcode = b"\x80" if size == 1 else b"\x83" if short else b"\x81"
            imm = self.imm(1 if short else size)
            self.s.put(opcode, which, rm, size=size, imm=imm, byte_regs=self._bytes(size, 0, rm))
        else:
            self.s.put(bytes([code | 4]), size=size, imm=self.imm(size))
        self.sets(ARITHMETIC, AF if which in (1, 4, 6) else 0)

    def _bytes(self, size: int, *operands: Operand) -> tuple[int, ...]:
        """Which of the operands are byte registers. One in four stays without a REX prefix: then
        4 to 7 are AH to BH."""
        if size != 1 or self.rng.random() < 0.25:
            return ()
        return tuple(r for r in operands if isinstance(r, int))

    def unary(self) -> None:
        size, which = self.size(), self.rng.randrange(5)
        rm = self.rm(size, write=which != 4)
        lock = b"\xf0" if which < 3 and isinstance(rm, Mem) and self.rng.random() < 0.3 else b""
        regs = self._bytes(size, rm)
        wide = size != 1
        if which < 2:  # inc, dec: CF stays
            self.s.put(bytes([0xFE | wide]), which, rm, size=size, byte_regs=regs, prefix=lock)
            self.sets(ARITHMETIC & ~CF)
        elif which < 4:  # not, neg
            self.s.put(bytes([0xF6 | wide]), which, rm, size=size, byte_regs=regs, prefix=lock)
            if which == 3:
                self.sets(ARITHMETIC)
        else:  # test
            self.s.put(bytes([0xF6 | wide]), 0, rm, size=size, byte_regs=regs, imm=self.imm(size))
            self.sets(ARITHMETIC, AF)

    def move(self) -> None:
        rng, which = self.rng, self.rng.randrange(10)
        if which == 0:
            size = self.size()
            rm, reg = self.rm(size, write=True, only=True), self.any_of(ANY)
            self.s.put(
                bytes([0x88 | (size != 1)]),
                reg,
                rm,
                size=size,
                byte_regs=self._bytes(size, reg, rm),
            )
        elif which == 1:
            size = self.size()
            rm, reg = self.rm(size), self.free()
            self.s.put(
                bytes([0x8A | (size != 1)]),
                reg,
                rm,
                size=size,
                byte_regs=self._bytes(size, reg, rm),
            )
        elif which == 2:  # movzx, movsx
            source = rng.choice((1, 2))
            rm = self.rm(source)
            opcode = rng.choice((0xB6, 0xBE)) | (source == 2)
            regs = self._bytes(source, rm)
            self.s.put(bytes([0x0F, opcode]), self.free(), rm, size=self.wide(), byte_regs=regs)
        elif which == 3:  # movsxd
            self.s.put(b"\x63", self.free(), self.rm(4), size=rng.choice((4, 8)))
        elif which == 4:  # lea
            mem = self.mem()
            self.s.put(b"\x8d", self.free(), mem, size=self.wide())
        elif which == 5:  # mov imm
            size = rng.choice((4, 8))
            imm = self.number(size).to_bytes(size, "little")
            self.s.put(b"\xb8", self.free(), size=size, imm=imm)
        elif which == 6:  # xchg
            size = self.size()
            rm, reg = self.rm(size, write=True), self.free()
            self.s.put(
                bytes([0x86 | (size != 1)]),
                reg,
                rm,
                size=size,
                byte_regs=self._bytes(size, reg, rm),
            )
        elif which == 7:  # bswap, or movbe
            if rng.random() < 0.5 or "movbe" in self.options.without:
                self.s.put(b"\x0f\xc8", self.free(), size=rng.choice((4, 8)))
            else:
                store = rng.random() < 0.5
                opcode = b"\x0f\x38" + bytes([0xF0 | store])
                mem = self.mem(8, write=store)
                self.s.put(opcode, self.free(), mem, size=self.wide())
        elif which == 8:  # cbw, cwde, cdqe; cwd, cdq, cqo
            self.s.put(bytes([0x98 | rng.randrange(2)]), size=self.wide())
        else:  # xlat
            self.s.put(b"\x8d", 3, self._plain(512))
            self.s.put(b"\xd7")

    def _plain(self, room: int) -> Mem:
        """Where `room` bytes of the data are, on both sides."""
        at = self.rng.randrange(room, DATA_SIZE - room)
        return Mem(2, 6, struct.pack("<i", at), 1)

    def shift(self) -> None:
        size, which = self.size(), self.rng.choice((0, 1, 2, 3, 4, 5, 7))
        if which in (2, 3) and "emulated" in self.options.without:
            which -= 2  # rol and ror for rcl and rcr
        if which in (2, 3):
            self.needs(CF)
        rm = self.rm(size, write=True)
        regs, wide = self._bytes(size, rm), size != 1
        form, bits = self.rng.randrange(3), 8 * size
        if form == 0:
            self.s.put(bytes([0xD0 | wide]), which, rm, size=size, byte_regs=regs)
            count: int | None = 1
        elif form == 1:
            byte = self.rng.getrandbits(8)
            self.s.put(
                bytes([0xC0 | wide]), which, rm, size=size, byte_regs=regs, imm=bytes([byte])
            )
            count = byte & (63 if size == 8 else 31)
        else:
            self.s.put(bytes([0xD2 | wide]), which, rm, size=size, byte_regs=regs)
            count = None
        if count == 0:
            return
        if which < 4:  # rotates: CF, and OF for a count of 1
            if count is None:
                self.sets(0, OF)
            else:
                self.sets(CF, 0)
                self.sets(OF, 0 if count == 1 else OF)
            if which in (2, 3) and count != 1:
                # By 9 or 17 bits of that many nothing is rotated: some clear, some keep OF.
                self.sets(0, OF)
            return
        lost = CF if which != 7 and size < 4 and (count is None or count >= bits) else 0
        if count is None:
            self.sets(0, OF | AF | lost)
        else:
            self.sets(ARITHMETIC, AF | lost | (0 if count == 1 else OF))

    def double_shift(self) -> None:
        size = self.wide()
        right = self.rng.randrange(2)
        count = self.rng.randrange(17 if size == 2 else 64) & (63 if size == 8 else 31)
        rm, reg = self.rm(size, write=True), self.any_of(ANY)
        opcode = bytes([0x0F, 0xA4 | right << 3])
        relative = isinstance(rm, Mem) and rm.target is not None  # rule "relative-shift"
        if self.rng.random() < 0.5 and not relative:
            self.s.put(opcode, reg, rm, size=size, imm=bytes([count]))
        else:
            self.s.put(b"\xb0", 1, imm=bytes([count]))  # mov cl
            self.s.put(bytes([0x0F, 0xA5 | right << 3]), reg, rm, size=size)
        if count:
            self.sets(ARITHMETIC, AF | (0 if count == 1 else OF))

    def multiply(self) -> None:
        size, form = self.size(), self.rng.randrange(4)
        if form < 2:  # mul, imul: rDX:rAX
            rm = self.rm(size)
            regs = self._bytes(size, rm)
            self.s.put(bytes([0xF6 | (size != 1)]), 4 + form, rm, size=size, byte_regs=regs)
        else:
            size = self.wide()
            reg, rm = self.free(), self.rm(size)
            if form == 2:
                self.s.put(b"\x0f\xaf", reg, rm, size=size)
            elif self.rng.random() < 0.5:
                self.s.put(b"\x6b", reg, rm, size=size, imm=self.imm(1))
            else:
                self.s.put(b"\x69", reg, rm, size=size, imm=self.imm(size))
        self.sets(ARITHMETIC, SF | ZF | AF | PF)

    def divide(self) -> None:
        size, signed = self.size(), self.rng.randrange(2)
        if self.rng.random() < 0.85:  # most would overflow else
            if size == 1:
                self.s.put(b"\x0f\xb6", 0, 0, byte_regs=(0,))  # movzx eax, al
            elif signed:
                self.s.put(b"\x99", size=size)
            else:
                self.s.put(b"\xba", imm=b"\0\0\0\0")  # mov edx, 0
        rm = self.rm(size)
        regs = self._bytes(size, rm)
        self.s.put(bytes([0xF6 | (size != 1)]), 6 + signed, rm, size=size, byte_regs=regs)
        self.sets(0, ARITHMETIC)

    def bit(self) -> None:
        size, which = self.wide(), self.rng.randrange(4, 8)  # bt, bts, btr, btc
        rm = self.rm(size, write=which != 4)
        lock = b"\xf0" if which != 4 and isinstance(rm, Mem) and self.rng.random() < 0.3 else b""
        if isinstance(rm, Mem) or self.rng.random() < 0.5:
            bit = self.imm(1)
            self.s.put(b"\x0f\xba", which, rm, size=size, imm=bit, prefix=lock)
        else:
            self.s.put(bytes([0x0F, 0x83 | which << 3]), self.any_of(ANY), rm, size=size)
        self.sets(CF, OF | SF | AF | PF)

    def far_bit(self) -> None:
        """A bit's number in a register reaches beyond the operand."""
        size, which = self.wide(), self.rng.randrange(4, 8)
        index = self.free()
        self.s.put(b"\x0f\xbf", index, index, size=size)  # movsx: 15 bits and a sign
        if size == 2:
            size = 4
            self.s.put(b"\x0f\xbf", index, index, size=4)
        lock = b"\xf0" if which != 4 and self.rng.random() < 0.3 else b""
        mem = Mem(2, 6, struct.pack("<i", 0x1000), 1)
        self.s.put(bytes([0x0F, 0x83 | which << 3]), index, mem, size=size, prefix=lock)
        self.sets(CF, OF | SF | AF | PF)

    def scan(self) -> None:
        size, reg, source = self.wide(), self.free(), self.free()
        which = self.rng.randrange(5)
        if which < 2:  # bsf, bsr: not of 0
            self.s.put(b"\x0f\xba", 5, source, size=size, imm=self.imm(1))
            self.sets(CF, OF | SF | AF | PF)
            self.s.put(bytes([0x0F, 0xBC | which]), reg, source, size=size)
            self.sets(ZF, ARITHMETIC & ~ZF)
            return
        rm = self.rm(size)
        if which == 2:
            self.s.put(b"\x0f\xb8", reg, rm, size=size, prefix=b"\xf3")
            self.sets(ARITHMETIC)
        else:  # tzcnt (of BMI1), lzcnt
            lzcnt = which - 3 or "bmi" in self.options.without
            self.s.put(bytes([0x0F, 0xBC | lzcnt]), reg, rm, size=size, prefix=b"\xf3")
            self.sets(CF | ZF, OF | SF | AF | PF)

    def by_condition(self) -> None:
        which = self.rng.randrange(16)
        self.needs(CONDITIONS[which >> 1])
        form = self.rng.randrange(3)
        if form == 0:
            rm = self.rm(1, write=True, only=True)
            self.s.put(bytes([0x0F, 0x90 | which]), 0, rm, byte_regs=self._bytes(1, rm))
        elif form == 1:
            size = self.wide()
            self.s.put(bytes([0x0F, 0x40 | which]), self.free(), self.rm(size), size=size)
        else:
            self.jump(bytes([0x70 | which]))

    def jump(self, opcode: bytes) -> None:
        """Over one instruction, or two."""
        self.s.put(opcode, imm=b"\0")
        at, before = len(self.s.code), self.s.undefined
        self.rng.choice((self.alu, self.unary, self.move, self.shift))()
        self.s.code[at - 1] = len(self.s.code) - at
        self.s.undefined |= before

    def loop(self) -> None:
        self.s.put(b"\xb9", imm=bytes([self.rng.randrange(1, 6), 0, 0, 0]))
        if self.rng.random() < 0.2:
            self.jump(b"\xe3")  # jrcxz, not taken
            self.s.put(b"\xb9", imm=bytes([self.rng.randrange(1, 6), 0, 0, 0]))
        start = len(self.s.code)
        for _ in range(self.rng.randrange(1, 3)):
            reg = self.rng.choice(tuple(r for r in FREE if r != 1))
            code = bytes([self.rng.choice((0x01, 0x29, 0x31, 0x09, 0x21))])
            self.s.put(code, self.any_of(ANY), reg, size=self.wide())
            self.sets(ARITHMETIC, AF if code[0] not in (1, 0x29) else 0)
        which = self.rng.randrange(3)  # loopne, loope, loop
        if which < 2:
            self.needs(ZF)
        self.s.put(bytes([0xE0 | which]), imm=b"\0")
        self.s.code[-1] = (start - len(self.s.code)) & 255
        if which < 2:  # rule "loop-flags"
            self.sets(0, ARITHMETIC)

    def string(self) -> None:
        rng, s = self.rng, self.s
        size, which = rng.choice((1, 2, 4, 8)), rng.choice((0xA4, 0xA6, 0xAA, 0xAC, 0xAE))
        far = 0.05
        for reg in (6, 7):  # rsi, rdi
            if rng.random() < far:  # it runs into the hole, or off the data's other end
                at = rng.choice((DATA_SIZE - rng.randrange(1, 64), rng.randrange(64)))
                s.put(b"\x8d", reg, Mem(2, 6, struct.pack("<i", at), 1), size=8)
            else:
                s.put(b"\x8d", reg, self._plain(512), size=8)
        if rng.random() < 0.2:
            s.put(bytes([0xFC | rng.randrange(2)]))  # cld, std
        rep = rng.choice((b"", b"\xf3", b"\xf2" if which in (0xA6, 0xAE) else b"\xf3"))
        if rep:
            s.put(b"\xb9", imm=bytes([rng.choice((0, 1, 2, rng.randrange(40))), 0, 0, 0]))
        if which in (0xA6, 0xAE):
            if rep:
                self.needs(ARITHMETIC)  # with a count of 0 they stay
            elif rng.random() < 0.5:  # equal ones
                s.put(b"\x89", 6, 7, size=8)
        s.put(bytes([which | (size != 1)]), size=size, prefix=rep)
        if which in (0xA6, 0xAE):
            self.sets(ARITHMETIC)

    def stack(self) -> None:
        rng, s = self.rng, self.s
        which = rng.randrange(8)
        size = rng.choice((2, 4))  # with 0x66, or 64 bits
        if which == 0:
            s.put(b"\x50", rng.choice(ANY), size=size)
        elif which == 1:
            s.put(b"\x58", self.free(), size=size)
        elif which == 2:
            bad = size != 2 or "emulated" not in self.options.without
            s.put(b"\xff", 6, self.mem(8, bad=bad), size=size)
        elif which == 3:
            s.put(b"\x8f", 0, self.mem(8, write=True), size=size)
        elif which == 4:
            s.put(b"\x6a", imm=self.imm(1), size=size)
        elif which == 5:
            s.put(b"\x68", imm=self.imm(2 if size == 2 else 4), size=size)
        elif which == 6:  # call the next instruction
            s.put(b"\xe8", imm=b"\0\0\0\0")
            if rng.random() < 0.5:
                s.put(b"\x58", self.free())
        else:
            s.put(b"\xc8", imm=struct.pack("<HB", rng.randrange(64), rng.randrange(2)))  # enter
            s.put(b"\x5d")  # pop rbp

    def flag_moves(self) -> None:
        rng, s = self.rng, self.s
        which = rng.randrange(7)
        if which == 0:
            self.needs(ARITHMETIC)
            s.put(b"\x9c", size=rng.choice((2, 4)))
        elif which == 1:
            value = rng.getrandbits(12) & (ARITHMETIC | DF) | 2
            s.put(b"\x68", imm=struct.pack("<I", value))
            s.put(b"\x9d")
            self.sets(ARITHMETIC)
        elif which == 2:
            self.needs(ARITHMETIC & ~OF)
            s.put(b"\x9f")  # lahf
        elif which == 3:
            s.put(b"\x9e")  # sahf
            self.sets(ARITHMETIC & ~OF)
        elif which == 4:
            self.needs(CF)
            s.put(b"\xf5")  # cmc
        elif which == 5:
            s.put(bytes([0xF8 | rng.randrange(2)]))  # clc, stc
            self.sets(CF)
        else:
            s.put(bytes([0xFC | rng.randrange(2)]))

    def exchange(self) -> None:
        rng, s = self.rng, self.s
        which, size = rng.randrange(4), self.size()
        if which < 2:
            rm, reg = self.rm(size, write=True), self.free()
            lock = b"\xf0" if isinstance(rm, Mem) and rng.random() < 0.5 else b""
            opcode = bytes([0x0F, (0xC0 if which else 0xB0) | (size != 1)])
            if not which and size == 4:  # rule "cmpxchg-32"
                s.put(b"\x89", 0, 0)  # mov eax, eax
            if not which and self._is_kept(rm, size):  # so that it is equal
                s.put(bytes([0x8A | (size != 1)]), 0, rm, size=size)
            s.put(opcode, reg, rm, size=size, prefix=lock, byte_regs=self._bytes(size, reg, rm))
            self.sets(ARITHMETIC)
        else:  # cmpxchg8b, cmpxchg16b
            width = 8 if which == 3 else 4
            mem = self.mem(2 * width, align=16, write=True, bad=False)
            if rng.random() < 0.5:
                s.put(b"\x8b", 0, mem, size=width)
            lock = b"\xf0" if rng.random() < 0.5 else b""
            s.put(b"\x0f\xc7", 1, mem, size=width, prefix=lock)
            self.sets(ZF)

    def _is_kept(self, rm: Operand, size: int) -> bool:
        """Is RAX to be loaded before CMPXCHG? Not if it is RM's index. Rule "cmpxchg-32"."""
        if isinstance(rm, Mem):
            return not (rm.mod == 2 and rm.rm == 4) and self.rng.random() < 0.5
        return size == 4 or self.rng.random() < 0.5

    def newer(self) -> None:
        """BMI, ADX, CRC32."""
        rng, s = self.rng, self.s
        size = rng.choice((4, 8))
        which = rng.randrange(12)
        if "bmi" in self.options.without:
            which = rng.randrange(8, 12)
        if which in (8, 9):
            self.needs(CF if which == 8 else OF)
        reg, v, rm = self.free(), self.free(), self.rm(size)
        if which == 0:  # andn
            s.vex(2, 0, 0xF2, reg, v, rm, size=size)
            self.sets(SF | ZF | OF | CF, AF | PF)
        elif which == 1:  # bextr
            s.vex(2, 0, 0xF7, reg, v, rm, size=size)
            self.sets(ZF | OF | CF, SF | AF | PF)
        elif which == 2:  # blsr, blsmsk, blsi
            s.vex(2, 0, 0xF3, rng.randrange(1, 4), v, rm, size=size)
            self.sets(ZF | SF | CF | OF, AF | PF)
        elif which == 3:  # bzhi
            s.vex(2, 0, 0xF5, reg, v, rm, size=size)
            self.sets(ZF | SF | CF | OF, AF | PF)
        elif which == 4:  # mulx
            s.vex(2, 3, 0xF6, reg, v, rm, size=size)
        elif which == 5:  # pdep, pext
            s.vex(2, rng.choice((2, 3)), 0xF5, reg, v, rm, size=size)
        elif which == 6:  # rorx
            s.vex(3, 3, 0xF0, reg, 0, rm, size=size, imm=self.imm(1))
        elif which == 7:  # shlx, sarx, shrx
            s.vex(2, rng.randrange(1, 4), 0xF7, reg, v, rm, size=size)
        elif which < 10:  # adcx, adox
            prefix = b"\x66" if which == 8 else b"\xf3"
            s.put(b"\x0f\x38\xf6", reg, rm, size=size, prefix=prefix)
            self.sets(CF if which == 8 else OF)
        else:  # crc32
            source = rng.choice((1, 2, 4, 8))
            rm = self.rm(source)
            opcode = bytes([0x0F, 0x38, 0xF0 | (source != 1)])
            regs = self._bytes(source, rm)
            s.put(opcode, reg, rm, size=source, prefix=b"\xf2", byte_regs=regs)

    # -- SSE -------------------------------------------------------------------------------

    def xmm_rm(self, size: int = 16) -> Operand:
        if self.rng.random() < 0.5:
            return self.rng.randrange(16)
        return self.mem(size, align=16 if size == 16 else 1)

    def sse_integer(self) -> None:
        prefix, opcode, imm = self.rng.choice(_SSE_INTEGER)
        data = self.imm(1) if imm else b""
        if opcode[1] == 0x3A and opcode[2] in (0x60, 0x61):  # lengths
            for length in (0, 2):
                if self.rng.random() < 0.5:
                    self.s.put(b"\x83", 4, length, imm=bytes([self.rng.choice((15, 31))]))
                    self.sets(ARITHMETIC, AF)
        reg, rm = self.rng.randrange(16), self.xmm_rm()
        self.s.put(opcode, reg, rm, prefix=prefix, imm=data)

    def mmx(self) -> None:
        """From memory, an operation, to memory; then EMMS. What x87 would see of the registers in
        between is not compared."""
        if self.s.x87_depth:
            return
        opcode = self.rng.choice(_MMX)
        reg, other = self.rng.randrange(8), self.rng.randrange(8)
        self.s.put(b"\x0f\x6f", reg, self.mem(8, bad=False))
        self.s.put(b"\x0f\x6f", other, self.mem(8, bad=False))
        self.s.put(opcode, reg, other)
        self.s.put(b"\x0f\x7f", reg, self.mem(8, write=True, bad=False))
        self.s.put(b"\x0f\x77")

    def sse_move(self) -> None:  # noqa: PLR0915 - a list of cases
        rng, s = self.rng, self.s
        which = rng.randrange(11)
        reg = rng.randrange(16)
        if which == 0:  # movaps, movapd, movdqa; and back
            prefix, load, store = rng.choice(
                ((b"", 0x28, 0x29), (b"\x66", 0x28, 0x29), (b"\x66", 0x6F, 0x7F))
            )
            s.put(bytes([0x0F, rng.choice((load, store))]), reg, self.xmm_rm(), prefix=prefix)
        elif which == 1:  # movups, movupd, movdqu; and back; lddqu
            prefix, load, store = rng.choice(
                ((b"", 0x10, 0x11), (b"\x66", 0x10, 0x11), (b"\xf3", 0x6F, 0x7F))
            )
            opcode = rng.choice((load, store))
            mem = self.mem(16, write=opcode == store, bad=False)  # rule "faults-of-halves"
            s.put(bytes([0x0F, opcode]), reg, mem, prefix=prefix)
        elif which == 2:  # movss, movsd; and back
            size = rng.choice((4, 8))
            store = rng.randrange(2)
            rm = rng.randrange(16) if rng.random() < 0.5 else self.mem(size, write=bool(store))
            prefix = b"\xf3" if size == 4 else b"\xf2"
            s.put(bytes([0x0F, 0x10 | store]), reg, rm, prefix=prefix)
        elif which == 3:  # movd, movq
            size = rng.choice((4, 8))
            if rng.random() < 0.5:
                s.put(b"\x0f\x6e", reg, self.rm(size), size=size, prefix=b"\x66")
            else:
                rm = self.rm(size, write=True, only=True)
                s.put(b"\x0f\x7e", reg, rm, size=size, prefix=b"\x66")
        elif which == 4:  # movq
            if rng.random() < 0.5:
                s.put(b"\x0f\x7e", reg, self.xmm_rm(8), prefix=b"\xf3")
            else:
                s.put(b"\x0f\xd6", reg, self.xmm_rm(8), prefix=b"\x66")
        elif which == 5:  # movlps, movhps, movlpd, movhpd; movhlps, movlhps
            opcode = rng.choice((0x12, 0x13, 0x16, 0x17))
            prefix = rng.choice((b"", b"\x66"))
            if opcode in (0x12, 0x16) and not prefix and rng.random() < 0.5:
                s.put(bytes([0x0F, opcode]), reg, rng.randrange(16))
            else:
                mem = self.mem(8, write=bool(opcode & 1))
                s.put(bytes([0x0F, opcode]), reg, mem, prefix=prefix)
        elif which == 6:  # pmovmskb, movmskps, movmskpd
            prefix, code = rng.choice(((b"\x66", 0xD7), (b"", 0x50), (b"\x66", 0x50)))
            s.put(bytes([0x0F, code]), self.free(), rng.randrange(16), prefix=prefix)
        elif which == 7:  # pinsrb, pinsrw, pinsrd, pinsrq
            size = rng.choice((1, 2, 4, 8))
            opcode = {1: b"\x0f\x3a\x20", 2: b"\x0f\xc4"}.get(size, b"\x0f\x3a\x22")
            rm = self.rm(size)
            width = 8 if size == 8 else 4
            s.put(opcode, reg, rm, size=width, prefix=b"\x66", imm=self.imm(1))
        elif which == 8:  # pextrb, pextrw, pextrd, pextrq, extractps
            size = rng.choice((1, 2, 4, 8))
            opcode = bytes([0x0F, 0x3A, {1: 0x14, 2: 0x15}.get(size, rng.choice((0x16, 0x16)))])
            rm = self.rm(size, write=True, only=True)
            width = 8 if size == 8 else 4
            s.put(opcode, reg, rm, size=width, prefix=b"\x66", imm=self.imm(1))
        elif which == 9:  # movntdq, movntps, movnti
            if rng.random() < 0.5:
                s.put(b"\x0f\xe7", reg, self.mem(16, align=16, write=True), prefix=b"\x66")
            else:
                size = rng.choice((4, 8))
                s.put(b"\x0f\xc3", self.any_of(ANY), self.mem(size, write=True), size=size)
        else:  # maskmovdqu: rdi
            s.put(b"\x8d", 7, self._plain(512), size=8)
            s.put(b"\x0f\xf7", reg, rng.randrange(16), prefix=b"\x66")

    def sse_float(self) -> None:
        prefix, opcode, size, imm = self.rng.choice(_SSE_FLOAT)
        data = self.imm(1) if imm else b""
        if imm > 1:  # a predicate of so many bits
            data = bytes([self.rng.randrange(imm)])
        reg, rm = self.rng.randrange(16), self.xmm_rm(size)
        self.s.put(opcode, reg, rm, prefix=prefix, imm=data)
        if opcode[1] in _OF_TWO:  # rule "two-nans": make a zero of what is a NaN
            kind = b"" if prefix in (b"", b"\xf3") else b"\x66"
            if opcode[1] in (0x7C, 0x7D, 0xD0, 0x3A):
                kind = b"" if prefix == b"\xf2" or opcode[2:] == b"\x40" else b"\x66"
            other = (reg + 1) % 16
            self.s.put(b"\x0f\x28", other, reg)
            self.s.put(b"\x0f\xc2", other, other, prefix=kind, imm=b"\x07")  # is it a number?
            self.s.put(b"\x0f\x54", reg, other)

    def sse_convert(self) -> None:
        rng, s = self.rng, self.s
        which = rng.randrange(3)
        prefix, source = rng.choice(((b"\xf3", 4), (b"\xf2", 8)))
        size = rng.choice((4, 8))
        if which == 0:  # cvtsi2ss, cvtsi2sd
            s.put(b"\x0f\x2a", rng.randrange(16), self.rm(size), size=size, prefix=prefix)
        elif which == 1:  # cvttss2si, cvtss2si
            opcode = bytes([0x0F, rng.choice((0x2C, 0x2D))])
            s.put(opcode, self.free(), self.xmm_rm(source), size=size, prefix=prefix)
        else:  # ucomis*, comis*
            prefix, source = rng.choice(((b"", 4), (b"\x66", 8)))
            opcode = bytes([0x0F, rng.choice((0x2E, 0x2F))])
            s.put(opcode, rng.randrange(16), self.xmm_rm(source), prefix=prefix)
            self.sets(ARITHMETIC)

    def sse_control(self) -> None:
        """LDMXCSR. STMXCSR would bring the status flags to memory (rule "mxcsr-flags")."""
        at = DATA + self.rng.randrange(0x100, 0x200) * 4
        mem = Mem(0, 4, b"\x25" + struct.pack("<i", at))
        self.s.put(b"\xc7", 0, mem, imm=struct.pack("<I", self._mxcsr()))
        self.s.put(b"\x0f\xae", 2, mem)

    def _mxcsr(self) -> int:
        """Everything masked; a rounding mode; now and then FTZ and DAZ."""
        tiny = self.rng.choice((0, 0, 0x8000, 0x40, 0x8040))
        if "emulated" in self.options.without:
            tiny &= 0x8000
        return 0x1F80 | self.rng.randrange(4) << 13 | tiny

    # -- x87 -------------------------------------------------------------------------------

    def x87(self) -> None:  # noqa: PLR0915 - a list of cases
        rng, s = self.rng, self.s
        depth = s.x87_depth
        if depth < 1 or (depth < 7 and rng.random() < 0.35):
            which = rng.randrange(4)
            if which == 0:
                s.put(bytes([0xD9 | rng.choice((0, 4))]), 0, self.mem(8))  # m32, m64
            elif which == 1:  # m16, m32
                s.put(bytes([rng.choice((0xDF, 0xDB))]), 0, self.mem(4))
            elif which == 2:  # m64
                s.put(b"\xdf", 5, self.mem(8))
            else:  # 1, log2(10), log2(e), pi, log10(2), ln 2, 0
                s.put(bytes([0xD9, 0xE8 + rng.randrange(7)]))
            s.x87_depth += 1
            return
        which = rng.randrange(12)
        other = rng.randrange(depth)
        if which == 0:  # fst, fstp: m32, m64
            size, pop = rng.choice((4, 8)), rng.randrange(2)
            s.put(b"\xd9" if size == 4 else b"\xdd", 2 + pop, self.mem(size, write=True))
            s.x87_depth -= pop
        elif which == 1:  # fist, fistp: m16, m32; m64
            size, pop = rng.choice((2, 4)), rng.randrange(2)
            s.put(b"\xdf" if size == 2 else b"\xdb", 2 + pop, self.mem(size, write=True))
            s.x87_depth -= pop
        elif which == 2:
            s.put(b"\xdf", 7, self.mem(8, write=True))
            s.x87_depth -= 1
        elif which == 3:  # fstp m80
            s.put(b"\xdb", 7, self._extended())
            s.x87_depth -= 1
        elif which == 4:
            s.put(bytes([0xD9, 0xC8 + other]))  # fxch
        elif which == 5:
            s.put(
                bytes([0xD9, rng.choice((0xE0, 0xE1, 0xFA, 0xFC))])
            )  # fchs, fabs, fsqrt, frndint
        elif which == 6:  # fucomi, fcomi
            s.put(bytes([0xDB, rng.choice((0xE8, 0xF0)) + other]))
            self.sets(ZF | PF | CF, OF | SF | AF)
        elif which == 7:  # fadd, fmul, fsub, fsubr, fdiv, fdivr: m32, m64, m16, m32
            arith = rng.choice((0, 1, 4, 5, 6, 7))
            s.put(bytes([rng.choice((0xD8, 0xDC, 0xDE, 0xDA))]), arith, self.mem(8))
        elif which == 8:
            arith = rng.choice((0, 1, 4, 5, 6, 7))
            s.put(bytes([rng.choice((0xD8, 0xDC)), 0xC0 | arith << 3 | other]))
        elif which == 9 and depth > 1 and other:
            s.put(bytes([0xDE, 0xC0 | rng.choice((0, 1, 4, 5, 6, 7)) << 3 | other]))
            s.x87_depth -= 1
        elif which == 10:  # fcmovcc
            condition = rng.randrange(4)
            self.needs((CF, ZF, CF | ZF, PF)[condition])
            s.put(bytes([rng.choice((0xDA, 0xDB)), 0xC0 | condition << 3 | other]))
        elif depth < 7:  # fld st
            s.put(bytes([0xD9, 0xC0 + other]))
            s.x87_depth += 1

    def _extended(self) -> Mem:
        """Where FSTP stores 80 bits. (Rule "faults-of-halves".)"""
        if "emulated" in self.options.without:
            return self.mem(16, write=True, align=16, bad=False)
        return self.mem(10, write=True, bad=False)

    # -- segments --------------------------------------------------------------------------

    def segment(self) -> None:
        """Selectors that are good, wrong, absent, and beyond the table."""
        rng, s = self.rng, self.s
        if "interpreter" in self.options.without:
            return  # such a KVM's ring 3 has the host's descriptors
        selector = rng.choice(_SELECTORS) | (rng.randrange(4) if rng.random() < 0.2 else 0)
        s.put(b"\xb8", 0, imm=struct.pack("<I", selector))
        which = rng.randrange(4)
        if which == 0:  # mov es, ds, fs, gs
            s.put(b"\x8e", rng.choice((0, 3, 4, 5)), 0)
        elif which == 1:
            s.put(b"\x8e", 2, 0)  # mov ss
        elif which == 2:  # lar, lsl
            s.put(bytes([0x0F, rng.choice((2, 3))]), self.free(), 0, size=self.wide())
            self.sets(ZF)
        else:  # verr, verw
            s.put(b"\x0f\x00", rng.choice((4, 5)), 0)
            self.sets(ZF)

    # -- what faults -----------------------------------------------------------------------

    def fault(self) -> None:
        rng, s = self.rng, self.s
        which = rng.randrange(8)
        exact = "interpreter" not in self.options.without
        if which == 0:  # no such instruction
            s.begin()
            s.code += rng.choice((b"\x0f\x0b", b"\x0f\xb9\xc0", b"\x0f\xff\xc0", b"\x06", b"\x27"))
        elif which == 1:  # LOCK where it must not be
            s.begin()
            s.code += rng.choice(
                (b"\xf0\x90", b"\xf0\x01\xc8", b"\xf0\x41\x3b\x06", b"\xf0\xf7\xd8")
            )
        elif which == 2 and self.options.ring and exact:  # not in ring 3
            s.begin()
            s.code += rng.choice(
                _PRIVILEGED if "emulated" in self.options.without else _PRIVILEGED + _CACHES
            )
        elif which == 3:  # division by 0
            s.put(b"\xb9", imm=b"\0\0\0\0")
            s.put(b"\xf7", rng.choice((6, 7)), 1, size=self.wide())
        elif which == 4 and exact:  # INT: no gate, or no right to use it
            s.begin()
            s.code += rng.choice((b"\xcd\x80", b"\xcd\xff", b"\xcd\x20", b"\xcd\x0d"))
        elif which == 5:
            s.put(b"\x8b", self.free(), self._bad(8, write=False), size=self.size_not_byte())
        elif which == 6:
            s.put(b"\x89", self.free(), self._bad(8, write=True), size=self.size_not_byte())
        else:
            s.begin()
            s.code += b"\xcc"

    def size_not_byte(self) -> int:
        return self.wide()

    # -- a stream --------------------------------------------------------------------------

    def make(self, length: int) -> Stream:
        rng, s = self.rng, self.s
        s.regs = [self.number(8) for _ in range(16)]
        s.regs[4] = STACK + STACK_SIZE // 2 + 8 * rng.randrange(32)
        s.regs[13], s.regs[14] = WILD, DATA
        s.flags = rng.getrandbits(12) & (ARITHMETIC | DF) | 0x202  # some KVMs keep IF set
        s.mxcsr = self._mxcsr()
        precision = 3 if "emulated" in self.options.without else rng.choice((0, 2, 3, 3))
        s.fcw = 0x7F | rng.randrange(4) << 10 | precision << 8
        names = [n for n in _KINDS if n not in self.options.without and n != "fault"]
        focus = rng.choice(names) if rng.random() < 0.5 else None
        weights = [_KINDS[n] * (10 if n == focus else 1) for n in names]
        for _ in range(rng.randrange(1, length)):
            name = "fault" if rng.random() < 0.02 else rng.choices(names, weights)[0]
            if name not in self.options.without:
                method: Callable[[], None] = getattr(self, name)
                method()
        s.begin()
        s.code += b"\x0f\x0b"
        return s


_PRIVILEGED: Final = (
    b"\xf4", b"\xfa", b"\xfb", b"\x0f\x06", b"\x0f\x32", b"\x0f\x30",  # hlt ... wrmsr
    b"\x0f\x20\xc0", b"\x0f\x22\xd8",  # mov eax, cr0; mov cr3, eax
    b"\xec", b"\xee", b"\xe4\x80", b"\x6e",  # in, out, outs; rule "zero-of-ins"
    b"\x41\x0f\x01\x16", b"\x41\x0f\x01\x1e", b"\x41\x0f\x01\x3e",  # lgdt, lidt, invlpg
)  # fmt: skip
_SELECTORS: Final = (0, 0x08, 0x10, 0x1B, 0x23, 0x28, 0x30, 0x3B, 0x43, 0x4B, 0x50, 0x100, 0x104)
"""Null; code and data of ring 0 and 3; the TSS; absent data, code and TSS; none."""
_CACHES: Final = (b"\x0f\x08", b"\x0f\x09")  # invd, wbinvd
_KINDS: Final = {
    "alu": 8, "unary": 3, "move": 6, "shift": 5, "double_shift": 2, "multiply": 3, "divide": 2,
    "bit": 3, "far_bit": 1, "scan": 2, "by_condition": 4, "loop": 1, "string": 2, "stack": 2,
    "flag_moves": 3, "exchange": 3, "newer": 3, "sse_integer": 8, "mmx": 1, "sse_move": 4,
    "sse_float": 6, "sse_convert": 3, "sse_control": 1, "x87": 5, "segment": 2, "fault": 0,
}  # fmt: skip
"""The kinds of instructions, and how often each comes."""


def _sse_integers() -> tuple[tuple[bytes, bytes, bool], ...]:
    made: list[tuple[bytes, bytes, bool]] = []
    first = [*range(0x60, 0x6E), 0x74, 0x75, 0x76, *range(0xD1, 0xD6), *range(0xD8, 0xE6)]
    first += [*range(0xE8, 0xF0), *range(0xF1, 0xF7), *range(0xF8, 0xFF)]
    made += [(b"\x66", bytes([0x0F, code]), False) for code in first if code != 0xE6]
    made += [(prefix, b"\x0f\x70", True) for prefix in (b"\x66", b"\xf2", b"\xf3")]
    three = [*range(0x0C), 0x10, 0x14, 0x15, 0x17, 0x1C, 0x1D, 0x1E, *range(0x20, 0x26)]
    three += [0x28, 0x29, 0x2B, *range(0x30, 0x42), *range(0xDB, 0xE0)]
    made += [(b"\x66", bytes([0x0F, 0x38, code]), False) for code in three]
    four = (0x0E, 0x0F, 0x42, 0x44, 0x60, 0x61, 0x62, 0x63, 0xDF)
    made += [(b"\x66", bytes([0x0F, 0x3A, code]), True) for code in four]
    made += [(b"", bytes([0x0F, code]), False) for code in (0x54, 0x55, 0x56, 0x57, 0x14, 0x15)]
    made += [(b"\x66", bytes([0x0F, code]), False) for code in (0x14, 0x15)]
    made += [(b"", b"\x0f\xc6", True), (b"\x66", b"\x0f\xc6", True)]
    made += [(b"\x66", bytes([0x0F, 0x3A, code]), True) for code in (0x0C, 0x0D)]
    return tuple(made)


_SSE_INTEGER: Final = _sse_integers()
"""(prefix, opcode, has it an immediate): xmm, xmm/m128."""


_MMX: Final = tuple(
    opcode
    for prefix, opcode, imm in _SSE_INTEGER
    if prefix == b"\x66"
    and not imm
    and (
        (len(opcode) == 2 and opcode[1] not in (0x14, 0x15, 0x6C, 0x6D))
        or (opcode[1] == 0x38 and (opcode[2] < 0x0C or 0x1C <= opcode[2] <= 0x1E))
    )
)


def _sse_floats() -> tuple[tuple[bytes, bytes, int, int], ...]:
    made: list[tuple[bytes, bytes, int, int]] = []
    kinds = ((b"", 16), (b"\x66", 16), (b"\xf3", 4), (b"\xf2", 8))
    for code in (0x51, 0x58, 0x59, 0x5C, 0x5D, 0x5E, 0x5F):  # sqrt add mul sub min div max
        made += [(prefix, bytes([0x0F, code]), size, 0) for prefix, size in kinds]
    made += [(prefix, b"\x0f\xc2", size, 8) for prefix, size in kinds]  # cmp
    made += [(b"", b"\x0f\x5a", 8, 0), (b"\x66", b"\x0f\x5a", 16, 0)]  # cvtps2pd, cvtpd2ps
    made += [(b"\xf3", b"\x0f\x5a", 4, 0), (b"\xf2", b"\x0f\x5a", 8, 0)]
    made += [
        (b"", b"\x0f\x5b", 16, 0),
        (b"\x66", b"\x0f\x5b", 16, 0),
        (b"\xf3", b"\x0f\x5b", 16, 0),
    ]
    made += [(b"\xf3", b"\x0f\xe6", 8, 0), (b"\xf2", b"\x0f\xe6", 16, 0)]
    made += [(b"\x66", b"\x0f\xe6", 16, 0)]
    for code in (0x7C, 0x7D, 0xD0):  # hadd hsub addsub
        made += [(b"\x66", bytes([0x0F, code]), 16, 0), (b"\xf2", bytes([0x0F, code]), 16, 0)]
    made += [
        (b"\xf3", b"\x0f\x12", 16, 0),
        (b"\xf3", b"\x0f\x16", 16, 0),
        (b"\xf2", b"\x0f\x12", 8, 0),
    ]
    rounds = ((0x08, 16), (0x09, 16), (0x0A, 4), (0x0B, 8))
    made += [(b"\x66", bytes([0x0F, 0x3A, code]), size, 16) for code, size in rounds]
    made += [(b"\x66", bytes([0x0F, 0x3A, code]), 16, 1) for code in (0x40, 0x41)]  # dpps, dppd
    made += [(b"\x66", b"\x0f\x3a\x21", 4, 1)]  # insertps
    return tuple(made)


_OF_TWO: Final = frozenset({0x58, 0x59, 0x5C, 0x5E, 0x7C, 0x7D, 0xD0, 0x3A})
"""ADD, MUL, SUB, DIV, HADD, HSUB, ADDSUB, and DPPD and DPPS: their opcodes' second byte."""
_SSE_FLOAT: Final = _sse_floats()
"""(prefix, opcode, bytes of memory, how many values its immediate has: 1 for any)."""


def make(seed: int, origin: int, options: Options, length: int = 14) -> Stream:
    """The stream of this seed."""
    return Maker(seed, origin, options).make(length)
