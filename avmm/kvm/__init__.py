"""The border to the kernel: nothing above this package sees an ioctl, a number or a struct.

`System`, `Vm` and `Vcpu` are those of this host's architecture, whose KVM knows more than what
`avmm.kvm.system`, `vm` and `vcpu` have.
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
