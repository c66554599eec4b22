"""Find a race: run a guest with one seed after the other until it goes wrong, and run it again.

Two CPUs add 1 to the same word, twenty times each, without a lock. If one is interrupted between
its load and its store by the other, what the other has added is lost. Most seeds do not show that.
A seed that does shows it each time, at the same instruction.
"""

import itertools
import tempfile
from pathlib import Path

import avmm
from avmm import deterministic

CPU_0 = """
    48 bb 00 00 e0 fe 00 00 00 00     mov rbx, 0xfee00000
    c7 83 f0 00 00 00 ff 01 00 00     mov dword ptr [rbx + 0xf0], 0x1ff
    c7 83 10 03 00 00 00 00 00 01     mov dword ptr [rbx + 0x310], 0x1000000
    c7 83 00 03 00 00 00 45 00 00     mov dword ptr [rbx + 0x300], 0x4500
    c7 83 00 03 00 00 50 46 00 00     mov dword ptr [rbx + 0x300], 0x4650
    b9 14 00 00 00                    mov ecx, 20
    8b 04 25 00 00 06 00          add: mov eax, [0x60000]
    ff c0                             inc eax
    89 04 25 00 00 06 00              mov [0x60000], eax
    e2 ee                             loop add
    f3 90                         wait: pause
    83 3c 25 04 00 06 00 00           cmp dword ptr [0x60004], 0
    74 f4                             je wait
    66 ba f8 00                       mov dx, 0xf8
    31 c0                             xor eax, eax
    ef                                out dx, eax
"""
"""Long mode. It starts CPU 1 at 0x50000 by its local APIC (INIT, start-up), and ends the run."""
CPU_1 = """
    b8 00 60                          mov ax, 0x6000
    8e d8                             mov ds, ax
    b9 14 00                          mov cx, 20
    66 a1 00 00                   add: mov eax, [0]
    66 40                             inc eax
    66 a3 00 00                       mov [0], eax
    e2 f4                             loop add
    66 ff 06 04 00                    inc dword ptr [4]
    f4                            end: hlt
    eb fd                             jmp end
"""
"""Real mode."""


def machine_code(listing: str) -> bytes:
    return b"".join(bytes.fromhex(line[4:34]) for line in listing.strip("\n").splitlines())


async def counted(image: Path, seed: int) -> tuple[int, tuple[int, int]]:
    """What the two have counted, and a digest of everything that has happened."""
    async with avmm.Machine(
        kernel=image, flat="long@0x100000", memory="4M", cpus=2, deterministic=seed
    ) as vm:
        vm.memory.write(0x50000, machine_code(CPU_1))  # before its first instruction
        await vm.wait()
        return int.from_bytes(vm.memory.read(0x60000, 4), "little"), deterministic.trail(vm)


with tempfile.TemporaryDirectory() as folder:
    image = Path(folder, "guest.bin")
    image.write_bytes(machine_code(CPU_0))
    for seed in itertools.count():
        first = deterministic.run(counted, image, seed)
        print(f"seed {seed}: {first[0]} of 40")
        if first[0] < 40:
            break
    print(f"a race: {40 - first[0]} updates are lost with seed {seed}")
    assert deterministic.run(counted, image, seed) == first
    print("the same again, bit for bit")
