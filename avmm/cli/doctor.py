"""`avmm doctor`: shows what this host's engines offer, and whether avmm works here."""

from __future__ import annotations

import json
import platform
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import trio

from avmm import arch, engine, guests
from avmm.cli import completion_report
from avmm.config import Settings
from avmm.errors import AvmmError, EngineUnavailable
from avmm.kvm import KvmError, KvmUnavailable, System, capabilities
from avmm.machine import Machine
from avmm.outcome import Cause

if TYPE_CHECKING:
    from avmm.arch.contract import AnyArchitecture

_USES: Final = {
    "KVM_CAP_USER_MEMORY": "guest memory",
    "KVM_CAP_IRQCHIP": "PIC, IOAPIC and LAPICs in the kernel",
    "KVM_CAP_PIT2": "the PC's timer in the kernel",
    "KVM_CAP_IRQFD": "interrupts raised without an ioctl",
    "KVM_CAP_IRQ_ROUTING": "message-signalled interrupts by eventfd",
    "KVM_CAP_SIGNAL_MSI": "message-signalled interrupts",
    "KVM_CAP_MP_STATE": "several vCPUs",
    "KVM_CAP_IMMEDIATE_EXIT": "kicks that are never lost",
    "KVM_CAP_READONLY_MEM": "read-only memory regions",
    "KVM_CAP_TSC_DEADLINE_TIMER": "the guest's TSC-deadline timer",
    "KVM_CAP_SET_TSS_ADDR": "real mode on older Intel hosts",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR": "real mode on older Intel hosts",
}
"""What avmm uses each capability for. Capabilities without an entry here are listed without a
use.
"""
_DEADLINE_SECONDS: Final = 20


@dataclass
class EngineReport:
    """What was found of one engine. `problem` is empty if a guest ran on it."""

    usable: bool = False
    max_vcpus: int = 0
    msrs: int = 0
    guest_ran: bool = False
    ring0_mips: float | None = None
    runs_kernels: bool | None = None
    """Can it run a Linux kernel? None: it was not tried."""
    problem: str = ""


@dataclass
class HostReport:
    """What was found. `problems` is empty if avmm works here, on one engine at least."""

    kernel: str
    modules: list[str]
    kvm: EngineReport = field(default_factory=EngineReport)
    soft: EngineReport = field(default_factory=EngineReport)
    capabilities: dict[str, int] = field(default_factory=dict)
    """KVM's."""
    auto: dict[str, str] = field(default_factory=dict)
    """The engine that the setting `auto` takes for a "guest", and for a Linux "kernel"."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option(
    "--completion",
    is_flag=True,
    help="Show by experiment what is lost or repeated if state is saved before an exit is "
    "completed, and that everything is right after a drain.",
)
@click.option(
    "--engine",
    "choice",
    type=click.Choice([engine.AUTO, *engine.NAMES]),
    help="With --completion: the engine to show it on.  [default: auto]",
)
def command(as_json: bool, completion: bool, choice: str | None) -> None:
    """Show what this host's KVM and the software engine offer, which of them runs a guest, and
    whether avmm works here.

    The command ends with status 1 if avmm cannot work on this host.
    """
    if completion:
        _completion(as_json, choice or engine.AUTO)
        return
    if choice is not None:
        raise click.UsageError("--engine: it goes with --completion; doctor looks at both engines")
    report = examine()
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        _print(report)
    sys.exit(1 if report.problems else 0)


def examine() -> HostReport:
    """Look at both engines, and run a small guest on each."""
    report = HostReport(kernel=platform.release(), modules=_modules())
    kind = arch.host()
    _examine(kind, report.kvm, engine.KVM, report.capabilities)
    _examine(kind, report.soft, engine.SOFT, {})
    kvm, soft = report.kvm, report.soft
    if not kvm.guest_ran and not soft.guest_ran:
        report.problems += [kvm.problem, soft.problem]
        return report
    if kvm.guest_ran and kvm.runs_kernels is False:
        report.notes.append(
            "this KVM interprets ring-0 code: 64-bit ring-3 code runs at full speed, but "
            "kernels are slow, and a stock kernel may use instructions that this KVM refuses"
        )
    report.auto = {
        "guest": _automatic(kind, is_kernel=False),
        "kernel": _automatic(kind, is_kernel=True),
    }
    if soft.guest_ran:
        report.notes.append("the software engine is no security boundary as KVM is")
    return report


def _examine(
    kind: AnyArchitecture, report: EngineReport, choice: str, offered: dict[str, int]
) -> None:
    try:
        system = engine.opened(kind, choice)
    except (KvmUnavailable, EngineUnavailable) as error:
        report.problem = str(error)
        return
    try:
        report.usable = True
        report.max_vcpus = min(system.max_vcpus, kind.most_cpus)
        report.msrs = kind.count_msrs(system)
        offered |= {name: system.check(name) for name in capabilities()}
        report.runs_kernels = kind.runs_kernels(system)
    except KvmError as error:
        report.problem = f"a guest cannot run here: {error}"
        return
    finally:
        system.close()
    try:
        trio.run(_try_guest, report, choice)
    except (AvmmError, OSError) as error:
        report.problem = f"a guest cannot run here: {error}"


def _automatic(kind: AnyArchitecture, *, is_kernel: bool) -> str:
    if (choice := engine.by_environment()) != engine.AUTO:
        return choice
    system = engine.automatic(kind, is_kernel=is_kernel).system
    system.close()
    return system.engine


async def _try_guest(report: EngineReport, choice: str) -> None:
    """Count in a ring-0 loop of the bundled guest `exits`."""
    settings: Settings = {
        "kernel": guests.path("exits"),
        "cmdline": "kind=spin count=100000",
        "memory": "16M",
        "engine": choice,
    }
    output = b""
    with trio.move_on_after(_DEADLINE_SECONDS) as deadline:
        async with Machine(**settings) as vm:
            async for data in vm.console:
                output += data
            outcome, khz = await vm.wait(), vm.tsc_khz
    if deadline.cancelled_caught:
        report.problem = f"a guest did not end within {_DEADLINE_SECONDS} s"
        return
    result = re.search(rb"\bcount=(\d+)\b.*\bcycles=(\d+)", output)
    if outcome.cause is not Cause.EXIT or outcome.status or result is None:
        report.problem = f"a guest ended unexpectedly ({outcome}) and printed {output!r}"
        return
    report.guest_ran = True
    seconds = int(result[2]) / (khz * 1000)
    report.ring0_mips = round(_LOOP_INSTRUCTIONS * int(result[1]) / seconds / 1e6, 1)


_LOOP_INSTRUCTIONS: Final = 6
"""Instructions in one turn of the guest's counting loop (guests/exits/spin.c)."""


def _completion(as_json: bool, choice: str) -> None:
    try:
        findings = trio.run(completion_report.examine, choice)
    except (KvmUnavailable, EngineUnavailable) as error:
        if as_json:
            nothing = [
                completion_report.Finding(n, error=str(error)) for n in arch.host().probe_names
            ]
            click.echo(json.dumps([asdict(finding) for finding in nothing], indent=2))
        else:
            _print_problem(str(error))
        sys.exit(1)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        click.echo(completion_report.table(findings))
    # One shape that this host cannot run is not a failure. If it can run none of them, that is
    # one.
    works = any(finding.right for finding in findings)
    sys.exit(0 if works and all(finding.right or finding.error for finding in findings) else 1)


def _modules() -> list[str]:
    return sorted(path.name for path in Path("/sys/module").glob("kvm*"))


def _print(report: HostReport) -> None:
    click.echo(
        f"kernel         {report.kernel}, modules {', '.join(report.modules) or 'built in'}"
    )
    click.echo(f"/dev/kvm       {_told(report.kvm)}")
    if report.kvm.usable:
        click.echo("capabilities")
        for name, value in report.capabilities.items():
            need = "needed" if name in System.REQUIRED else "used" if name in _USES else ""
            mark = click.style("yes", fg="green") if value else click.style("no ", fg="yellow")
            amount = f"({value})" if value > 1 else ""
            line = f"  {mark} {name:38} {need:7}{_USES.get(name, '')} {amount}"
            click.echo(line.rstrip())
    click.echo(f"soft engine    {_told(report.soft)}")
    if report.auto:
        told = {engine.KVM: "KVM", engine.SOFT: "the software engine"}
        guest, kernel = (told[report.auto[what]] for what in ("guest", "kernel"))
        kernels = "" if kernel == guest else f"; for Linux kernels, {kernel}"
        because = "" if engine.by_environment() == engine.AUTO else f", as {engine.VARIABLE} says"
        click.echo(f"engine auto    takes {guest}{kernels}{because}")
    for note in report.notes:
        click.echo(f"note           {note}")
    for problem in report.problems:
        _print_problem(problem)
    if not report.problems:
        click.echo("avmm works on this host.")


def _told(report: EngineReport) -> str:
    if report.problem:
        return report.problem
    return (
        f"works; up to {report.max_vcpus} vCPUs, {report.msrs} MSRs; a test guest ran, at "
        f"{report.ring0_mips} M instructions/s in ring 0"
    )


def _print_problem(problem: str) -> None:
    click.echo(f"{click.style('problem', fg='red')}        {problem}")
