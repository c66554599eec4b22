"""/dev/kvm: what this host's KVM is, and where VMs come from."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from avmm.kvm._kvm import lib
from avmm.kvm.errors import KvmError, too_old, unavailable
from avmm.kvm.handle import Capability, Handle
from avmm.kvm.vm import Vm


class System(Handle, ABC):
    """/dev/kvm. Raises `KvmUnavailable`, which says why, if it cannot be used."""

    REQUIRED: ClassVar[Mapping[Capability, str]] = {
        "KVM_CAP_USER_MEMORY": "2.6.25",
        "KVM_CAP_IRQCHIP": "2.6.25",
        "KVM_CAP_IRQFD": "2.6.32",
        "KVM_CAP_IRQ_ROUTING": "2.6.30",
        "KVM_CAP_SIGNAL_MSI": "3.5",
        "KVM_CAP_MP_STATE": "2.6.26",
        "KVM_CAP_IMMEDIATE_EXIT": "4.13",
    }
    """The capabilities that avmm needs, each with the version of Linux that introduced it."""

    engine = "kvm"
    """The engine that answers: see `avmm.engine`."""
    watcher = 0
    """The address of the C function, if the engine has one, that wants to know what the host
    writes to a VM's memory (`RamTable.watch`, with the VM's descriptor)."""

    def __init__(self, path: str = "/dev/kvm", engine: Callable[[], int] | None = None) -> None:
        """`engine` opens another engine's descriptor instead of /dev/kvm."""
        try:
            fd = engine() if engine else os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise unavailable(path, error.errno or errno.EIO) from None
        super().__init__(fd)
        try:
            if (version := self._ioctl_value("KVM_GET_API_VERSION")) != lib.KVM_API_VERSION:
                raise too_old(f"API version 12 (it has {version})", "2.6.22")
            for name, since in self.REQUIRED.items():
                if not self.check(name):
                    raise too_old(name, since)
        except KvmError as error:
            self.close()
            if error.errno == errno.ENOTTY:
                raise unavailable(path, errno.ENODEV) from None
            raise

    @abstractmethod
    def create_vm(self) -> Vm:
        """A new, empty VM."""

    @property
    def run_size(self) -> int:
        """Bytes of a vCPU's `kvm_run` mapping."""
        return self._ioctl_value("KVM_GET_VCPU_MMAP_SIZE")

    @property
    def max_vcpus(self) -> int:
        """The most vCPUs that one VM may have."""
        return self.check("KVM_CAP_MAX_VCPUS") or self.check("KVM_CAP_NR_VCPUS") or 4


def use_engine(is_its: int, call: int, close: int, kicked: int) -> None:
    """Let another engine answer for its own descriptors. These are the addresses of its C
    functions (avmm/soft/native/soft.h); they stay in use until the process ends."""
    lib.avmm_engine_set(is_its, call, close, kicked)
