"""Several vCPUs on one engine: turns, exits and kicks, each vCPU's registers its own."""

from __future__ import annotations

import errno
import signal
import struct
import threading

from tests.soft.bare import ALIAS, CODE, STACK, TABLES, Bare, check, ioctl, kicked_by, kvm

KICK = signal.SIGUSR2
TIMES = 3000


def test_exits_and_kicks_of_several_vcpus() -> None:
    """Each vCPU sums up what it reads from a device of its own; another thread kicks them all."""
    code = b"\xb9" + struct.pack("<I", TIMES) + bytes.fromhex("31c0 0303 ffc9 75fa 66baf803 ef")
    sums = [0] * 3
    kicked = [0] * 3
    idents: dict[int, int] = {}
    done = threading.Event()

    def serve(guest: Bare, cpu: int) -> None:
        idents[cpu] = threading.get_ident()
        reads = 0
        while True:
            answer = guest.run(cpu)
            if answer == -errno.EINTR:
                kicked[cpu] += 1
            elif answer == kvm.KVM_EXIT_MMIO:
                assert guest.mmio(cpu)[:3] == (0, 0xD000_0000 + 0x1000 * cpu, 4)
                reads += 1
                guest.answer_mmio(reads * (cpu + 1), cpu)
            else:
                assert answer == kvm.KVM_EXIT_IO
                assert reads == TIMES
                sums[cpu] = guest.io(cpu)[3]
                del idents[cpu]
                return

    def kick() -> None:
        while not done.is_set():
            for ident in list(idents.values()):
                signal.pthread_kill(ident, KICK)
            done.wait(0.0005)

    with Bare(code, cpus=3) as guest, kicked_by(KICK):
        for cpu in range(3):
            guest.set_regs(cpu, rbx=0xD000_0000 + 0x1000 * cpu, rip=0x10_0000, rsp=0x9000)
        threads = [threading.Thread(target=serve, args=(guest, cpu)) for cpu in range(3)]
        kicker = threading.Thread(target=kick)
        for thread in (*threads, kicker):
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        kicker.join()
    assert sums == [TIMES * (TIMES + 1) // 2 * (cpu + 1) for cpu in range(3)]
    assert any(kicked)


def test_each_vcpu_has_its_own_address_space() -> None:
    """The same address is another page for each of them, turn by turn."""
    code = bytes.fromhex("66baf803 8b03 ef ebfb")  # 1: mov eax, [rbx]; out dx, eax; jmp 1b
    table, pages = 0x80_0000, [0x40_0000, 0x41_0000]
    with Bare(code, cpus=2) as guest:
        for level in range(4):  # its tables down to one page
            entry = pages[1] if level == 3 else table + 0x1000 * (level + 1)
            place = table + 0x1000 * level
            index = 1 if level == 1 else 0
            guest.ram[place : place + 4096] = bytes(4096)
            guest.ram[place + 8 * index : place + 8 * index + 8] = struct.pack("<Q", entry | 7)
        low = TABLES + 0x2000 | 7  # where the code is, as for the other
        guest.ram[table + 0x1000 : table + 0x1008] = struct.pack("<Q", low)
        first = TABLES + 0x5000  # the other's page at that address
        guest.ram[first : first + 8] = struct.pack("<Q", pages[0] | 7)
        for cpu, page in enumerate(pages):
            guest.ram[page : page + 4] = struct.pack("<I", 0x100 + cpu)
            guest.set_regs(cpu, rbx=ALIAS, rip=CODE, rsp=STACK)
        sregs = guest.sregs(1)
        sregs.cr3 = table
        check(ioctl(guest.vcpus[1], kvm.KVM_SET_SREGS, sregs))
        seen = []
        for turn in range(12):
            assert guest.run(turn % 2) == kvm.KVM_EXIT_IO
            seen.append(guest.io(turn % 2)[3])
        assert seen == [0x100, 0x101] * 6
