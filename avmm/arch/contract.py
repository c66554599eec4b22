"""The contract of an architecture: everything that avmm must know about a kind of processor and
its board.

All code that runs a guest asks an `Architecture` these questions, and names no processor itself:

- **Where things are.** RAM and its holes, the address spaces in which devices can be placed, the
  ranges in which KVM itself answers, the interrupt pins, and the room for virtio devices.
- **What the board has.** The devices that a guest expects to find, each with its place.
- **How a guest starts.** The image goes into memory, together with a description of the devices
  for the guest. The VM gets its interrupt controllers. Each vCPU is set up for the way in which it
  starts.
- **What leaves the guest.** The exit reasons that avmm serves on this architecture, and which of
  them KVM has to be asked for.
- **What is state.** A vCPU and a VM are saved and loaded in a certain order, and the code says
  why. A host can be asked beforehand whether it has what a guest needs.
- **What an error shows.** A vCPU's registers and the instruction at which it stands.

Methods block: most of them make ioctls, and `load_image` reads files. So they are not called in
trio's thread, except `board` and those that say so. They keep nothing between two calls except
facts that are the same for all guests of a host.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar

if TYPE_CHECKING:
    from avmm.boot.entry import Entry, FlatOptions, Protocol
    from avmm.bus.interrupts import Pins
    from avmm.bus.space import Placement
    from avmm.devices.serial import Serial
    from avmm.kvm import Capability, System, Vcpu, Vm
    from avmm.memory.layout import RamLayout
    from avmm.memory.ram import GuestMemory
    from avmm.outcome import Outcome


class Space(NamedTuple):
    """An address space in which devices can be placed. `name` is for messages; it has `limit`
    addresses, each of `unit` bytes."""

    name: str
    limit: int
    unit: int = 1


class KernelRange(NamedTuple):
    """A range from `first` to `last`, both included, in which KVM itself answers. A device there
    would never be called.
    """

    space: str
    first: int
    last: int
    owner: str


class VirtioRoom(NamedTuple):
    """The room for virtio devices without a place of their own. Each gets the next free window,
    which begins at one of `bases`, and the next free one of `interrupts`.
    """

    bases: range
    interrupts: tuple[int, ...]


class BoardOptions(NamedTuple):
    """The user's choices for the board."""

    cpus: int
    acpi: bool
    debug_exit: int | None
    """The port of QEMU's isa-debug-exit; None if there is none."""
    wall: Callable[[], int] = time.time_ns
    """The time in nanoseconds since 1970."""
    stall: float = 1.0
    """How many seconds the guest waits for a reader of its serial port."""


class Board(NamedTuple):
    """The devices that a guest expects to find. Its console is on `serial`."""

    serial: Serial
    places: list[Placement]
    press_power: Callable[[Any], bool]
    """Presses the power button of the VM that it gets. Returns False if the guest does not listen
    to it. Called in trio's thread."""


class GuestImage(NamedTuple):
    """What to load, and how. The settings of the same names explain the fields."""

    kernel: Path
    cmdline: str
    initrd: Path | None
    modules: Sequence[Path]
    cpus: int
    flat: FlatOptions | None
    protocol: Protocol
    acpi: bool
    is_bundled: bool
    """Is it one of avmm's bundled guests? These do not read firmware tables."""


class Probe(NamedTuple):
    """A guest of one instruction, for `avmm doctor --completion`: its machine code, and the values
    of registers with which it starts.
    """

    name: str
    code: bytes
    registers: Mapping[str, int] = MappingProxyType({})
    capability: Capability | None = None
    """The capability that KVM must offer for it."""
    xen: bool = False
    """Are its hypercalls Xen's?"""


SystemT = TypeVar("SystemT", bound="System")
VmT = TypeVar("VmT", bound="Vm")
VcpuT = TypeVar("VcpuT", bound="Vcpu")


class Architecture(ABC, Generic[SystemT, VmT, VcpuT]):
    """One architecture and the board that its guests run on. See the top of this file.

    Its classes for the system, a VM and a vCPU extend those of `avmm.kvm`. All handles that its
    methods get were made by its own `open_system`, directly or not.
    """

    name: str
    """The name that `uname -m` prints."""

    # -- where things are ------------------------------------------------------------------

    ram: RamLayout
    most_cpus: int
    """How many CPUs the board's tables can describe."""
    spaces: Mapping[str, Space]
    """The address spaces, by the names that `Placement.space` uses."""
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
        """Make the board's own devices. Devices through which the guest ends the run call `end`,
        in a vCPU's thread. Does not block. Raises `ConfigError`.
        """

    # -- how a guest starts --------------------------------------------------------------------

    @abstractmethod
    def load_image(
        self, memory: GuestMemory, image: GuestImage, devices: Sequence[Placement]
    ) -> Entry:
        """Load the image into fresh memory, together with a description of all `devices` for the
        guest: the board's first, then the user's. Raises `ImageError` and `ConfigError`; do not
        use the memory any further then.
        """

    @abstractmethod
    def open_system(self, engine: Callable[[], int] | None = None) -> SystemT:
        """Open /dev/kvm, or what `engine` opens instead. Raises `KvmUnavailable`, which says why,
        if it cannot be used."""

    @abstractmethod
    def runs_kernels(self, system: SystemT) -> bool:
        """Can this KVM run an operating system's kernel? It is tried with a small guest. Blocks
        for some milliseconds. Raises `KvmError`."""

    @abstractmethod
    def create_vm(self, system: SystemT) -> VmT:
        """A VM with its interrupt controllers and timers, but without memory. If it raises
        `KvmError`, it leaves nothing open.
        """

    @abstractmethod
    def set_up(self, system: SystemT, vcpus: Sequence[VcpuT], entry: Entry) -> None:
        """Bring fresh vCPUs into the state in which they start: the first enters the image."""

    # -- what leaves the guest ----------------------------------------------------------------

    exit_reasons: frozenset[int]
    """The exits that are served here (`KVM_EXIT_*`). Any other exit is an error of the vCPU."""

    @abstractmethod
    def enable_exits(
        self, vm: VmT, devices: Sequence[Placement], *, xen: bool, has_calls: bool
    ) -> None:
        """Ask KVM for the exits that it only makes on request, if somebody answers them: accesses
        to processor registers that `devices` answer for, and hypercalls (Xen's, with `xen`).

        Raises `ConfigError` if this host's KVM cannot make these exits.
        """

    # -- what is state ---------------------------------------------------------------------------

    @abstractmethod
    def needs(self, system: SystemT, vcpu: VcpuT) -> dict[str, Any]:
        """What a host must have to run this vCPU, as far as it is known before the vCPU's state is
        read.
        """

    @abstractmethod
    def needs_of(self, system: SystemT, vcpu: VcpuT, state: Mapping[str, Any]) -> dict[str, Any]:
        """The `needs` of a vCPU that has just been loaded with `state`. This is cheaper than
        asking KVM again.
        """

    @abstractmethod
    def demand(self, system: SystemT, vcpu: VcpuT, needs: Mapping[str, Any]) -> None:
        """Raise `StateError` if this host lacks something in `needs`, which is hostile input.
        `vcpu` must be fresh.
        """

    @abstractmethod
    def clock_khz(self, needs: Mapping[str, Any]) -> int:
        """The frequency of the guest's own counter in kHz, taken from its `needs`."""

    @abstractmethod
    def save_vcpu(self, system: SystemT, vcpu: VcpuT) -> dict[str, Any]:
        """The state of a drained vCPU, as plain data. Raises `KvmError`."""

    @abstractmethod
    def save_vm(self, vm: VmT) -> dict[str, Any]:
        """The state of the VM that belongs to no vCPU. Call it while all vCPUs are parked and all
        devices are quiesced.
        """

    @abstractmethod
    def stood_still(self, state: object) -> int:
        """For how long a VM has stood still since `save_vm` returned this state, in nanoseconds by
        the hosts' wall clocks. At least 0. The state is hostile input: raises `StateError`, also
        if it does not tell when it was saved.
        """

    @abstractmethod
    def load_vm(self, vm: VmT, state: object, ahead: int) -> None:
        """Give a fresh VM what `save_vm` returned, with its clocks `ahead` nanoseconds later. Call
        it before the vCPUs get their states. The state is hostile input: raises `StateError`.
        """

    @abstractmethod
    def load_vcpus(
        self, system: SystemT, vcpus: Sequence[VcpuT], states: Sequence[Any], ahead: int
    ) -> None:
        """Give fresh vCPUs what `save_vcpu` returned, and start their clocks together, `ahead`
        nanoseconds later. The states are hostile input: raises `StateError`, also if this host
        lacks something that they need.
        """

    @abstractmethod
    def renew_generation(self, memory: GuestMemory, vm: VmT) -> None:
        """Tell a guest that it is a copy: it continues from a state that may have been loaded
        before, or whose guest runs on elsewhere. Call it after the state is loaded, before the
        vCPUs run. Blocks for a moment.
        """

    @abstractmethod
    def are_halted(self, vm: VmT, vcpus: Sequence[VcpuT]) -> bool:
        """Can none of the vCPUs ever run again, because they wait for interrupts that they do not
        take? Call it only while they are parked.
        """

    # -- what an error shows ------------------------------------------------------------------

    @abstractmethod
    def registers(self, vcpu: VcpuT, memory: GuestMemory) -> str:
        """The registers and the instruction, as lines of text for people. Call it only while the
        vCPU is not inside `KVM_RUN`. May be called in any thread.
        """

    def count_msrs(self, system: SystemT) -> int:
        """How many MSRs a vCPU's state has on this host. 0 if its processors have none."""
        return 0

    # -- for experiments -----------------------------------------------------------------------

    @abstractmethod
    def probes(
        self, system: SystemT, origin: int, port: int, window: int, register: int
    ) -> list[Probe]:
        """Guests of one instruction, loaded at `origin`. There is one for each kind of access that
        leaves the guest: to the I/O port `port`, to the two pages of MMIO at `window`, to the
        processor's register `register`, and by hypercalls.
        """

    @abstractmethod
    def set_registers(self, vcpu: VcpuT, values: Mapping[str, int]) -> None:
        """Set the general registers with these names. The others stay as they are."""

    @abstractmethod
    def unpacked_kernel(self, kernel: Path) -> bytes:
        """The ELF file inside a compressed kernel, for VMMs that take no other, or the file itself
        if it is not compressed. Raises `ImageError`."""

    probe_names: Sequence[str]
    """The names of all probes. They are known even if there is no KVM."""
    probe_end: bytes
    """The machine code with which such a guest reports the value that it got, and ends the run."""


AnyArchitecture: TypeAlias = Architecture[Any, Any, Any]
"""An architecture whose own classes the code at hand does not know."""
