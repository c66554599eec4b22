"""pytest's side here: sends the marked tests into L1 and reports their results as if run here.

Each test's reports are made in L1 (`inside`), come as lines of JSON, and go to pytest's own hooks;
so counts, failures with their output, durations and --junitxml are what they always are. Where
L1 hangs or dies, the tests that have no result yet are run in a second one; where pytest dies in
it, or a second machine is lost, they fail with the end of its console.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from lab.cache import LabError
from lab.machine import KINDS, L1

KIND: Final = "AVMM_LAB"
"""The variable that tells which lab it is, in L1."""
SECONDS: Final = 5400
"""The most that all tests together may take in L1."""
SLOWER: Final = 6
"""How many times as long as here a test may take there."""
_LATE: Final = (
    "TimeoutExpired",
    "TooSlowError",
    "Failed: Timeout",
    "pexpect.exceptions.TIMEOUT",
)
"""What the report of a test says that has run out of its time."""
_SCRIPT: Final = """\
python3 -m pytest -p lab.inside -p no:cacheprovider -q --timeout {timeout} -m '{marks}' @nodes \
>/tmp/said 2>&1
echo "pytest ended with $?"
tail -c 3000 /tmp/said
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--lab KIND` and `--lab-cpus N`."""
    group = parser.getgroup("avmm")
    group.addoption(
        "--lab",
        choices=KINDS,
        help="Run the tests marked `lab` on that KVM, in QEMU: 'stock' is Debian's kvm_amd, "
        "'newer' that of its backports, 'newest' that of its newest kernel, 'proposing' the first "
        "with the list's KVM_RUN_NEEDS_COMPLETION.",
    )
    group.addoption(
        "--lab-cpus",
        type=int,
        default=1,
        help="How many CPUs the lab has. With more than one QEMU ends a guest by a triple fault "
        "now and then.",
    )
    group.addoption(
        "--lab-whole",
        action="store_true",
        help="Also run the tests that take a minute or more there.",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A lab is one machine, and so is L1: its tests run in one process."""
    return 0 if config.getoption("lab") or KIND in os.environ else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only the marked ones, with --lab; without it, not those that need that KVM."""
    kind = config.getoption("lab") or os.environ.get(KIND)  # the latter in L1
    whole = config.getoption("lab_whole") or KIND in os.environ  # to L1 the chosen ones are sent
    chosen = [item for item in items if _belongs(item, kind, whole)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    if KIND in os.environ:  # the default is scaled by --timeout
        for item in items:
            mark = item.get_closest_marker("timeout")
            if mark is not None:
                item.add_marker(pytest.mark.timeout(SLOWER * mark.args[0]), append=False)


def _belongs(item: pytest.Item, kind: str | None, whole: bool) -> bool:
    """`lab`: here and in every lab, `lab(also=KIND)`: here and in that one, `lab(only=KIND)`: in
    that one alone. `long=True`: in the lab only if all of it is asked for."""
    mark = item.get_closest_marker("lab")
    only = mark.kwargs.get("only") if mark is not None else None
    if kind is None:
        return only is None
    if mark is None or (mark.kwargs.get("long") and not whole):
        return False
    return mark.kwargs.get("also", only) in (None, kind)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With --lab: all of them in one L1."""
    kind = session.config.getoption("lab")
    if not kind or session.config.option.collectonly:
        return None
    if session.items:
        _Run(session, kind).play()
    return True


class _Run:
    """The tests of one session in one L1."""

    def __init__(self, session: pytest.Session, kind: str) -> None:
        self._config = session.config
        self._kind = kind
        self._left = {item.nodeid: item for item in session.items}
        self._late: set[str] = set()
        self._said = ""
        """The end of the last L1, by its console."""

    def play(self) -> None:
        from lab import machine  # noqa: PLC0415 - only here

        lost: dict[str, pytest.Item] = {}
        try:
            l1 = machine.prepare(self._kind, self._config.getoption("lab_cpus"))
            if self._play_in(l1):  # what has no result then ended pytest itself
                lost = {node: it for node, it in self._left.items() if node not in self._late}
                self._left = {node: self._left[node] for node in self._late}
            if self._left:
                print("\nlab: once more, without the tests that have a result")
                self._play_in(l1)
        except (LabError, OSError) as error:  # a full disk here, too
            self._said = str(error)
        for nodeid, item in (lost | self._left).items():
            self._report_lost(nodeid, item)

    def _play_in(self, l1: L1) -> bool:
        """Run what is left. Has L1 come to its end as it should?"""
        from lab import guest, machine, payload  # noqa: PLC0415 - only here

        timeout = SLOWER * float(self._config.getini("timeout") or 60)
        script = _SCRIPT.format(timeout=timeout, marks=self._config.option.markexpr)
        nodes = {"nodes": "".join(f"{nodeid}\n" for nodeid in self._left)}
        with tempfile.TemporaryDirectory() as scratch:
            tar = Path(scratch, "payload.tar")
            payload.write(tar, self._kind, script, nodes, guest.folders())
            try:
                self._said = machine.run(l1, tar, SECONDS, self._take)
            except machine.Lost as error:
                self._said = str(error)
        ended = "lab: run.sh ended with" in self._said
        if self._left and not ended:
            print(f"\nlab: L1 is gone before its time:\n{self._said[-3000:]}")
        return ended

    def _take(self, line: str) -> None:
        try:
            data = json.loads(line)
        except ValueError:
            return  # what the kernel or a program has said in between
        if not isinstance(data, dict) or "nodeid" not in data:
            return
        hook = self._config.hook
        report = hook.pytest_report_from_serializable(config=self._config, data=data)
        if isinstance(report.longrepr, list):  # a skip's (file, line, reason): JSON has no tuples
            report.longrepr = tuple(report.longrepr)
        if report.when == "call" and self._is_late(report):
            return
        if report.when == "setup":
            hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
        hook.pytest_runtest_logreport(report=report)
        if report.when == "call" or not report.passed:  # no call comes after a setup like that
            self._left.pop(report.nodeid, None)
        if report.when == "teardown":
            hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)

    def _is_late(self, report: pytest.TestReport) -> bool:
        """Has it run out of time, for the first time? Then it gets a second L1: under emulation a
        kernel, or a guest of it, hangs now and then. Both are told; a test that is late in both
        has failed."""
        text = str(report.longrepr)
        if not report.failed or not any(word in text for word in _LATE):
            return False
        if report.nodeid in self._late:
            return False
        self._late.add(report.nodeid)
        print(f"\nlab: {report.nodeid} was late, and gets a second chance:\n{text[-4000:]}")
        return True

    def _report_lost(self, nodeid: str, item: pytest.Item) -> None:
        text = f"the lab ended without a result of this test:\n{self._said[-3000:]}"
        sections: Sequence[tuple[str, str]] = ()
        report = pytest.TestReport(
            nodeid,
            item.location,
            dict.fromkeys(item.keywords, 1),
            "failed",
            text,
            "call",
            sections,
        )
        self._config.hook.pytest_runtest_logreport(report=report)
