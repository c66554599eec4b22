"""The common base of the handles for the system, a VM and a vCPU.

Each owns a file descriptor, must be closed explicitly, and raises a `KvmError` for every ioctl
that fails. Structures are cffi's own objects with the fields of <linux/kvm.h>, typed by
`_kvm.pyi`. Source throughout: Documentation/virt/kvm/api.rst.

system.py, vm.py and vcpu.py hold what KVM has on every architecture. What it has on only one is in
a module of that architecture (`avmm.arch.x86_64.kvm`), in subclasses of those classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias, TypeVar, cast

from avmm.forks import closed_in_child
from avmm.kvm._kvm import ffi, lib
from avmm.kvm.errors import KvmError

if TYPE_CHECKING:
    from avmm.kvm import _kvm

Capability: TypeAlias = "_kvm.Capability"
"""The name of a capability that avmm knows: "KVM_CAP_IRQFD"."""
_Struct = TypeVar("_Struct", bound="_kvm.Address")


def capabilities() -> tuple[Capability, ...]:
    """The names of all capabilities that avmm knows."""
    names = tuple(name for name in dir(lib) if name.startswith("KVM_CAP_"))
    return cast("tuple[Capability, ...]", names)


class Part(NamedTuple):
    """A part of the state that is one structure: its two ioctls, and a function that makes an
    empty structure."""

    get: _kvm.Constant
    set: _kvm.Constant
    make: Callable[[], _kvm.Address]


class Handle:
    """A file descriptor of KVM."""

    PARTS: ClassVar[Mapping[str, Part]] = {}
    """The parts that `state` and `set_state` know, by name."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        closed_in_child(self, type(self).close)

    def _ioctl(self, name: _kvm.Constant, argument: _kvm.Address = ffi.NULL) -> int:
        answer = lib.avmm_ioctl(self.fd, getattr(lib, name), argument)
        if answer < 0:
            raise KvmError(name, -answer)
        return answer

    def _ioctl_value(self, name: _kvm.Constant, argument: int = 0) -> int:
        answer = lib.avmm_ioctl_value(self.fd, getattr(lib, name), argument)
        if answer < 0:
            raise KvmError(name, -answer)
        return answer

    def _get(self, name: _kvm.Constant, struct: _Struct) -> _Struct:
        """The structure, filled in by KVM."""
        self._ioctl(name, struct)
        return struct

    def state(self, part: str) -> bytes:
        """A part of the state (one of `PARTS`), as the bytes of the kernel's structure."""
        get, _, make = self.PARTS[part]
        return bytes(ffi.buffer(self._get(get, make())))

    def set_state(self, part: str, data: bytes) -> None:
        """Set a part of the state, as `state` returned it. Raises `ValueError` if the structure
        has another size."""
        _, set_, make = self.PARTS[part]
        struct = make()
        fill(struct, part, data)
        self._ioctl(set_, struct)

    def check(self, capability: Capability) -> int:
        """KVM_CHECK_EXTENSION: 0 if the capability is missing, else 1 or its value."""
        return self._ioctl_value("KVM_CHECK_EXTENSION", getattr(lib, capability))

    def announces(self, number: int) -> bool:
        """Does KVM announce the capability with this number, even if avmm does not know it?"""
        return lib.avmm_ioctl_value(self.fd, lib.KVM_CHECK_EXTENSION, number) > 0

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            lib.avmm_close(fd)


def fill(struct: _kvm.Address, what: str, data: bytes) -> None:
    """Copy `data` over all of the structure. Raises `ValueError`, which names `what`, if the sizes
    differ."""
    buffer = ffi.buffer(struct)
    if len(data) != len(buffer):
        raise ValueError(f"{what}: {len(data)} bytes, expected {len(buffer)}")
    buffer[:] = data
