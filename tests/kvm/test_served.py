"""Which accesses a vCPU's thread serves in C (claims.h), and what it answers."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from support.compiled import compiled

SOURCE = """
#include <stddef.h>
#include "claims.h"
static uint8_t bytes[64] = { 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18 };
static struct avmm_register r = { .bytes = bytes, .size = 64, .answers = 1 };
static union { struct kvm_run run; uint8_t page[8192]; } at;
/* A claim of 8 addresses from 0x100 on, of a device 4 bytes wide, with the register's bytes from 2
 * on. Returns 1 and the answer if C serves the access, 2 if a task does. */
int serve(int is_port, uint64_t address, uint32_t size, int is_write, uint32_t count,
          uint64_t *value)
{
    static struct avmm_claim claim;
    static int begun;
    if (!begun++)
        avmm_register_init(&r);
    claim = (struct avmm_claim){ .first = 0x100, .end = 0x108, .width = 4,
        .reads = { .of = &r, .at = 2 },
        .writes = { .of = &r, .at = 2, .how = AVMM_STORES, .tasks = 1 } };
    struct avmm_claims claims = { .pio_count = is_port, .pio = &claim,
                                  .mmio_count = !is_port, .mmio = &claim };
    void *data = is_port ? at.page + 4096 : at.run.mmio.data;
    if (is_port) {
        at.run.exit_reason = KVM_EXIT_IO;
        at.run.io.port = address;
        at.run.io.size = size;
        at.run.io.count = count;
        at.run.io.direction = is_write ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN;
        at.run.io.data_offset = 4096;
    } else {
        at.run.exit_reason = KVM_EXIT_MMIO;
        at.run.mmio.phys_addr = address;
        at.run.mmio.len = size;
        at.run.mmio.is_write = is_write;
    }
    memcpy(data, value, 8);
    const struct avmm_claim *found = claim_of_exit(&claims, &at.run);
    if (!found)
        return 0;
    int served = serve_register(found, &at.run);
    memcpy(value, data, 8);
    return served ? 1 : is_tasks(found, &at.run) ? 2 : 0;
}
uint64_t held(void) { uint64_t v; memcpy(&v, bytes + 2, 8); return v; }
"""
NOISE = 0xEEEE_EEEE_EEEE_EEEE


def first_wrong(library: Any) -> str:
    """The first access that is not served as it should be."""
    library.held.restype = ctypes.c_uint64

    def serve(port: bool, at: int, size: int, value: int | None = None, count: int = 1) -> Any:
        cell = ctypes.c_uint64(NOISE if value is None else value)
        address = ctypes.c_uint64(at)
        answer = library.serve(
            int(port), address, size, int(value is not None), count, ctypes.byref(cell)
        )
        return answer if value is not None or answer != 1 else cell.value

    for port in (False, True):
        before = library.held()
        for words, got, expected in (
            ("a write", serve(port, 0x101, 2, 0x5544_3322), 1),
            ("its bytes", library.held(), before & ~0xFF_FF00 | 0x33_2200),
            ("a read", serve(port, 0x100, 4), NOISE & ~0xFFFF_FFFF | library.held() & 0xFFFF_FFFF),
            ("a wide read", serve(port, 0x100, 8), 0),
            ("a wide write", serve(port, 0x100, 8, 1), 2),
            ("an odd read", serve(port, 0x100, 3), 0),
            ("a read over the edge", serve(port, 0x106, 4), 0),
            ("a read elsewhere", serve(port, 0xFF, 1), 0),
            ("a write elsewhere", serve(port, 0x108, 1, 1), 0),
        ):
            if got != expected:
                return f"{words} ({port=}): {got:#x}, expected {expected:#x}"
    if serve(True, 0x100, 1, 7, count=2) != 2 or serve(True, 0x100, 1, count=2) != 0:
        return "a string"
    return ""


def test_accesses_are_served(tmp_path: Path) -> None:
    assert not first_wrong(compiled(tmp_path, SOURCE, "claims.h"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("access.size > claim->width || ", ""),
        (" || (access.size & (access.size - 1))", ""),
        ("run->io.count != 1", "0"),
        ("way->at + (uint32_t)(access.address - claim->first)", "way->at"),
        ("way->at + (uint32_t)(access.address - claim->first)",
         "(uint32_t)(access.address - claim->first)"),
        ("memcpy(&value, access.data, access.size);", ""),
        ("memcpy(access.data, &value, access.size);", "memcpy(access.data, &value, 8);"),
        ("memcpy(access.data, &value, access.size);", ""),
        ("return access_of(run).is_write ? claim->writes.tasks : claim->reads.tasks;",
         "return claim->writes.tasks;"),
        ("access.is_write ? &claim->writes : &claim->reads", "&claim->reads"),
        ("(char *)run + run->io.data_offset", "(char *)run + 64"),
        ("run->io.direction == KVM_EXIT_IO_OUT", "run->io.direction == KVM_EXIT_IO_IN"),
        (".data = run->mmio.data", ".data = run->mmio.data + 1"),
        (".is_write = run->mmio.is_write", ".is_write = 1"),
    ],
)  # fmt: skip
def test_a_bug_is_found(tmp_path: Path, old: str, new: str) -> None:
    assert first_wrong(compiled(tmp_path, SOURCE, "claims.h", old, new))
