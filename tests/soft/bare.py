"""A bare guest on the software engine: memory, a vCPU in long mode, some machine code.

Memory is identity-mapped by 2 MiB pages. `alias` maps the first 2 MiB a second time, by 4 KiB
pages, executable or not.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from avmm.kvm._kvm import ffi
from avmm.kvm._kvm import lib as kvm

soft = pytest.importorskip("avmm.soft._soft")
spec = importlib.util.find_spec("unicorn")
if spec is None or spec.origin is None:
    pytest.skip("unicorn is not installed", allow_module_level=True)
LIBRARY = Path(spec.origin).parent / "lib" / "libunicorn.so.2"

SIZE = 16 << 20
TABLES, CODE, ALIAS, NX_ALIAS = 0x1000, 0x10_0000, 0x4000_0000, 0x8000_0000
STACK = 0x9000


def load() -> None:
    why = soft.ffi.new("char[512]")
    if soft.lib.soft_load(str(LIBRARY).encode(), why, 512):
        raise RuntimeError(soft.ffi.string(why).decode())


@contextmanager
def kicked_by(number: signal.Signals) -> Iterator[None]:
    """The signal's handler is the engine's own, in C."""
    handler = int(soft.ffi.cast("uintptr_t", soft.ffi.addressof(soft.lib, "soft_kicked")))
    libc = ctypes.CDLL(None)
    libc.signal.restype = libc.signal.argtypes = None
    before = signal.getsignal(number)
    libc.signal(ctypes.c_int(number), ctypes.c_void_p(handler))
    try:
        yield
    finally:
        signal.signal(number, before)


def ioctl(fd: int, request: int, argument: Any = 0) -> int:
    if isinstance(argument, int):
        pointer = soft.ffi.cast("void *", argument)
    else:
        pointer = soft.ffi.cast("void *", int(ffi.cast("uintptr_t", argument)))
    return soft.lib.soft_ioctl(fd, request, pointer)


def check(answer: int) -> int:
    if answer < 0:
        raise OSError(-answer, "soft_ioctl")
    return answer


class Bare:
    def __init__(
        self, code: bytes = b"", size: int = SIZE, cpus: int = 1, seed: int | None = None
    ) -> None:
        load()
        self.system = check(soft.lib.soft_open())
        if seed is not None:
            check(soft.lib.soft_seed(self.system, seed))
        self.vm = check(ioctl(self.system, kvm.KVM_CREATE_VM))
        self.ram = mmap.mmap(-1, size)
        self.address = int(ffi.cast("uintptr_t", ffi.from_buffer(self.ram)))
        self.set_memory(0, 0, size)
        self.vcpus = [check(ioctl(self.vm, kvm.KVM_CREATE_VCPU, i)) for i in range(cpus)]
        self.maps = [mmap.mmap(fd, 3 * 4096) for fd in self.vcpus]
        self.runs = [ffi.cast("struct kvm_run *", ffi.from_buffer(m)) for m in self.maps]
        self._tables()
        self.ram[CODE : CODE + len(code)] = code
        for i in range(cpus):
            self.long_mode(i)
            self.set_regs(i, rip=CODE, rsp=STACK - 0x100 * i)

    def set_memory(
        self, slot: int, gpa: int, size: int, flags: int = 0, address: int | None = None
    ) -> int:
        """Without an address the region is the RAM's beginning."""
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot, region.flags, region.guest_phys_addr = slot, flags, gpa
        region.memory_size = size
        region.userspace_addr = self.address if address is None else address
        return check(ioctl(self.vm, kvm.KVM_SET_USER_MEMORY_REGION, region))

    def _tables(self) -> None:
        t = TABLES
        put = lambda at, value: self.ram.__setitem__(slice(at, at + 8), struct.pack("<Q", value))  # noqa: E731
        put(t, t + 0x1000 | 7)
        put(t + 0x1000, t + 0x2000 | 7)
        put(t + 0x1008, t + 0x3000 | 7)  # ALIAS
        put(t + 0x1010, t + 0x4000 | 7)  # NX_ALIAS
        put(t + 0x1018, 0xC000_0000 | 0x87)  # the 1 GiB with the APICs
        for i in range(512):
            put(t + 0x2000 + 8 * i, i << 21 | 0x87)
        put(t + 0x3000, t + 0x5000 | 7)
        put(t + 0x4000, t + 0x6000 | 7)
        for i in range(512):
            put(t + 0x5000 + 8 * i, i << 12 | 7)
            put(t + 0x6000 + 8 * i, i << 12 | 7 | 1 << 63)

    def long_mode(self, cpu: int) -> None:
        s = self.sregs(cpu)
        for seg in (s.cs, s.ds, s.es, s.fs, s.gs, s.ss):
            seg.base, seg.limit, seg.selector = 0, 0xFFFFFFFF, 0x10
            seg.type, seg.present, seg.dpl, seg.s, seg.g, seg.db, seg.l = 3, 1, 0, 1, 1, 1, 0
            seg.unusable = 0
        s.cs.type, s.cs.l, s.cs.db, s.cs.selector = 11, 1, 0, 8
        s.cr0, s.cr3, s.cr4, s.efer = 0x80000033, TABLES, 0x620, 0xD01
        check(ioctl(self.vcpus[cpu], kvm.KVM_SET_SREGS, s))

    def sregs(self, cpu: int = 0) -> Any:
        s = ffi.new("struct kvm_sregs *")
        check(ioctl(self.vcpus[cpu], kvm.KVM_GET_SREGS, s))
        return s

    def regs(self, cpu: int = 0) -> Any:
        r = ffi.new("struct kvm_regs *")
        check(ioctl(self.vcpus[cpu], kvm.KVM_GET_REGS, r))
        return r

    def set_regs(self, cpu: int = 0, **values: int) -> None:
        r = self.regs(cpu)
        r.rflags = 2
        for name, value in values.items():
            setattr(r, name, value)
        check(ioctl(self.vcpus[cpu], kvm.KVM_SET_REGS, r))

    def run(self, cpu: int = 0) -> int:
        """The exit reason, or -errno."""
        answer = ioctl(self.vcpus[cpu], kvm.KVM_RUN)
        return answer if answer < 0 else self.runs[cpu].exit_reason

    def io(self, cpu: int = 0) -> tuple[int, int, int, int]:
        """(is it a write, port, size, value)"""
        io = self.runs[cpu].io
        data = bytes(self.maps[cpu][io.data_offset : io.data_offset + io.size])
        return io.direction, io.port, io.size, int.from_bytes(data, "little")

    def answer_io(self, value: int, cpu: int = 0) -> None:
        io = self.runs[cpu].io
        self.maps[cpu][io.data_offset : io.data_offset + io.size] = value.to_bytes(
            io.size, "little"
        )

    def mmio(self, cpu: int = 0) -> tuple[int, int, int, int]:
        """(is it a write, address, size, value)"""
        m = self.runs[cpu].mmio
        data = bytes(m.data[0:8])[: m.len]
        return m.is_write, m.phys_addr, m.len, int.from_bytes(data, "little")

    def answer_mmio(self, value: int, cpu: int = 0) -> None:
        self.runs[cpu].mmio.data = value.to_bytes(8, "little")

    def close(self) -> None:
        for fd in (*self.vcpus, self.vm, self.system):
            soft.lib.soft_close(fd)

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
