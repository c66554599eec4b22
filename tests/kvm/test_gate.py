"""The C that decides whether a vCPU's thread needs the GIL (claims.h), and when it asks for it
(gate.h)."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.compiled import compiled

CLAIMS_C = """
#include <stddef.h>
#include <stdint.h>
#include "claims.h"
int found(struct avmm_claim *of, int count, uint64_t address, uint32_t size)
{
    const struct avmm_claim *claim = claim_of(of, count, address, size);
    return claim ? (int)(claim - of) : -1;
}
"""
GATE_C = """
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}
#include "gate.h"
int pass(void) { gate_pass(); return passed != 0; }
int open_(void) { gate_open(); return atomic_load(&gate) == 0; }
int reset(void) { gate_reset(); return 1; }
"""


class CWay(ctypes.Structure):
    _fields_ = (
        ("tasks", ctypes.c_uint8),
        ("how", ctypes.c_uint8),
        ("of", ctypes.c_void_p),
        ("at", ctypes.c_uint32),
    )


class CClaim(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("width", ctypes.c_uint32),
        ("reads", CWay),
        ("writes", CWay),
    )


def wrong_claim(library: Any, edges: list[int], address: int, size: int) -> bool:
    """Does it find another claim than the one that holds all of the access?"""
    pairs = list(zip(edges[::2], edges[1::2], strict=False))
    of = (CClaim * len(pairs))(*((first, end, 8) for first, end in pairs))
    expected = next(
        (n for n, (first, end) in enumerate(pairs) if first <= address and address + size <= end),
        -1,
    )
    where = ctypes.c_uint64(address)
    found: int = library.found(of, len(pairs), where, ctypes.c_uint32(size))
    return found != expected


@pytest.fixture(scope="module")
def claims_c(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compiled(tmp_path_factory.mktemp("claims"), CLAIMS_C, "claims.h")


@given(
    edges=st.lists(st.integers(0, 60), unique=True, max_size=12).map(sorted),
    address=st.integers(0, 64),
    size=st.integers(1, 8),
)
def test_the_claim_of_an_access_is_the_one_that_holds_all_of_it(
    claims_c: Any, edges: list[int], address: int, size: int
) -> None:
    assert not wrong_claim(claims_c, edges, address, size)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("of[middle].end <= address", "of[middle].end < address"),
        ("address < of[low].first || ", ""),
        (" || size > of[low].end - address", ""),
        ("size > of[low].end - address", "size >= of[low].end - address"),
    ],
)
def test_a_wrong_search_is_found(tmp_path: Path, old: str, new: str) -> None:
    library = compiled(tmp_path, CLAIMS_C, "claims.h", old, new)
    edges = [2, 5, 5, 9, 20, 21]
    assert any(wrong_claim(library, edges, at, size) for at in range(24) for size in (1, 2, 4))


def shut_out(gate: Any) -> bool:
    """Is somebody shut out for longer than for one turn by one who does not come back?"""
    assert gate["pass"]()
    entered: list[int] = []
    for _ in range(2):
        other = threading.Thread(target=lambda: entered.append(gate["pass"]()))
        other.start()
        other.join()
    return not any(entered)


def test_one_who_does_not_come_back_through_the_gate_shuts_nobody_out(tmp_path: Path) -> None:
    gate = compiled(tmp_path, GATE_C, "gate.h")
    assert not shut_out(gate)
    gate.reset()
    assert gate["pass"]()
    assert gate.open_()


def test_a_gate_that_stays_shut_is_found(tmp_path: Path) -> None:
    assert shut_out(compiled(tmp_path, GATE_C, "gate.h", "until > now || ", "until || "))
