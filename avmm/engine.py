"""The engines on which guests run, and the choice between them.

An engine is whatever answers KVM's requests (Documentation/virt/kvm/api.rst). There are two:

- **kvm**: Linux's KVM, by /dev/kvm.
- **soft**: the software engine (`avmm.soft`), which emulates the processor. It runs where there is
  no KVM. It is slower, and no security boundary as KVM is.

**The contract.** Nothing above `avmm.kvm` asks which engine it runs on, except what is named here.
Of an engine the rest of avmm needs, with the meaning that KVM's documentation gives it:

- a system, VMs and vCPUs as file descriptors, each closed by `avmm.kvm`;
- memory slots that can be read-only, and whose written pages can be logged (KVM_GET_DIRTY_LOG);
- interrupt chips, lines, message-signalled interrupts and irqfds, also with a resample event;
- doorbells (ioeventfds) and coalesced writes;
- KVM_RUN, which leaves the guest with an exit in `struct kvm_run`. It returns -EINTR if
  `immediate_exit` is set when it is entered, or if the kick's signal comes while it runs. So no
  kick is lost, because whoever kicks sets `immediate_exit` first;
- **completion**: KVM_RUN after an exit finishes the instruction first. With `immediate_exit` it
  does so and returns -EINTR, or returns the instruction's next exit. The drain of
  `avmm.vcpu.completion` therefore runs unchanged;
- all state of a vCPU and a VM, out and in, by the requests that `avmm.arch` makes.

**What differs.** A state belongs to the engine on which it was saved, because the engines show
guests different processors: `Machine`, snapshots and migrations refuse it on the other one by
name. The software engine must be told when the host writes to memory in which the guest has run
code (`avmm.memory.ram.GuestMemory.watch`). docs/engines.md lists what guests notice.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from avmm.errors import ConfigError, EngineUnavailable
from avmm.kvm import KvmUnavailable
from avmm.lockstep import GuestTime, Lockstep

if TYPE_CHECKING:
    from avmm.arch.contract import AnyArchitecture
    from avmm.kvm import System, Vm

AUTO: Final = "auto"
KVM: Final = "kvm"
SOFT: Final = "soft"
NAMES: Final = (KVM, SOFT)
"""The engines. A setting may also be `AUTO`."""
VARIABLE: Final = "AVMM_ENGINE"
"""The environment variable that says what `AUTO` means in a process."""

_NO_BOUNDARY: Final = "It is slower than KVM, and no security boundary as KVM is"
_REFUSES: Final = (
    "this host's KVM interprets ring 0 and refuses instructions that Linux kernels use"
)

logger = logging.getLogger(__name__)
_said: Final[set[str]] = set()


def opened(
    kind: AnyArchitecture, choice: str, *, is_kernel: bool = False, seed: int | None = None
) -> System:
    """Open the engine `choice`. Blocks: the software engine is loaded when it is first opened.

    `AUTO` takes what `automatic` does, and logs that once in a process, with the reason: a warning
    if it is the software engine.

    With a `seed` it takes the software engine, whatever the variable says, and VMs of this system
    run deterministically.

    Raises `KvmUnavailable` or `EngineUnavailable`, which say why and what would help, and
    `ConfigError` if the environment variable `AVMM_ENGINE` has an unknown value.
    """
    automatically = by_environment()
    if seed is not None:
        return software(kind, seed)
    if choice == AUTO:
        choice = automatically
    if choice == SOFT:
        return software(kind)
    if choice == KVM:
        system: System = kind.open_system()
        return system
    taken = automatic(kind, is_kernel=is_kernel)
    if taken.why not in _said:
        _said.add(taken.why)
        logger.log(taken.level, "%s", taken.why)
    return taken.system


class Taken(NamedTuple):
    """An engine that was taken by itself, and why."""

    system: System
    why: str
    level: int = logging.WARNING
    """How loud the user is to hear of it (`logging`)."""


def automatic(kind: AnyArchitecture, *, is_kernel: bool) -> Taken:
    """Open KVM where it works. Open the software engine where there is no KVM, and for a Linux
    kernel (`is_kernel`) on a KVM that cannot run such kernels. Blocks, and raises, as `opened`."""
    system: System
    try:
        system = kind.open_system()
    except KvmUnavailable as error:
        return _instead_of(kind, error)
    if not is_kernel or not (why := _why_not(kind, system)):
        return Taken(system, "KVM runs this guest: /dev/kvm works", logging.INFO)
    try:
        other = software(kind)
    except EngineUnavailable as error:
        return Taken(system, f"{why}; the software engine could, but: {error}")
    system.close()
    return Taken(other, f"the software engine runs this guest, because {why}. {_NO_BOUNDARY}")


def software(kind: AnyArchitecture, seed: int | None = None) -> System:
    """Open the software engine. Raises `EngineUnavailable`."""
    from avmm import soft  # noqa: PLC0415 - only where it is used

    if kind.name not in soft.ARCHITECTURES:
        raise EngineUnavailable(f"the software engine runs no {kind.name} guests")
    system: System = kind.open_system(soft.opened)
    system.engine, system.watcher = SOFT, soft.watcher()
    if seed is not None:
        from avmm.soft import order  # noqa: PLC0415 - only where it is used

        order.seed(system.fd, seed)
    return system


def lockstep(vm: Vm) -> Lockstep:
    """How the guest of `vm` and the program take turns. Its system was opened with a seed."""
    from avmm.soft.order import NEVER, Order  # noqa: PLC0415 - only where it is used

    return Lockstep(Order(vm.fd), NEVER)


def guest_time() -> GuestTime:
    """A clock for the devices of a deterministic run, until there is a VM."""
    from avmm.soft.order import epoch  # noqa: PLC0415 - only where it is used

    return GuestTime(epoch())


def by_environment() -> str:
    """What `AUTO` means in this process. Raises `ConfigError`."""
    choice = os.environ.get(VARIABLE) or AUTO
    if choice not in (AUTO, *NAMES):
        raise ConfigError(f"{VARIABLE}={choice!r}: expected auto, {' or '.join(NAMES)}")
    return choice


def _instead_of(kind: AnyArchitecture, missing: KvmUnavailable) -> Taken:
    try:
        system = software(kind)
    except EngineUnavailable as error:
        missing.add_note(f"The software engine needs no KVM, but: {error}")
        raise missing from None
    why = f"the software engine runs this guest, because KVM cannot: {missing}. {_NO_BOUNDARY}"
    return Taken(system, why)


_judged: Final[list[str]] = []


def _why_not(kind: AnyArchitecture, system: System) -> str:
    """Why this KVM cannot run kernels; empty if it can. It is tried once in a process."""
    if not _judged:
        _judged.append("" if kind.runs_kernels(system) else _REFUSES)
    return _judged[0]
