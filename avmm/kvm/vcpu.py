"""A vCPU: its thread's `KVM_RUN`, and the page that it shares with the kernel."""

from __future__ import annotations

import errno
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Final

from avmm.kvm._kvm import ffi, lib
from avmm.kvm.errors import KvmError
from avmm.kvm.exits import exit_name
from avmm.kvm.handle import Handle
from avmm.kvm.run import RunPage

_MOST_OUTPUT: Final = 4096
"""Bytes that a guest of `run_raw` may say."""


class Vcpu(Handle, ABC):
    """One vCPU. All of it belongs to the thread that runs it, except `page.immediate_exit`."""

    def __init__(self, fd: int, index: int, run_size: int) -> None:
        super().__init__(fd)
        self.index = index
        try:
            self.page = RunPage(mmap.mmap(fd, run_size))
            """The `struct kvm_run` shared with the kernel."""
        except OSError as error:
            self.close()
            raise KvmError("mmap of kvm_run", error.errno or errno.ENOMEM) from None
        self.run: Callable[[], int] = partial(lib.avmm_run, fd, self.page.struct)
        """KVM_RUN without the GIL: the exit reason, else -errno; -EINTR after a kick, or where it
        was entered with `immediate_exit`."""

    @abstractmethod
    def pc(self) -> int:
        """Where the guest's next instruction is."""

    def run_raw(self) -> bytes:
        """KVM_RUN in a C loop until the guest writes to its exit-status port (shim.c): the
        baseline that avmm measures itself against. Gives the guest's serial output."""
        output = ffi.new("char[]", _MOST_OUTPUT)
        length = lib.avmm_run_raw(self.fd, self.page.struct, output, len(output))
        if length < 0:
            raise KvmError("KVM_RUN", errno.EIO, f"unexpected {exit_name(self.page.exit_reason)}")
        return bytes(ffi.buffer(output, length))

    def kick_raw(self, rounds: int) -> list[int]:
        """Nanoseconds from a kick to `KVM_RUN`'s return, in C alone (shim.c): the baseline that
        pauses are measured against. The guest must be one that never exits by itself."""
        times = ffi.new("int64_t[]", rounds)
        if (answer := lib.avmm_kick_raw(self.fd, self.page.struct, rounds, times)) < 0:
            raise KvmError("KVM_RUN", -answer)
        return list(times)

    def close(self) -> None:
        """Unmap `kvm_run` and close; idempotent."""
        if self.fd >= 0 and hasattr(self, "page"):
            self.run = lambda: -errno.EBADF
            self.page.close()
        super().close()
