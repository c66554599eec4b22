"""The border to the kernel: nothing above this package sees an ioctl, a number or a struct."""

from avmm.kvm._kvm import lib as constants
from avmm.kvm.bridge import eventfd
from avmm.kvm.errors import KvmError, KvmUnavailable
from avmm.kvm.handles import Struct, System, Vcpu, Vm, capabilities, copy_cpuid, exit_name

__all__ = [
    "KvmError",
    "KvmUnavailable",
    "Struct",
    "System",
    "Vcpu",
    "Vm",
    "capabilities",
    "constants",
    "copy_cpuid",
    "eventfd",
    "exit_name",
]
