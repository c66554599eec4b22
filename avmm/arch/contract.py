"""The contract of an architecture: all that avmm must know of a kind of processor and its board.

Whatever runs a guest goes through an `Architecture` for these questions, and names no processor:

- **Where things are.** RAM and its holes, the address spaces in which devices can be placed, the
  ranges where KVM answers by itself, the interrupt pins, and the room for virtio devices.
- **What the board has.** The devices that a guest expects to find, each with its place.
- **How a guest starts.** The image goes into memory, with what tells the guest of its devices; the
  VM gets its interrupt controllers; each vCPU is set up for the way in which it is entered.
- **What leaves the guest.** The exit reasons that KVM can give on this architecture, and which of
  them have to be asked for.
- **What is state.** A vCPU and a VM are saved and loaded in an order whose reasons stand above the
  code that obeys them, and a host can be asked beforehand whether it has what a guest needs.
- **What an error shows.** A vCPU's registers and the instruction at which it stands.

Methods block: most of them make ioctls, `load_image` reads files. None of them is called in trio's
thread, except `board` and those that say so. None keeps anything between two calls but what is
the same for every guest of a host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avmm.boot.entry import Entry, FlatOptions, Protocol
    from avmm.bus.interrupts import Pins
    from avmm.bus.space import Placement
    from avmm.devices.serial import Serial
    from avmm.kvm import Capability, System, Vcpu, Vm
    from avmm.memory.layout import RamLayout
    from avmm.memory.ram import GuestMemory
    from avmm.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Space:
    """An address space in which devices can be placed. `name` is for messages; it has `limit`
    addresses, each of `unit` bytes."""

    name: str
    limit: int
    unit: int = 1


@dataclass(frozen=True, slots=True)
class KernelRange:
    """A range in which KVM answers by itself, so that a device there would never be called: from
    `first` to `last`, which belongs to it."""

    space: str
    first: int
    last: int
    owner: str


@dataclass(frozen=True, slots=True)
class VirtioRoom:
    """Where virtio devices go that have no place of their own: the next free window, which begins
    at one of `bases`, and the next free interrupt of `interrupts`."""

    bases: range
    interrupts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BoardOptions:
    """What a user can say about the board."""

    cpus: int
    acpi: bool
    debug_exit: int | None
    """The port of QEMU's isa-debug-exit; None: there is none."""


@dataclass(frozen=True, slots=True)
class Board:
    """The devices that a guest expects to find: `serial` is the one that its console is on."""

    serial: Serial
    places: list[Placement]


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What is to be loaded, and how: see the settings of these names."""

    kernel: Path
    cmdline: str
    initrd: Path | None
    modules: Sequence[Path]
    cpus: int
    flat: FlatOptions | None
    protocol: Protocol
    acpi: bool
    is_bundled: bool
    """Is it a guest of avmm's own? These read no tables of firmware."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A guest of one instruction, for `avmm doctor --completion`: its machine code, and the
    registers that it starts with."""

    name: str
    code: bytes
    registers: Mapping[str, int] = field(default_factory=dict)
    capability: Capability | None = None
    """What KVM must offer for it."""
    xen: bool = False
    """Are hypercalls Xen's?"""


class Architecture(ABC):
    """One architecture and the board that its guests run on. See the top of this file."""

    name: str
    """As `uname -m` has it."""

    # -- where things are ------------------------------------------------------------------

    ram: RamLayout
    spaces: Mapping[str, Space]
    """The address spaces by the names that `Placement.space` has."""
    in_kernel: Sequence[KernelRange]
    pins: Pins
    virtio: VirtioRoom
    own_window: range
    """Guest-physical addresses that avmm keeps free for devices which users place by hand."""

    # -- what the board has ------------------------------------------------------------------

    @abstractmethod
    def board(
        self, options: BoardOptions, memory_size: int, end: Callable[[Outcome], None]
    ) -> Board:
        """Make the board's own devices; `end` is what a device calls, in a vCPU's thread, by which
        the guest ends the run. Does not block. Raises `ConfigError`."""

    # -- how a guest starts --------------------------------------------------------------------

    @abstractmethod
    def load_image(
        self, memory: GuestMemory, image: GuestImage, devices: Sequence[Placement]
    ) -> Entry:
        """Load the image into fresh memory, with what tells the guest of all `devices`: the
        board's, then the user's. Raises `ImageError` and `ConfigError`; memory is of no use
        then."""

    @abstractmethod
    def create_vm(self, system: System) -> Vm:
        """A VM with its interrupt controllers and timers, without memory. Raises `KvmError`, and
        leaves nothing open then."""

    @abstractmethod
    def set_up(self, system: System, vcpus: Sequence[Vcpu], entry: Entry) -> None:
        """Bring fresh vCPUs into the state in which they start: the first enters the image."""

    # -- what leaves the guest ----------------------------------------------------------------

    exit_reasons: frozenset[int]
    """The exits that are served here (`KVM_EXIT_*`); any other one is an error of the vCPU's."""

    @abstractmethod
    def enable_exits(
        self, vm: Vm, devices: Sequence[Placement], *, xen: bool, has_calls: bool
    ) -> None:
        """Ask KVM for the exits that do not come by themselves, only where somebody answers them:
        registers of the processor that `devices` stand for, and hypercalls (Xen's, with `xen`).

        Raises `ConfigError` where this host's KVM cannot hand them over.
        """

    # -- what is state ---------------------------------------------------------------------------

    @abstractmethod
    def needs(self, system: System, vcpu: Vcpu) -> dict[str, Any]:
        """What a host must have for this vCPU, as far as that is known before there is a state."""

    @abstractmethod
    def needs_of(self, system: System, vcpu: Vcpu, state: Mapping[str, Any]) -> dict[str, Any]:
        """The `needs` of a vCPU that has just been loaded with `state`, which costs less than to
        ask KVM again."""

    @abstractmethod
    def demand(self, system: System, vcpu: Vcpu, needs: Mapping[str, Any]) -> None:
        """Raise `StateError` where this host lacks something of `needs`, which are hostile; `vcpu`
        is a fresh one."""

    @abstractmethod
    def clock_khz(self, needs: Mapping[str, Any]) -> int:
        """The frequency of the guest's own counter, in kHz, out of its `needs`."""

    @abstractmethod
    def save_vcpu(self, system: System, vcpu: Vcpu) -> dict[str, Any]:
        """The state of a drained vCPU, as plain data. Raises `KvmError`."""

    @abstractmethod
    def save_vm(self, vm: Vm) -> dict[str, Any]:
        """The state that belongs to no vCPU, with all vCPUs parked and all devices quiesced."""

    @abstractmethod
    def load_vm(self, vm: Vm, state: object) -> None:
        """Give a fresh VM what `save_vm` gave, before its vCPUs get theirs. Hostile input: raises
        `StateError`."""

    @abstractmethod
    def load_vcpus(self, system: System, vcpus: Sequence[Vcpu], states: Sequence[Any]) -> None:
        """Give fresh vCPUs what `save_vcpu` gave, and set their clocks going together. Hostile
        input: raises `StateError`, also where this host lacks what a state needs."""

    # -- what an error shows ------------------------------------------------------------------

    @abstractmethod
    def registers(self, vcpu: Vcpu, memory: GuestMemory) -> str:
        """Registers and the instruction, as lines of text for a person; only while the vCPU is not
        inside `KVM_RUN`. Any thread."""

    # -- for experiments -----------------------------------------------------------------------

    @abstractmethod
    def probes(self, origin: int, port: int, window: int, register: int) -> list[Probe]:
        """Guests of one instruction, loaded at `origin`, for each way in which an access leaves
        the guest: at an I/O port, in a window of MMIO of two pages, at a register of the
        processor, and by hypercalls. Raises `KvmUnavailable`."""

    probe_names: Sequence[str]
    """The names of all probes, also where there is no KVM."""
    probe_end: bytes
    """The machine code by which such a guest says what it got, and ends."""
