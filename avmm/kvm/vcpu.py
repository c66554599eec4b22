"""A vCPU: its thread's `KVM_RUN`, and the page that it shares with the kernel."""

from __future__ import annotations

import errno
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
"""The most bytes that a guest of `run_raw` may print."""


class Vcpu(Handle, ABC):
    """One vCPU. All of it belongs to the thread that runs it, except `page.immediate_exit`."""

    def __init__(self, fd: int, index: int, run_size: int) -> None:
        super().__init__(fd)
        self.index = index
        try:
            self.page = RunPage(fd, run_size)
            """The `struct kvm_run` shared with the kernel."""
        except KvmError:
            self.close()
            raise
        self.run: Callable[[], int] = partial(lib.avmm_run, fd, self.page.struct)
        """KVM_RUN without the GIL. Returns the exit reason, or -errno: -EINTR after a kick, or if
        it was entered with `immediate_exit`."""

    @abstractmethod
    def pc(self) -> int:
        """Where the guest's next instruction is."""

    def run_raw(self) -> bytes:
        """Call KVM_RUN in a C loop until the guest writes to its exit-status port (shim.c): the
        baseline that avmm measures itself against. Returns the guest's serial output."""
        output = ffi.new("char[]", _MOST_OUTPUT)
        length = lib.avmm_run_raw(self.fd, self.page.struct, output, len(output))
        if length < 0:
            raise KvmError("KVM_RUN", errno.EIO, f"unexpected {exit_name(self.page.exit_reason)}")
        return bytes(ffi.buffer(output, length))

    def kick_raw(self, rounds: int) -> list[int]:
        """The nanoseconds from a kick to the return of `KVM_RUN`, measured in C (shim.c). Pauses
        are compared with this. The guest must never exit by itself."""
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
