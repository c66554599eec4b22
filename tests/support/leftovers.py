"""What a process holds of guests: the proof that nothing outlives a machine."""

from __future__ import annotations

import gc
from pathlib import Path

from support.threads import ours


def resources() -> tuple[set[str], set[str], set[str]]:
    """This process's descriptors, threads, and mappings that belong to guests."""
    gc.collect()
    fds = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            fds.add(f"{entry.name} -> {entry.readlink()}")
        except FileNotFoundError:
            continue
    threads = {f"{thread.name} {thread.ident}" for thread in ours()}
    maps = {
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "avmm-ram" in line or "kvm-vcpu" in line
    }
    return fds, threads, maps
