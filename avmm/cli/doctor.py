"""`avmm doctor`: shows what this host's KVM offers, and whether avmm works here."""

from __future__ import annotations

import json
import platform
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import click
import trio

from avmm import arch, guests
from avmm.cli import completion_report
from avmm.errors import AvmmError
from avmm.kvm import KvmUnavailable, System, capabilities
from avmm.machine import Machine
from avmm.outcome import Cause

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
_SLOW_MIPS: Final = 50
_DEADLINE_SECONDS: Final = 20


@dataclass
class HostReport:
    """What was found. `problems` is empty if avmm works here."""

    kernel: str
    modules: list[str]
    usable: bool = False
    max_vcpus: int = 0
    msrs: int = 0
    capabilities: dict[str, int] = field(default_factory=dict)
    guest_ran: bool = False
    ring0_mips: float | None = None
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
def command(as_json: bool, completion: bool) -> None:
    """Show what this host's KVM offers, what avmm uses of it, and whether avmm works here.

    The command ends with status 1 if avmm cannot work on this host.
    """
    if completion:
        _completion(as_json)
        return
    report = examine()
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        _print(report)
    sys.exit(1 if report.problems else 0)


def examine() -> HostReport:
    """Look at KVM, then run a small guest on it."""
    report = HostReport(kernel=platform.release(), modules=_modules())
    try:
        kind = arch.host()
        system = kind.open_system()
    except KvmUnavailable as error:
        report.problems.append(str(error))
        return report
    try:
        report.usable = True
        report.max_vcpus = system.max_vcpus
        report.msrs = kind.count_msrs(system)
        report.capabilities = {name: system.check(name) for name in capabilities()}
    finally:
        system.close()
    try:
        trio.run(_try_guest, report)
    except (AvmmError, OSError) as error:
        report.problems.append(f"a guest cannot run here: {error}")
    if report.ring0_mips is not None and report.ring0_mips < _SLOW_MIPS:
        report.notes.append(
            "this KVM interprets ring-0 code: 64-bit ring-3 code runs at full speed, but "
            "kernels are slow, and a stock kernel may use instructions that this KVM refuses"
        )
    return report


async def _try_guest(report: HostReport) -> None:
    """Count in a ring-0 loop of the bundled guest `exits`."""
    cmdline = "kind=spin count=100000"
    output = b""
    with trio.move_on_after(_DEADLINE_SECONDS) as deadline:
        async with Machine(kernel=guests.path("exits"), cmdline=cmdline, memory="16M") as vm:
            async for data in vm.console:
                output += data
            outcome, khz = await vm.wait(), vm.tsc_khz
    if deadline.cancelled_caught:
        report.problems.append(f"a guest did not end within {_DEADLINE_SECONDS} s")
        return
    result = re.search(rb"\bcount=(\d+)\b.*\bcycles=(\d+)", output)
    if outcome.cause is not Cause.EXIT or outcome.status or result is None:
        report.problems.append(f"a guest ended unexpectedly ({outcome}) and printed {output!r}")
        return
    report.guest_ran = True
    seconds = int(result[2]) / (khz * 1000)
    report.ring0_mips = round(_LOOP_INSTRUCTIONS * int(result[1]) / seconds / 1e6, 1)


_LOOP_INSTRUCTIONS: Final = 6
"""Instructions in one turn of the guest's counting loop (guests/exits/spin.c)."""


def _completion(as_json: bool) -> None:
    try:
        findings = trio.run(completion_report.examine)
    except KvmUnavailable as error:
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
    if report.usable:
        click.echo(f"/dev/kvm       works; up to {report.max_vcpus} vCPUs, {report.msrs} MSRs")
        click.echo("capabilities")
        for name, value in report.capabilities.items():
            need = "needed" if name in System.REQUIRED else "used" if name in _USES else ""
            mark = click.style("yes", fg="green") if value else click.style("no ", fg="yellow")
            amount = f"({value})" if value > 1 else ""
            line = f"  {mark} {name:38} {need:7}{_USES.get(name, '')} {amount}"
            click.echo(line.rstrip())
    if report.guest_ran:
        click.echo(f"test guest     ran; {report.ring0_mips} M instructions/s in ring 0")
    for note in report.notes:
        click.echo(f"note           {note}")
    for problem in report.problems:
        _print_problem(problem)
    if not report.problems:
        click.echo("avmm works on this host.")


def _print_problem(problem: str) -> None:
    click.echo(f"{click.style('problem', fg='red')}        {problem}")
