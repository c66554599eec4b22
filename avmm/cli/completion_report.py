"""`avmm doctor --completion`: what an uncompleted exit costs on this host, by experiment.

For each shape of access, a guest of one instruction runs three times on this host's KVM:
through to its end; saved at the exit, uncompleted, and run on in a fresh VM; saved after a drain,
and run on in a fresh VM. What its device saw and what the guest got tell what was lost and what
was repeated.

Not every KVM can do all of it: on a page-table KVM a hypercall from ring 0 never leaves
`KVM_RUN`. So each `KVM_RUN` is kicked after a while, and the shape said to be impossible here.
"""

from __future__ import annotations

import errno
import itertools
import tempfile
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from avmm.arch.x86_64 import layout
from avmm.bus.space import Placement, mmio, msr, pio
from avmm.config import MachineConfig
from avmm.devices.state import Stateless
from avmm.errors import AvmmError
from avmm.kvm import KvmError, System, Vcpu, constants, exit_name
from avmm.kvm.kick import accept_kicks, install_kick, kick
from avmm.outcome import Outcome
from avmm.parts.machine_parts import Parts
from avmm.vcpu.calls import Call
from avmm.vcpu.completion import NEEDS_COMPLETION, drain

_PORT, _MSR, _WINDOW = 0xE0, 0x4D56_0000, layout.MMIO
_ORIGIN: Final = 0x10_0000
_BORDER: Final = _WINDOW + 0x1000
_FINISH: Final = bytes.fromhex("66baf800 ef f4")
"""`mov dx, 0xf8; out dx, eax; hlt`: the guest says what it got and ends."""
_PATIENCE_SECONDS: Final = 3.0
"""The most that one `KVM_RUN` may take; any of these exits takes microseconds."""
_INTEL: Final = int.from_bytes(b"Genu", "little")


@dataclass(frozen=True)
class Shape:
    """One instruction, its machine code, and the registers that it starts with."""

    name: str
    code: bytes
    registers: Mapping[str, int] = field(default_factory=dict)
    capability: str = ""
    """What KVM must offer for it."""
    xen: bool = False
    """Are hypercalls Xen's?"""


def _shape(name: str, code: str, **registers: int) -> Shape:
    return Shape(name, bytes.fromhex(code), registers)


SHAPES: Final = (
    _shape("in al, imm8", f"e4 {_PORT:02x}"),
    _shape("out imm8, al", f"e6 {_PORT:02x}", rax=0x51),
    _shape("rep insb, 4 times", "f3 6c", rdi=0x20_0000, rcx=4, rdx=_PORT),
    _shape("rep outsb, 4 times", "f3 6e", rsi=_ORIGIN, rcx=4, rdx=_PORT),
    _shape("rep outsb from MMIO", "f3 6e", rsi=_WINDOW, rcx=3, rdx=_PORT),
    _shape("MMIO read", "8b 03", rbx=_WINDOW),
    _shape("MMIO write", "89 03", rbx=_WINDOW, rax=0x51525354),
    _shape("MMIO read across a page", "48 8b 03", rbx=_BORDER - 3),
    _shape("MMIO write across a page", "48 89 03", rbx=_BORDER - 3, rax=0x5152535455565758),
    _shape("inc dword [mmio]", "ff 03", rbx=_WINDOW),
    _shape("rdmsr", "0f 32", rcx=_MSR),
    _shape("wrmsr", "0f 30", rcx=_MSR, rax=0x51, rdx=0),
)


_HYPERCALL, _XEN_HYPERCALL = "hypercall", "Xen hypercall"
_XEN_NUMBER: Final = 17
"""Any number does: it is the witness who answers."""
NAMES: Final = (*(shape.name for shape in SHAPES), _HYPERCALL, _XEN_HYPERCALL)
"""Of all shapes."""


def hypercalls() -> tuple[Shape, Shape]:
    """KVM_HC_MAP_GPA_RANGE, and one of Xen's, by the instruction that this host's CPU has.

    Raises `KvmUnavailable`.
    """
    system = System()
    try:
        leaves = system.supported_cpuid()
    finally:
        system.close()
    by_intel = any(
        leaf.function == 0 and leaf.ebx == _INTEL for leaf in leaves.entries[0 : leaves.nent]
    )
    code = bytes.fromhex("0f01c1" if by_intel else "0f01d9")  # vmcall, vmmcall
    page = {"rax": constants.KVM_HC_MAP_GPA_RANGE, "rbx": 0x20_0000, "rcx": 1, "rdx": 0}
    xen = {"rax": _XEN_NUMBER, "rdi": 1, "rsi": 2}
    return (
        Shape(_HYPERCALL, code, page, "KVM_CAP_EXIT_HYPERCALL"),
        Shape(_XEN_HYPERCALL, code, xen, "KVM_CAP_XEN_HVM", xen=True),
    )


@dataclass
class Finding:
    """What became of one shape; `error` where this host cannot run it."""

    access: str
    exit: str = ""
    flagged: bool = False
    exits_until_drained: int = 0
    uncompleted: str = ""
    drained: str = ""
    error: str = ""

    @property
    def right(self) -> bool:
        """Was it right when drained?"""
        return self.drained == "right"


class _Witness(Stateless):
    """Logs accesses; each read gives something else, so that a repeated one shows."""

    def __init__(self, kind: str, log: list[str]) -> None:
        self._kind = kind
        self._log = log

    def read(self, offset: int, size: int) -> int:
        self._log.append(f"{self._kind} read of {size} at {offset:#x}")
        return 0x11 * len(self._log)

    def write(self, offset: int, size: int, value: int) -> None:
        self._log.append(f"{self._kind} write of {value:#x} ({size}) at {offset:#x}")


class _Guest:
    """One shape in one VM; the log goes on over several of them."""

    def __init__(
        self, shape: Shape, log: list[str], state: Mapping[str, Any] | None = None
    ) -> None:
        self._log = log
        self.ended = False
        places: list[Placement] = [
            pio(_Witness("port", log), _PORT, 1),
            mmio(_Witness("MMIO", log), _WINDOW, 0x2000),
        ]
        if shape.capability:
            _demand(shape.capability)
        if "msr" in shape.name:
            places.append(msr(_Witness("MSR", log), _MSR))
        with tempfile.NamedTemporaryFile() as image:
            image.write(shape.code + _FINISH)
            image.flush()
            config = MachineConfig.make(
                kernel=image.name,
                flat=f"long@{_ORIGIN:#x}",
                memory="4M",
                unclaimed="ignore",
                xen=shape.xen,
            )
            self.parts = Parts(config, places, self._end, self._answer, state)
        self.vcpu = self.parts.vcpus[0]
        self.exits = self.parts.exits(self.vcpu)
        if state is None:
            regs = self.vcpu.regs()
            for name, value in shape.registers.items():
                setattr(regs, name, value)
            self.vcpu.set_regs(regs)

    def _end(self, outcome: Outcome) -> None:
        self._log.append(f"the guest got {outcome.status:#x}")
        self.ended = True

    def _answer(self, call: Call) -> int:
        kind = "Xen hypercall" if call.kind == "xen" else "hypercall"
        self._log.append(f"{kind} {call.number}")
        return 0x11 * len(self._log)

    def step(self) -> int:
        """To the next exit, which is served: its reason."""
        status = _run(self.vcpu)
        if status < 0:
            raise KvmError("KVM_RUN", -status)
        self.serve(status)
        return status

    def serve(self, reason: int) -> None:
        if self.exits.serve(reason) is not None:
            raise AvmmError("a witness answers at once")

    def finish(self) -> None:
        while not self.ended:
            self.step()


def _demand(capability: str) -> None:
    system = System()
    try:
        if not system.check(capability):
            raise AvmmError(f"its KVM lacks {capability}")
    finally:
        system.close()


def _run(vcpu: Vcpu) -> int:
    """KVM_RUN. Raises `AvmmError` where it does not return by itself."""
    thread = threading.get_native_id()
    late = False

    def interrupt() -> None:
        nonlocal late
        late = True
        vcpu.page.immediate_exit = 1
        kick(thread)

    install_kick()
    accept_kicks()
    timer = threading.Timer(_PATIENCE_SECONDS, interrupt)
    timer.start()
    try:
        while (status := vcpu.run()) == -errno.EINTR and not late:
            pass  # a signal of somebody else's
    finally:
        timer.cancel()
        timer.join()
    if status == -errno.EINTR:
        raise AvmmError(f"KVM_RUN does not return within {_PATIENCE_SECONDS:g} s")
    vcpu.page.immediate_exit = 0
    return status


def examine() -> list[Finding]:
    """All shapes on this host; needs a running trio loop, blocks it for a second or two.

    Raises `KvmUnavailable`.
    """
    return [examine_shape(shape) for shape in (*SHAPES, *hypercalls())]


def examine_shape(shape: Shape) -> Finding:
    finding = Finding(shape.name)
    try:
        expected: list[str] = []
        _with(shape, expected, None, _Guest.finish)
        for how in ("uncompleted", "drained"):
            log: list[str] = []
            state = _with(shape, log, None, partial(_until_saved, how=how, finding=finding))
            _with(shape, log, state, _Guest.finish)
            setattr(finding, how, _difference(expected, log))
    except AvmmError as error:
        finding.error = str(error).splitlines()[0]
    return finding


def _with(shape: Shape, log: list[str], state: Any, play: Callable[[_Guest], Any]) -> Any:
    guest = _Guest(shape, log, state)
    try:
        return play(guest)
    finally:
        guest.parts.close()


def _until_saved(guest: _Guest, how: str, finding: Finding) -> dict[str, Any]:
    reason = guest.step()
    finding.exit = exit_name(reason)
    finding.flagged = bool(guest.vcpu.page.flags & NEEDS_COMPLETION)
    if how == "drained":
        served = 0

        def serve(reason: int) -> None:
            nonlocal served
            served += 1
            guest.serve(reason)

        drain(guest.vcpu, serve, guest.parts.policy)
        finding.exits_until_drained = 1 + served
    return guest.parts.save()


def _difference(expected: list[str], log: list[str]) -> str:
    """What is missing and what is too many, in words; "right" where neither is."""
    if log == expected:
        return "right"
    lost, extra = Counter(expected) - Counter(log), Counter(log) - Counter(expected)
    kinds = {
        "lost": lost,
        "repeated": {what: n for what, n in extra.items() if what in expected},
        "instead": {what: n for what, n in extra.items() if what not in expected},
    }
    words = [
        f"{kind}: {', '.join(_times(what, n) for what, n in cases.items())}"
        for kind, cases in kinds.items()
        if cases
    ]
    return "; ".join(words) or "out of order"


def _times(what: str, times: int) -> str:
    return f"{what} ({times} times)" if times > 1 else what


_HEADINGS: Final = ("access", "first exit", "saved uncompleted", "saved drained")
_WIDEST: Final = 50
"""Characters of the column that holds sentences."""


def table(findings: Sequence[Finding]) -> str:
    """The findings for people; a lost or repeated access is told on lines of its own."""
    rows = [[[heading] for heading in _HEADINGS]]
    for finding in findings:
        flag = " (flagged)" if finding.flagged else ""
        uncompleted = finding.uncompleted or f"this host cannot run it: {finding.error}"
        parts = [textwrap.wrap(part, _WIDEST) for part in uncompleted.split("; ")]
        exits = f", {finding.exits_until_drained} exit" if finding.drained else ""
        exits += "s" if finding.exits_until_drained != 1 and exits else ""
        rows.append(
            [
                [finding.access],
                [finding.exit.removeprefix("KVM_EXIT_") + flag],
                [line for part in parts for line in part],
                [finding.drained + exits],
            ]
        )
    widths = [max(len(line) for row in rows for line in row[at]) for at in range(len(_HEADINGS))]
    lines = []
    for row in rows:
        for cells in itertools.zip_longest(*row, fillvalue=""):
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        lines += ["  ".join("-" * width for width in widths)] if row is rows[0] else []
    return "\n".join(lines)
