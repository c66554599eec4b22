"""A guest of two vCPUs with a disk and a network, in which the two race.

Both vCPUs count in the same word, without a lock, so that updates are lost. The first one also
writes and reads sectors of the disk, and sends frames that the program sends back, with another
content. It polls for the answers. The tables of the virtqueues are written by the program before
the guest's first instruction.
"""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio
from support.assembler import assemble

import avmm
from avmm.devices.virtio.frame import Frame
from avmm.devices.virtio.net import Net
from avmm.net.pair import End, pair

ROUNDS: Final = 8
TURNS: Final = 300
COUNTER, DONE, TABLE = 0x60000, 0x60008, 0x62000
SECOND: Final = 0x50000
"""Where the second vCPU starts, in real mode."""
NET, DISK = 0xC000_0000, 0xC000_1000
QUEUES = {"receive": 0x20_0000, "transmit": 0x21_0000, "disk": 0x22_0000}
BUFFERS: Final = 0x30_0000
FRAME: Final = 64
SECTOR: Final = 512
_AVAIL, _USED = 0x1000, 0x2000

_FIRST: Final = f"""
    lea rsp, [rip + _start]
    mov rbx, 0xfee00000
    mov dword ptr [rbx + 0xf0], 0x1ff
    mov dword ptr [rbx + 0x310], 0x1000000
    mov dword ptr [rbx + 0x300], 0x4500             # INIT
    mov dword ptr [rbx + 0x300], {0x4600 | SECOND >> 12:#x}  # SIPI
    mov rsi, {TABLE}
1:  mov rdi, [rsi]
    test rdi, rdi
    jz 2f
    mov rax, [rsi + 8]
    mov [rdi], eax
    add rsi, 16
    jmp 1b
2:  mov r12d, 0                                     # the round
round:
    inc r12d
    mov rbx, {QUEUES["disk"] + _AVAIL}
    mov [rbx + 2], r12w
    mov rbx, {DISK}
    mov dword ptr [rbx + 0x50], 0
    mov rbx, {QUEUES["transmit"] + _AVAIL}
    mov [rbx + 2], r12w
    mov rbx, {NET}
    mov dword ptr [rbx + 0x50], 1
    mov ecx, {TURNS}
3:  mov eax, [{COUNTER}]
    inc eax
    mov [{COUNTER}], eax
    dec ecx
    jnz 3b
    mov rbx, {QUEUES["disk"] + _USED}
4:  pause
    cmp [rbx + 2], r12w
    jne 4b
    mov rbx, {QUEUES["receive"] + _USED}
5:  pause
    cmp [rbx + 2], r12w
    jne 5b
    mov dx, 0x3f8
    mov al, 'r'
    out dx, al
    cmp r12d, {ROUNDS}
    jne round
6:  pause
    cmp dword ptr [{DONE}], 0
    je 6b
    rdtsc
    rdrand rbx
    mov [{DONE} + 8], rax
    mov [{DONE} + 16], rbx
    mov dx, 0xf8
    mov eax, 3
    out dx, eax
    hlt
"""
_SECOND: Final = f"""
    mov ax, {COUNTER >> 4}
    mov ds, ax
    mov ecx, {ROUNDS * TURNS}
1:  mov eax, [0]
    inc eax
    mov [0], eax
    dec ecx
    jnz 1b
    mov dx, 0x3f8
    mov al, '2'
    out dx, al
    mov dword ptr [8], 1
2:  hlt
    jmp 2b
"""


def _queue(memory: Any, name: str, chains: list[list[tuple[int, int, bool]]]) -> None:
    """The descriptors of these chains ((address, length, is it written)), all of them available
    as soon as the guest says how many are."""
    at, number, heads = QUEUES[name], 0, []
    for chain in chains:
        heads.append(number)
        for place, (address, length, writes) in enumerate(chain):
            more = place + 1 < len(chain)
            entry = struct.pack("<QIHH", address, length, writes << 1 | more, number + 1)
            memory.write(at + 16 * number, entry)
            number += 1
    memory.write(at + _AVAIL, struct.pack(f"<HH{len(heads)}H", 1, 0, *heads))


def _prepare(memory: Any) -> None:
    memory.write(SECOND, assemble(_SECOND, 16, 0))
    made = random.Random(1)
    at = BUFFERS

    def buffer(data: bytes) -> int:
        nonlocal at
        memory.write(at, data)
        at += -(-len(data) // 16) * 16
        return at - -(-len(data) // 16) * 16

    disk = []
    for number in range(ROUNDS):
        kind, sector = (1, number) if number % 2 == 0 else (0, number - 1)
        header = buffer(struct.pack("<IIQ", kind, 0, sector))
        data = buffer(made.randbytes(SECTOR) if kind else bytes(SECTOR))
        disk.append([(header, 16, False), (data, SECTOR, not kind), (buffer(b"\xff"), 1, True)])
    _queue(memory, "disk", disk)
    sent = [buffer(bytes(12) + made.randbytes(FRAME)) for _ in range(ROUNDS)]
    _queue(memory, "transmit", [[(address, 12 + FRAME, False)] for address in sent])
    got = [buffer(bytes(2048)) for _ in range(ROUNDS)]
    _queue(memory, "receive", [[(address, 2048, True)] for address in got])
    memory.write(QUEUES["receive"] + _AVAIL + 2, struct.pack("<H", ROUNDS))
    writes = []
    for base, names in ((NET, ("receive", "transmit")), (DISK, ("disk",))):
        writes += [(base + 0x70, 0), (base + 0x70, 1), (base + 0x70, 3)]
        writes += [(base + 0x24, 1), (base + 0x20, 1)]  # VERSION_1
        if base == DISK:
            writes += [(base + 0x24, 0), (base + 0x20, 1 << 9)]  # FLUSH
        else:
            writes += [(base + 0x24, 0), (base + 0x20, 1 << 15)]  # MRG_RXBUF
        writes.append((base + 0x70, 11))
        for index, name in enumerate(names):
            where = QUEUES[name]
            writes += [(base + 0x30, index), (base + 0x38, 64)]
            writes += [(base + 0x80, where), (base + 0x90, where + _AVAIL)]
            writes += [(base + 0xA0, where + _USED), (base + 0x44, 1)]
        writes.append((base + 0x70, 15))
        if base == NET:
            writes.append((base + 0x50, 0))
    memory.write(TABLE, b"".join(struct.pack("<QQ", *write) for write in writes))


async def _echo(end: End) -> None:
    made = random.Random(2)
    while True:
        frame = await end.receive()
        await end.send(Frame(frame.data[::-1] + made.randbytes(8)))


@asynccontextmanager
async def racing(folder: Path, seed: int, **settings: Any) -> AsyncIterator[avmm.Machine]:
    """The machine, which has not run yet. `folder` gets the image and the disk."""
    image, disk = folder / "racing.bin", folder / "disk.img"
    image.write_bytes(assemble(_FIRST, 64, 0x10_0000))
    disk.write_bytes(random.Random(3).randbytes(32 * SECTOR))
    here, there = pair()
    net = Net(there, mac="52:54:00:00:00:01")
    async with (
        avmm.Machine(
            kernel=image,
            flat="long@0x100000",
            memory="8M",
            cpus=2,
            disks=[str(disk)],
            devices=[avmm.virtio(net)],
            deterministic=seed,
            **settings,
        ) as vm,
        trio.open_nursery() as nursery,
    ):
        _prepare(vm.memory)
        nursery.start_soon(_echo, here)
        yield vm
        nursery.cancel_scope.cancel()


def counted(vm: avmm.Machine) -> int:
    """What the two have counted together."""
    return int.from_bytes(vm.memory.read(COUNTER, 4), "little")
