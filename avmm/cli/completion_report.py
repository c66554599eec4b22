"""`avmm doctor --completion`: what an uncompleted exit costs on this host, by experiment.

For each shape of access, a guest of one instruction runs three times on this host's KVM: once
through to its end; once saved at the exit without completing it, and continued in a fresh VM; once
saved after a drain, and continued in a fresh VM. What the device saw and what the guest got show
what was lost and what was repeated.

Not every KVM can do all of it: on a page-table KVM a hypercall from ring 0 never leaves `KVM_RUN`.
So each `KVM_RUN` that takes too long is kicked, and the report says that this host cannot run that
shape.
"""

from __future__ import annotations

import errno
import itertools
import tempfile
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self

import trio

from avmm import arch, engine
from avmm.arch.contract import Probe
from avmm.bus.space import Placement, mmio, msr, pio
from avmm.config import MachineConfig
from avmm.devices.state import Stateless
from avmm.errors import AvmmError
from avmm.kvm import Capability, KvmError, Vcpu, exit_name
from avmm.kvm.kick import accept_kicks, install_kick, kick
from avmm.memory.pages import PAGE
from avmm.outcome import Outcome
from avmm.parts import Origin, Parts, build, dismantle
from avmm.vcpu.calls import Call
from avmm.vcpu.completion import NEEDS_COMPLETION, drain
from avmm.vcpu.exits import Exits

_PORT, _REGISTER = 0xE0, 0x4D56_0000
_ORIGIN: Final = 0x10_0000
_WINDOW_SIZE: Final = 2 * PAGE
_PATIENCE_SECONDS: Final = 3.0
"""The most that one `KVM_RUN` may take; any of these exits takes microseconds."""


@dataclass
class Finding:
    """The result for one shape. `error` is set if this host cannot run it."""

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
    """Logs accesses. Each read returns a different value, so that a repeated read shows."""

    def __init__(self, kind: str, log: list[str]) -> None:
        self._kind = kind
        self._log = log

    def read(self, offset: int, size: int) -> int:
        self._log.append(f"{self._kind} read of {size} at {offset:#x}")
        return 0x11 * len(self._log)

    def write(self, offset: int, size: int, value: int) -> None:
        self._log.append(f"{self._kind} write of {value:#x} ({size}) at {offset:#x}")


class _Guest:
    """One shape in one VM, made by `made`; the log goes on over several of them."""

    parts: Parts
    vcpu: Vcpu
    exits: Exits

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.ended = False

    @classmethod
    async def made(
        cls, shape: Probe, log: list[str], state: Mapping[str, Any] | None, choice: str
    ) -> Self:
        """Ready to run; `state` is that of another one of this shape."""
        guest = cls(log)
        kind = arch.host()
        places: list[Placement] = [
            pio(_Witness("port", log), _PORT, 1),
            mmio(_Witness("MMIO", log), kind.own_window.start, _WINDOW_SIZE),
        ]
        if shape.capability is not None:
            _demand(shape.capability, choice)
        if "msr" in shape.name:
            places.append(msr(_Witness("MSR", log), _REGISTER))
        with tempfile.NamedTemporaryFile() as image:
            image.write(shape.code + kind.probe_end)
            image.flush()
            config = MachineConfig.make(
                kernel=image.name,
                flat=f"long@{_ORIGIN:#x}",
                memory="4M",
                unclaimed="ignore",
                xen=shape.xen,
                engine=choice,
            )
            guest.parts = await build(config, places, guest._end, guest._answer, Origin(state))
        guest.vcpu = guest.parts.vcpus[0]
        guest.exits = guest.parts.exits(guest.vcpu)
        if state is None:
            kind.set_registers(guest.vcpu, shape.registers)
        return guest

    def _end(self, outcome: Outcome) -> None:
        self._log.append(f"the guest got {outcome.status:#x}")
        self.ended = True

    def _answer(self, call: Call) -> int:
        kind = "Xen hypercall" if call.kind == "xen" else "hypercall"
        self._log.append(f"{kind} {call.number}")
        return 0x11 * len(self._log)

    def step(self) -> int:
        """Run to the next exit and serve it; return its reason."""
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


def _demand(capability: Capability, choice: str) -> None:
    system = engine.opened(arch.host(), choice)
    try:
        if not system.check(capability):
            name = "the software engine" if system.engine == engine.SOFT else "its KVM"
            raise AvmmError(f"{name} lacks {capability}")
    finally:
        system.close()


def _run(vcpu: Vcpu) -> int:
    """Call KVM_RUN. Raises `AvmmError` if it does not return by itself."""
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
        raise AvmmError(f"KVM_RUN did not return within {_PATIENCE_SECONDS:g} s")
    vcpu.page.immediate_exit = 0
    return status


async def examine(choice: str = engine.AUTO) -> list[Finding]:
    """All shapes on an engine of this host; blocks the loop for a second or two. Raises what
    `engine.opened` raises."""
    return [await examine_shape(shape, choice) for shape in shapes(choice)]


def shapes(choice: str = engine.AUTO) -> list[Probe]:
    """The shapes of access that there are on this host's architecture. Raises what `engine.opened`
    raises."""
    kind = arch.host()
    system = engine.opened(kind, choice)
    try:
        return kind.probes(system, _ORIGIN, _PORT, kind.own_window.start, _REGISTER)
    finally:
        system.close()


async def examine_shape(shape: Probe, choice: str = engine.AUTO) -> Finding:
    finding = Finding(shape.name)
    try:
        expected: list[str] = []
        await _with(shape, expected, None, _Guest.finish, choice)
        for how in ("uncompleted", "drained"):
            log: list[str] = []
            until_saved = partial(_until_saved, how=how, finding=finding)
            state = await _with(shape, log, None, until_saved, choice)
            await _with(shape, log, state, _Guest.finish, choice)
            setattr(finding, how, _difference(expected, log))
    except AvmmError as error:
        finding.error = str(error).splitlines()[0]
    return finding


async def _with(
    shape: Probe, log: list[str], state: Any, play: Callable[[_Guest], Any], choice: str
) -> Any:
    guest = await _Guest.made(shape, log, state, choice)
    try:
        return play(guest)
    finally:
        with trio.CancelScope(shield=True):
            await dismantle(guest.parts)


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
    """Which accesses are missing and which are repeated, in words; "right" if there are none of
    either.
    """
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
"""Width in characters of the column that holds sentences."""


def table(findings: Sequence[Finding]) -> str:
    """The findings as a table for people. Each lost or repeated access gets lines of its own."""
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
