"""The border to the kernel. No code above this package sees an ioctl, one of KVM's numbers or a
struct.

`System`, `Vm` and `Vcpu` are what KVM has on every architecture. What it has on only one is with
that architecture (`avmm.arch`), in subclasses of them.
"""

from avmm.kvm._kvm import lib as constants
from avmm.kvm.bridge import eventfd
from avmm.kvm.errors import KvmError, KvmUnavailable
from avmm.kvm.exits import exit_name
from avmm.kvm.handle import Capability, capabilities
from avmm.kvm.run import RunPage
from avmm.kvm.system import System, use_engine
from avmm.kvm.vcpu import Vcpu
from avmm.kvm.vm import Vm

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
    "eventfd",
    "exit_name",
    "use_engine",
]
