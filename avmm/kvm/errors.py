"""What KVM refuses, as exceptions that say what to do about it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from avmm.errors import AvmmError


class KvmError(AvmmError, OSError):
    """An ioctl failed. `ioctl` is its name, `errno` the number, `hint` what to do about it."""

    def __init__(self, ioctl: str, number: int, hint: str = "") -> None:
        super().__init__(number, os.strerror(number))
        self.ioctl = ioctl
        self.hint = hint or _HINTS.get((ioctl, number), _GENERAL.get(number, ""))

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno or 0, str(self.errno))
        text = f"{self.ioctl} failed: {self.strerror} ({name})"
        return f"{text}; {self.hint}" if self.hint else text


class KvmUnavailable(KvmError):
    """/dev/kvm is missing, closed to this user, or too old for avmm."""


_GENERAL = {
    errno.ENOTTY: "this kernel's KVM does not know this request: a newer kernel is needed",
    errno.ENOMEM: "the host has no memory left for it",
    errno.EMFILE: "this process has too many open files: raise its limit (ulimit -n)",
    errno.ENFILE: "the system has too many open files",
}

_HINTS = {
    ("KVM_CREATE_VM", errno.EBUSY): "another hypervisor on this host holds the CPU's VM mode",
    ("KVM_CREATE_VM", errno.EINTR): "a signal came in between; try again",
    ("KVM_CREATE_VCPU", errno.EINVAL): "more vCPUs than this host's KVM allows",
    ("KVM_CREATE_VCPU", errno.EEXIST): "a vCPU with this number exists already",
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "the slot overlaps another one",
    ("KVM_RUN", errno.EFAULT): "the guest touched memory that the host could not provide",
    ("KVM_IRQFD", errno.EBUSY): "this eventfd drives another interrupt already",
}


def unavailable(path: str, number: int) -> KvmUnavailable:
    """Why `path` (usually /dev/kvm) could not be opened, and what to do about it."""
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        hint = (
            "this machine offers no KVM: enable virtualization in the firmware (or nested "
            "virtualization in the outer hypervisor) and load the module kvm_intel or kvm_amd"
        )
    elif number in (errno.EACCES, errno.EPERM):
        hint = f"this user may not use it: {_who_may(path)}"
    else:
        hint = _GENERAL.get(number, "")
    return KvmUnavailable(f"open {path}", number, hint)


def too_old(missing: str, since: str) -> KvmUnavailable:
    """This kernel's KVM lacks the capability `missing`, which Linux has had since `since`."""
    hint = f"its KVM lacks {missing}: Linux {since} or newer is needed"
    return KvmUnavailable("KVM_CHECK_EXTENSION", errno.EOPNOTSUPP, hint)


def _who_may(path: str) -> str:
    try:
        group = Path(path).group()
    except (OSError, KeyError):
        return "ask this machine's administrator"
    if group == "root":
        return f"only root may use {path} here; `sudo chgrp kvm {path}` and mode 660 open it"
    return f"join the group '{group}' (`sudo usermod -aG {group} $USER`) and log in again"
