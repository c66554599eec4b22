"""What the handles of the system, of a VM and of a vCPU have in common.

Each owns a file descriptor, is closed explicitly and only once, and turns every failed ioctl
into a `KvmError`. Structures are cffi's own objects with the fields of <linux/kvm.h>, typed by
`_kvm.pyi`. Source throughout: Documentation/virt/kvm/api.rst.

What every architecture's KVM has is in system.py, vm.py and vcpu.py; what one architecture's KVM
has besides is in a module of its own (x86.py), in subclasses of those.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias, TypeVar, cast

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
    """A part of the state that is one structure: its ioctls, and a new one of these structures."""

    get: _kvm.Constant
    set: _kvm.Constant
    make: Callable[[], _kvm.Address]


class Handle:
    """A descriptor of KVM's."""

    PARTS: ClassVar[Mapping[str, Part]] = {}
    """What `state` and `set_state` know, by name."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

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
        """The structure, which KVM has filled."""
        self._ioctl(name, struct)
        return struct

    def state(self, part: str) -> bytes:
        """A part of the state (one of `PARTS`), as the kernel's structure has it."""
        get, _, make = self.PARTS[part]
        return bytes(ffi.buffer(self._get(get, make())))

    def set_state(self, part: str, data: bytes) -> None:
        """Set what `state` gave. Raises `ValueError` where the structure has another size."""
        _, set_, make = self.PARTS[part]
        struct = make()
        fill(struct, part, data)
        self._ioctl(set_, struct)

    def check(self, capability: Capability) -> int:
        """KVM_CHECK_EXTENSION: 0 where the capability is missing, else 1 or its value."""
        return self._ioctl_value("KVM_CHECK_EXTENSION", getattr(lib, capability))

    def announces(self, number: int) -> bool:
        """Does KVM_CHECK_EXTENSION answer for the capability with this number, known or not?"""
        return lib.avmm_ioctl_value(self.fd, lib.KVM_CHECK_EXTENSION, number) > 0

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def fill(struct: _kvm.Address, what: str, data: bytes) -> None:
    """Copy `data` over all of the structure. Raises `ValueError` for another size, naming what."""
    buffer = ffi.buffer(struct)
    if len(data) != len(buffer):
        raise ValueError(f"{what}: {len(data)} bytes, expected {len(buffer)}")
    buffer[:] = data
