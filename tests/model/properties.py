"""The properties of one vCPU: nothing lost, nothing repeated. Each raises `Broken`.

They take the production code to judge as their first argument, so that the suite can show that
they hold for avmm and fail for avmm with a bug.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from avmm.errors import AvmmError
from avmm.kvm import KvmError, exit_name
from avmm.vcpu.completion import COMPLETE
from model.production import Production
from model.programs import hosts, programs
from model.solo import STEPS, InlineLoop, Result, Solo, oracle
from model.vcpu import Broken, Host, Op


@dataclass(frozen=True)
class Believes:
    """How the policy is configured: see `CompletionPolicy`."""

    mode: str = "AUTO"
    capability: int | None = None
    announced: bool = False


def policy(code: Production, believes: Believes) -> Any:
    mode = code.completion.CompletionMode[believes.mode]
    return code.completion.CompletionPolicy(
        mode, capability=believes.capability, announced=believes.announced
    )


def beliefs() -> st.SearchStrategy[Believes]:
    """Every configuration that is meant to be right on every host, 239 not being ours."""
    return st.sampled_from(
        [
            Believes(),
            Believes("LIST"),
            Believes("ALWAYS"),
            Believes(capability=None, announced=True),
            Believes(capability=300, announced=True),
            Believes(capability=300, announced=False),
            Believes("LIST", capability=300, announced=True),
        ]
    )


def same(result: Result, expected: Result, after: str) -> None:
    """The one that all is about: the devices' log and the guest's checksum are the oracle's."""
    if result == expected:
        return
    log, right = result.log, expected.log
    at = next((n for n, (a, b) in enumerate(zip(log, right, strict=False)) if a != b), None)
    if at is None:
        at = min(len(log), len(right))
    raise Broken(
        f"{after}: the guest's run is not the undisturbed one's: {len(log)} accesses, not "
        f"{len(right)}; access {at} is {log[at : at + 1]}, not {right[at : at + 1]}; checksum "
        f"{result.checksum:#x}, not {expected.checksum:#x}; pc {result.pc}, not {expected.pc}"
    )


def can_tell(
    host: Host, believes: Believes, program: Sequence[Op], onto: Host | None = None
) -> bool:
    """Can avmm know at all what needs completion?

    Where the user says that the kernel sets the flag, it never does, and the first exit to show
    it is one that avmm does not know, then nothing tells them from a kernel that is right.
    """
    trusts = believes.mode == "AUTO" and believes.capability is not None and believes.announced
    unknown = any(op.kind == "unknown" for op in program)
    silent = "none" in (host.flags, onto.flags if onto else "")
    return not (trusts and silent and unknown)


def needs_none(code: Production, decide: Any) -> Callable[[int], None]:
    """For `ModelVcpu.on_needless`: where the policy can tell, nobody enters again for nothing.

    It cannot where it does not go by the flag; nor, of an output, before it has seen the flag.
    """

    def on_needless(reason: int) -> None:
        knows = reason in COMPLETE or (decide.by_flag and decide._seen_set)
        if knows and decide.mode is not code.completion.CompletionMode.ALWAYS:
            raise Broken(f"KVM_RUN was entered to complete {exit_name(reason)}, which needs none")

    return on_needless


def believed(host: Host, decide: Any) -> None:
    """A kernel that tells the truth is not called a liar."""
    if host.flags in ("honest", "sparing") and decide.lie:
        raise Broken(f"an honest kernel is not believed: {decide.lie}")


def drained_at(
    code: Production,
    program: Sequence[Op],
    host: Host,
    believes: Believes,
    pauses: Collection[int] | None,
    late: Sequence[bool] = (),
    onto: Host | None = None,
) -> int:
    """Drain at these exits (None: at each), save, load into a new vCPU (on host `onto`), run on.

    What `VcpuLoop` does around `drain` is done here as it says; gives the number of exits.
    """
    expected = oracle(program)
    decide = policy(code, believes)
    solo = Solo(code, program, host)
    answers = iter(late)

    def answers_late() -> bool:
        return next(answers, False)

    solo.late = answers_late
    solo.model.on_needless = needs_none(code, decide)
    number = 0
    for _ in range(STEPS):
        if solo.model.finished:
            break
        status = solo.model.run()
        if status < 0:
            continue
        flags = solo.model.page.flags
        solo.serve(status)
        if pauses is None or number in pauses:
            try:
                is_output = code.completion.is_output(solo.model.page)
                if decide.needs(status, flags, is_output=is_output):
                    code.completion.drain(solo.model, solo.serve, decide)
            except AvmmError as error:
                raise Broken(f"drained at exit {number}: {error}") from error
            believed(host, decide)
            if onto is not None:
                host, decide = onto, policy(code, believes)  # another kernel: nothing is known
            solo = solo.again(host)
            solo.late = answers_late
            solo.model.on_needless = needs_none(code, decide)
        number += 1
    same(solo.to_end(), expected, f"drained at exits {pauses or 'all'}")
    return number


def each_exit_in_turn(code: Production, program: Sequence[Op], host: Host) -> int:
    """The torture guest's test: one pause, at each exit index; gives the number of runs."""
    exits = drained_at(code, program, host, Believes(), [])
    for number in range(exits):
        drained_at(code, program, host, Believes(), [number])
    return exits


Requests = dict[int, Sequence[str]]
"""What is asked for at a numbered point of `InlineLoop`: of REQUESTS, in this order."""
REQUESTS = ("pause", "resume", "kick", "pause again")


def requested_at(
    code: Production,
    program: Sequence[Op],
    host: Host,
    believes: Believes,
    requests: Requests,
    late: Sequence[bool] = (),
) -> tuple[int, int]:
    """Run `VcpuLoop`'s own loop with these requests; at each park, save, and check what the
    state comes to. Gives the number of points and of parks."""
    expected = oracle(program)
    solo = Solo(code, program, host)
    answers = iter(late)
    solo.late = lambda: next(answers, False)

    def at_point(inline: InlineLoop, number: int) -> None:
        for request in requests.get(number, ()):
            if request == "kick":
                solo.model.signal()
            elif request == "resume":
                inline.resume()
            elif request == "pause":
                inline.pause()
            else:
                inline.resume()
                inline.pause()

    def parked(inline: InlineLoop) -> None:
        same(solo.again().to_end(), expected, f"parked at point {inline.points}")

    decide = policy(code, believes)
    solo.model.on_needless = needs_none(code, decide)
    inline = InlineLoop(solo, decide, at_point, parked)
    try:
        result = inline.run()
    except (AvmmError, KvmError) as error:
        raise Broken(f"the vCPU ended: {error}") from error
    same(result, expected, "having run on")
    believed(host, decide)
    return inline.points, inline.parks


Property = Callable[..., object]

drains = st.fixed_dictionaries(
    {
        "program": programs(),
        "host": hosts(retries=True),
        "believes": beliefs(),
        "pauses": st.none() | st.sets(st.integers(0, 30), max_size=6),
        "late": st.lists(st.booleans(), max_size=12),
        "onto": st.none() | hosts(retries=True),
    }
)
requesting = st.fixed_dictionaries(
    {
        "program": programs(6),
        "host": hosts(),
        "believes": beliefs(),
        "requests": st.dictionaries(
            st.integers(1, 80),
            st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=3),
            max_size=5,
        ),
        "late": st.lists(st.booleans(), max_size=12),
    }
)
