"""The border to the kernel. No code above this package sees an ioctl, one of KVM's numbers or a
struct.

`System`, `Vm` and `Vcpu` are the classes for this host's architecture. They extend those in
`avmm.kvm.system`, `vm` and `vcpu`.
"""

from avmm.kvm._kvm import lib as constants
from avmm.kvm.bridge import eventfd
from avmm.kvm.errors import KvmError, KvmUnavailable
from avmm.kvm.exits import exit_name
from avmm.kvm.handle import Capability, capabilities
from avmm.kvm.run import RunPage
from avmm.kvm.x86 import X86System as System
from avmm.kvm.x86 import X86Vcpu as Vcpu
from avmm.kvm.x86 import X86Vm as Vm
from avmm.kvm.x86 import copy_cpuid

__all__ = [
    "Capability",
    "KvmError",
    "KvmUnavailable",
    "RunPage",
    "System",
    "Vcpu",
    "Vm",
    "capabilities",
    "constants",
    "copy_cpuid",
    "eventfd",
    "exit_name",
]
