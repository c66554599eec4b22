"""What a guest leaves with, what KVM_RUN finishes, and what the state then holds."""

from __future__ import annotations

import errno
import mmap
import os
import struct

import pytest

from tests.soft.bare import CODE, Bare, check, ffi, ioctl, kvm

WINDOW = 0xD000_0000
BUFFER = 0x20_0000
OUT = bytes.fromhex("66baf803 ef")
HLT = b"\xf4"


def drain(guest: Bare) -> int:
    guest.runs[0].immediate_exit = 1
    try:
        return guest.run()
    finally:
        guest.runs[0].immediate_exit = 0


def test_an_in_is_finished_by_the_drain() -> None:
    with Bare(bytes.fromhex("66baf803 ed") + HLT) as guest:
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.io()[:3] == (0, 0x3F8, 4)
        guest.answer_io(0x11223344)
        assert drain(guest) == -errno.EINTR
        regs = guest.regs()
        assert (regs.rax, regs.rip) == (0x11223344, CODE + 5)
        assert drain(guest) == -errno.EINTR
        assert guest.run() == kvm.KVM_EXIT_HLT


def test_an_out_is_finished_by_the_drain_and_not_made_again() -> None:
    with Bare(bytes.fromhex("66baf803 b051 ee") + HLT) as guest:
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.io() == (1, 0x3F8, 1, 0x51)
        assert drain(guest) == -errno.EINTR
        assert guest.regs().rip == CODE + 7
        assert guest.run() == kvm.KVM_EXIT_HLT


@pytest.mark.parametrize(
    ("code", "size"),
    [("8a03", 1), ("668b03", 2), ("8b03", 4), ("488b03", 8)],
)
def test_mmio_loads_of_every_width(code: str, size: int) -> None:
    with Bare(bytes.fromhex(code) + HLT) as guest:
        guest.set_regs(rbx=WINDOW + 8, rip=CODE, rsp=0x9000)
        assert guest.run() == kvm.KVM_EXIT_MMIO
        assert guest.mmio() == (0, WINDOW + 8, size, 0)
        guest.answer_mmio(0x8877665544332211)
        assert guest.run() == kvm.KVM_EXIT_HLT
        assert guest.regs().rax == 0x8877665544332211 & ((1 << 8 * size) - 1)


def test_a_load_over_a_page_is_finished_in_fragments() -> None:
    with Bare(bytes.fromhex("488b03") + HLT) as guest:
        guest.set_regs(rbx=WINDOW + 0xFFD, rip=CODE, rsp=0x9000)
        assert guest.run() == kvm.KVM_EXIT_MMIO
        assert guest.mmio()[:3] == (0, WINDOW + 0xFFD, 3)
        guest.answer_mmio(0x332211)
        assert drain(guest) == kvm.KVM_EXIT_MMIO
        assert guest.mmio()[:3] == (0, WINDOW + 0x1000, 5)
        guest.answer_mmio(0x8877665544)
        assert drain(guest) == -errno.EINTR
        assert guest.regs().rax == 0x8877665544332211


def test_a_read_modify_write_reads_once_and_writes_once() -> None:
    with Bare(bytes.fromhex("ff03") + HLT) as guest:
        guest.set_regs(rbx=WINDOW, rip=CODE, rsp=0x9000)
        assert guest.run() == kvm.KVM_EXIT_MMIO
        assert guest.mmio()[:3] == (0, WINDOW, 4)
        guest.answer_mmio(41)
        assert guest.run() == kvm.KVM_EXIT_MMIO
        assert guest.mmio() == (1, WINDOW, 4, 42)
        assert drain(guest) == -errno.EINTR
        assert guest.regs().rip == CODE + 2


def test_string_input_and_output() -> None:
    with Bare(bytes.fromhex("f36c 4889fe 4883ee04 b104 f36e") + HLT) as guest:
        guest.set_regs(rdi=BUFFER, rcx=4, rdx=0x80, rip=CODE, rsp=0x9000)
        for value in b"abcd":
            assert guest.run() == kvm.KVM_EXIT_IO
            assert guest.io()[:3] == (0, 0x80, 1)
            guest.answer_io(value)
        seen = []
        for _ in range(4):
            assert guest.run() == kvm.KVM_EXIT_IO
            seen.append(guest.io())
        assert seen == [(1, 0x80, 1, value) for value in b"abcd"]
        assert guest.ram[BUFFER : BUFFER + 4] == b"abcd"
        assert guest.run() == kvm.KVM_EXIT_HLT


def test_a_guest_without_handlers_shuts_down() -> None:
    with Bare(b"\x0f\x0b") as guest:
        assert guest.run() == kvm.KVM_EXIT_SHUTDOWN


def idt(guest: Bare, handlers: dict[int, int]) -> None:
    table = 0x7000
    for vector, at in handlers.items():
        gate = struct.pack("<HHBBHII", at & 0xFFFF, 8, 0, 0x8E, at >> 16, 0, 0)
        guest.ram[table + 16 * vector : table + 16 * vector + 16] = gate
    gdt = 0x6800
    guest.ram[gdt : gdt + 24] = struct.pack("<QQQ", 0, 0xAF9B000000FFFF, 0xCF93000000FFFF)
    sregs = guest.sregs()
    sregs.idt.base, sregs.idt.limit = table, 0xFFF
    sregs.gdt.base, sregs.gdt.limit = gdt, 23
    check(ioctl(guest.vcpus[0], kvm.KVM_SET_SREGS, sregs))


def test_exceptions_go_through_the_guests_table() -> None:
    """A page fault with its address and error code, and #UD; both handlers return."""
    code = bytes.fromhex("48b8 00000000c0ffffff 8b00 90 0f0b 90 f4")
    with Bare(code) as guest:
        page_fault, invalid = 0x11_0000, 0x11_1000
        # pop rax; out; mov rax, cr2; shr; out; add qword [rsp], 2; iretq
        guest.ram[page_fault : page_fault + 26] = bytes.fromhex(
            "58 66baf803 ef 0f20d0 48c1e808 ef 4883042402 48cf"
        ).ljust(26, b"\x90")
        guest.ram[invalid : invalid + 14] = bytes.fromhex(
            "b811000000 66baf803 ef 90 90".replace(" ", "")
        ).ljust(14, b"\x90")
        guest.ram[invalid + 14 : invalid + 21] = bytes.fromhex("4883042402 48cf")
        idt(guest, {14: page_fault, 6: invalid})
        values = []
        for _ in range(3):
            assert guest.run() == kvm.KVM_EXIT_IO
            values.append(guest.io()[3])
        assert values == [0, 0xC000_0000, 0x11]
        assert guest.run() == kvm.KVM_EXIT_HLT


@pytest.mark.parametrize("mask", [0x200, 0x201])
def test_syscall_gives_the_address_and_the_flags(mask: int) -> None:
    """RCX has the next instruction, and the flags in FMASK are cleared: here carry, or not."""
    entry = 0x11_0000
    code = bytes.fromhex("b0ff 0401 0f05")  # mov al, 0xff; add al, 1; syscall
    with Bare(code) as guest:
        msrs = ffi.new("struct kvm_msrs *", {"nmsrs": 3, "entries": 3})
        values = {0xC0000081: 8 << 32, 0xC0000082: entry, 0xC0000084: mask}
        for place, (index, value) in zip(msrs.entries, values.items(), strict=True):
            place.index, place.data = index, value
        assert ioctl(guest.vcpus[0], kvm.KVM_SET_MSRS, msrs) == 3
        # setc bl; mov eax, ecx; mov dx, 0x3f8; out dx, eax; mov al, bl; out dx, al
        guest.ram[entry : entry + 13] = bytes.fromhex("0f92c3 89c8 66baf803 ef 88d8 ee")
        idt(guest, {})
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.io()[3] == CODE + len(code)
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.io()[3] == (mask == 0x200)


def test_hypercalls_are_answered() -> None:
    with Bare(bytes.fromhex("b863000000 0f01c1 66baf803 ef b863000000 0f01d9 ef")) as guest:
        for _ in range(2):
            assert guest.run() == kvm.KVM_EXIT_IO
            assert guest.io()[3] == (-1000) & 0xFFFFFFFF


def dirty(guest: Bare, slot: int, pages: int) -> set[int]:
    bitmap = bytearray((pages + 63) // 64 * 8)
    log = ffi.new("struct kvm_dirty_log *", {"slot": slot})
    log.dirty_bitmap = ffi.from_buffer(bitmap)
    check(ioctl(guest.vm, kvm.KVM_GET_DIRTY_LOG, log))
    bits = int.from_bytes(bitmap, "little")
    return {page for page in range(pages) if bits >> page & 1}


def test_the_dirty_log_has_each_written_page_once() -> None:
    code = bytes.fromhex("c60301 66baf803 ef c60302 ef")  # mov byte [rbx], 1; out; ...
    with Bare(code) as guest:
        guest.set_regs(rbx=BUFFER, rip=CODE, rsp=0x9000, rdx=0)
        pages = len(guest.ram) // 4096
        guest.set_memory(0, 0, len(guest.ram), kvm.KVM_MEM_LOG_DIRTY_PAGES)
        assert guest.run() == kvm.KVM_EXIT_IO
        tables = {1, 2, 3}  # accessed and dirty bits
        assert dirty(guest, 0, pages) - tables == {BUFFER >> 12}
        assert dirty(guest, 0, pages) == set()
        assert guest.run() == kvm.KVM_EXIT_IO
        assert dirty(guest, 0, pages) - tables == {BUFFER >> 12}


def test_a_store_to_read_only_memory_exits() -> None:
    with Bare(bytes.fromhex("8b03 c7031b000000 8b03") + OUT) as guest:
        guest.set_memory(1, 0x0200_0000, 0x1000, kvm.KVM_MEM_READONLY, guest.address + BUFFER)
        guest.ram[BUFFER : BUFFER + 4] = b"\x11\x22\x33\x44"
        guest.set_regs(rbx=0x0200_0000, rip=CODE, rsp=0x9000)
        assert guest.run() == kvm.KVM_EXIT_MMIO
        assert guest.mmio() == (1, 0x0200_0000, 4, 0x1B)
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.io()[3] == 0x44332211


@pytest.mark.parametrize("seed", [None, 5], ids=["ordinary", "deterministic"])
def test_memory_that_the_host_has_lost_is_the_hosts_error(seed: int | None) -> None:
    load_and_halt = bytes.fromhex("488b03") + HLT
    file = os.memfd_create("memory")
    os.ftruncate(file, 0x1000)
    with Bare(load_and_halt, seed=seed) as guest, mmap.mmap(file, 0x1000) as page:
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(page)))
        guest.set_memory(1, 0x0200_0000, 0x1000, address=address)
        os.ftruncate(file, 0)
        guest.set_regs(rbx=0x0200_0000, rip=CODE, rsp=0x9000)
        assert run_settled(guest) == -errno.EFAULT
        assert guest.regs().rip == CODE
        os.ftruncate(file, 0x1000)
        os.pwrite(file, b"\x11", 0)
        assert run_settled(guest) == kvm.KVM_EXIT_HLT
        assert guest.regs().rax == 0x11
    os.close(file)


def run_settled(guest: Bare) -> int:
    """In a deterministic run it leaves with KVM_EXIT_INTR for the host to settle."""
    while (left := guest.run()) == kvm.KVM_EXIT_INTR:
        pass
    return left


def test_registers_come_back_as_they_were_set() -> None:
    with Bare() as guest:
        guest.set_regs(rax=1, r15=0x8000_0000_0000_0001, rip=CODE, rsp=0x9000)
        regs = guest.regs()
        regs.rflags = 0xCD7
        check(ioctl(guest.vcpus[0], kvm.KVM_SET_REGS, regs))
        again = guest.regs()
        assert bytes(ffi.buffer(again)) == bytes(ffi.buffer(regs))
        sregs = guest.sregs()
        check(ioctl(guest.vcpus[0], kvm.KVM_SET_SREGS, sregs))
        assert bytes(ffi.buffer(guest.sregs())) == bytes(ffi.buffer(sregs))
        area = ffi.new("uint8_t[4096]")
        check(ioctl(guest.vcpus[0], kvm.KVM_GET_XSAVE, area))
        area[160] = 0x5A
        area[32] = 0x77
        check(ioctl(guest.vcpus[0], kvm.KVM_SET_XSAVE, area))
        other = ffi.new("uint8_t[4096]")
        check(ioctl(guest.vcpus[0], kvm.KVM_GET_XSAVE, other))
        assert bytes(ffi.buffer(other)) == bytes(ffi.buffer(area))


def test_real_mode() -> None:
    code = bytes.fromhex("b83412 baf803 ef")  # mov ax, 0x1234; mov dx, 0x3f8; out dx, ax
    with Bare() as guest:
        guest.ram[0x500 : 0x500 + len(code)] = code
        sregs = guest.sregs()
        sregs.cr0, sregs.cr4, sregs.efer, sregs.cr3 = 0x10, 0, 0, 0
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            segment.base, segment.selector, segment.limit = 0, 0, 0xFFFF
            segment.db = segment.l = segment.g = 0
        check(ioctl(guest.vcpus[0], kvm.KVM_SET_SREGS, sregs))
        guest.set_regs(rip=0x500, rsp=0x8000)
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.io() == (1, 0x3F8, 2, 0x1234)


def test_an_int_that_cannot_be_delivered_faults_at_itself() -> None:
    """#GP with the error code of the table's entry, and RIP at the INT."""
    with Bare(bytes.fromhex("cd80 f4")) as guest:
        handler = 0x11_0000
        guest.ram[handler : handler + 9] = bytes.fromhex("58 66baf803 ef 58 ef f4")
        idt(guest, {13: handler})
        values = []
        for _ in range(2):
            assert guest.run() == kvm.KVM_EXIT_IO
            values.append(guest.io()[3])
        assert values == [0x80 * 8 + 2, CODE]


def test_a_tsc_runs_at_the_pace_that_is_set() -> None:
    with Bare(bytes.fromhex("0f31 66baf803 ef f4")) as guest:
        assert ioctl(guest.vcpus[0], kvm.KVM_SET_TSC_KHZ, 1_000_000) == 0
        assert ioctl(guest.vcpus[0], kvm.KVM_GET_TSC_KHZ) == 1_000_000


def test_flags_that_are_set_are_the_guests() -> None:
    """pushfq; pop rax; out"""
    with Bare(bytes.fromhex("9c 58 66baf803 ef")) as guest:
        regs = guest.regs()
        regs.rflags = 0xCD7
        check(ioctl(guest.vcpus[0], kvm.KVM_SET_REGS, regs))
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.io()[3] == 0xCD7


@pytest.mark.parametrize(
    ("limit", "bits", "reason"),
    [(0x67, 0, 13), (0x2067, 0, None), (0x2067, 0x08, 13), (0x67 + 0x7F, 0, 13)],
    ids=["no bitmap", "allowed", "refused by a bit", "the bitmap ends before it"],
)
def test_ports_in_ring_3_are_those_of_the_tasks_bitmap(
    limit: int, bits: int, reason: int | None
) -> None:
    """Intel SDM 1, 19.5.2: each byte of the access has a bit; none behind its end."""
    protection, task = 0x11_0000, 0x12_0000
    with Bare(bytes.fromhex("66baf803 b807000000 ef")) as guest:
        guest.ram[protection : protection + 10] = bytes.fromhex("b80d000000 66baf803 ef")
        idt(guest, {13: protection})
        guest.ram[task + 4 : task + 12] = struct.pack("<Q", 0x8F00)
        guest.ram[task + 102 : task + 104] = struct.pack("<H", 0x68)
        guest.ram[task + 0x68 + 0x3F8 // 8] = bits
        sregs = guest.sregs()
        for segment in (sregs.cs, sregs.ss):
            segment.dpl, segment.selector = 3, segment.selector | 3
        sregs.tr.base, sregs.tr.limit, sregs.tr.type, sregs.tr.present = task, limit, 11, 1
        check(ioctl(guest.vcpus[0], kvm.KVM_SET_SREGS, sregs))
        assert guest.run() == kvm.KVM_EXIT_IO
        assert guest.io()[3] == (7 if reason is None else reason)
