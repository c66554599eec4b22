"""The kick: a signal that makes `KVM_RUN` return (shim.c)."""

from __future__ import annotations

import errno

from avmm.kvm._kvm import lib
from avmm.kvm.errors import KvmError


def install_kick() -> int:
    """Choose a signal that has no handler and reserve it for kicks, once per process. Returns its
    number."""
    number = lib.avmm_kick_install()
    if number < 0:
        raise KvmError(
            "sigaction",
            errno.EBUSY,
            "SIGSTKFLT, SIGPWR, SIGUSR1 and SIGUSR2 all have handlers already",
        )
    return number


def accept_kicks() -> None:
    """Let kicks through to the calling thread, whatever signal mask it inherited."""
    if (answer := lib.avmm_kick_accept()) < 0:
        raise KvmError("pthread_sigmask", -answer)


def kick(thread_id: int) -> None:
    """Interrupt `KVM_RUN` in the thread (of this process) with that kernel thread id."""
    if (answer := lib.avmm_kick(thread_id)) < 0:
        raise KvmError("tgkill", -answer)
