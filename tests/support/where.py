"""Where a process hangs: what its threads and the vCPUs of its machines are at, on stderr.

tell_at(deadline)   # CLOCK_MONOTONIC: then it is told, and the process ends
"""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import avmm
from avmm.kvm.kick import kick

_LOOK_SECONDS = 1.0
_LOOKS = 3


def tell_at(deadline: float) -> None:
    """In a thread of its own; of a process that is forked, each must ask for itself."""
    threading.Thread(target=_wait, args=(deadline,), name="tells where", daemon=True).start()


def _wait(deadline: float) -> None:
    time.sleep(max(0.0, deadline - time.monotonic()))
    faulthandler.dump_traceback()
    for vm in [found for found in gc.get_objects() if isinstance(found, avmm.Machine)]:
        for _ in range(_LOOKS):
            _tell_machine(vm)
            _tell_threads()
    print("TimeoutExpired: it was to be done by now", file=sys.stderr)  # the lab knows the word
    sys.stderr.flush()
    os._exit(1)


def _tell_threads() -> None:
    for task in Path("/proc/self/task").iterdir():
        words = [(task / name).read_text().strip() for name in ("comm", "wchan", "syscall")]
        print(f"thread {task.name}:", *words, file=sys.stderr)


def _tell_machine(vm: Any) -> None:
    inside = getattr(vm, "_inside", None)
    if inside is None:
        print(f"a machine: {vm.state}", file=sys.stderr)
        return
    asked = inside.parts.group._lot.asked
    print(f"a machine: {vm.state}, asked to park: {asked}", file=sys.stderr)
    threads = {thread.name: thread for thread in threading.enumerate()}
    for loop in inside.parts.group.loops:
        page = loop._vcpu.page
        print(
            f"vCPU {loop.index}: {loop.state}, parked {loop.is_parked}, immediate_exit "
            f"{page.immediate_exit}, exit_reason {page.exit_reason}, flags {page.flags:#x}, "
            f"work {loop._work!r}",
            file=sys.stderr,
        )
        # The kernel's lock of the vCPU is held while it runs: with a kick we get our turn.
        teller = threading.Thread(target=_tell_registers, args=(loop._vcpu,), daemon=True)
        teller.start()
        thread = threads.get(f"avmm vCPU {loop.index}")
        if thread is not None and thread.native_id is not None:
            kick(thread.native_id)
        teller.join(_LOOK_SECONDS)
        if teller.is_alive():
            print(f"vCPU {loop.index} does not leave KVM_RUN at a signal", file=sys.stderr)


def _tell_registers(vcpu: Any) -> None:
    regs, sregs = vcpu.regs(), vcpu.sregs()
    print(
        f"vCPU {vcpu.index}: rip {regs.rip:#x} rsp {regs.rsp:#x} rflags {regs.rflags:#x} "
        f"cs {sregs.cs.selector:#x} cr0 {sregs.cr0:#x} mp_state {vcpu.state('mp_state').hex()}",
        file=sys.stderr,
    )
