"""Programs and hosts, for hypothesis to pick and, one of each kind, for exhaustive tests."""

from __future__ import annotations

from typing import Final

from hypothesis import strategies as st

from model.vcpu import Host, Op

CROSSING: Final = 0x1000
SHAPES: Final = (
    Op("compute", count=2),
    Op("in", 1, 1),
    Op("out", 2, 2),
    Op("ins", 1, 3, 7),
    Op("outs", 4, 4, 4),
    Op("load", 4, 0x10, parts=(4,)),
    Op("load", 8, CROSSING - 3, parts=(3, 5)),
    Op("load", 16, 0x20, parts=(8, 8)),
    Op("store", 8, 0x18, parts=(8,)),
    Op("store", 8, CROSSING - 1, parts=(1, 7)),
    Op("store", 16, CROSSING - 9, parts=(8, 1, 7)),
    Op("rmw", 2, 0x40),
    Op("outs_mmio", 1, 5, 3),
    Op("ins_mmio", 2, 6, 3),
    Op("rdmsr", at=1),
    Op("wrmsr", at=2),
    Op("kvm", at=7),
    Op("xen", at=8),
    Op("papr", at=9),
    Op("osi", at=10),
    Op("epr"),
    Op("unknown"),
    Op("notice"),
    Op("wait", count=2),
)
"""One of each kind and shape."""


@st.composite
def accesses(draw: st.DrawFn) -> Op:
    """A load or store of any size, anywhere, in the fragments in which it leaves the guest."""
    kind = draw(st.sampled_from(["load", "store"]))
    size = draw(st.sampled_from([1, 2, 4, 8, 16]))
    at = draw(st.sampled_from([0x10, 0x21, CROSSING - size, CROSSING]) | st.integers(0xFF0, 0xFFF))
    before = min(size, max(0, CROSSING - at)) if at < CROSSING else size
    parts: list[int] = []
    for half in (before, size - before):
        while half > 0:
            parts.append(min(half, 8))
            half -= parts[-1]  # noqa: PLW2901
    return Op(kind, size, at, parts=tuple(parts))


@st.composite
def strings(draw: st.DrawFn) -> Op:
    kind = draw(st.sampled_from(["ins", "outs", "ins_mmio", "outs_mmio"]))
    size = draw(st.sampled_from([1, 2, 4]))
    return Op(kind, size, draw(st.integers(0, 32)), draw(st.integers(0, 9)))


@st.composite
def simple(draw: st.DrawFn) -> Op:
    kinds = ["in", "out", "rmw", "rdmsr", "wrmsr"]
    kinds += ["kvm", "xen", "papr", "osi", "epr", "unknown", "notice"]
    size = draw(st.sampled_from([1, 2, 4]))
    return Op(draw(st.sampled_from(kinds)), size, draw(st.integers(0, 12)))


def computing() -> st.SearchStrategy[Op]:
    return st.builds(
        Op, st.sampled_from(["compute", "wait"]), count=st.integers(1, 3), size=st.just(1)
    )


def programs(longest: int = 8) -> st.SearchStrategy[tuple[Op, ...]]:
    """Programs of one vCPU, at least one instruction long."""
    op = st.one_of(simple(), accesses(), strings(), computing(), st.sampled_from(SHAPES))
    return st.lists(op, min_size=1, max_size=longest).map(tuple)


def hosts(retries: bool = False) -> st.SearchStrategy[Host]:
    """Hosts of every flavour; `retries`: also those that answer -EAGAIN with work pending."""
    return st.builds(
        Host,
        out_past=st.booleans(),
        store_past=st.booleans(),
        flags=st.sampled_from(["none", "honest", "sparing", "deaf", "always", "stale"]),
        sample_early=st.booleans(),
        batch=st.sampled_from([1, 3, 4, 1024]),
        outs_batch=st.sampled_from([1, 2]),
        by_reason=st.booleans(),
        retries=st.sampled_from([0, 1, 3]) if retries else st.just(0),
    )
