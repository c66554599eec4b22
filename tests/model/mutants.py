"""A catalogue of bugs, each planted in the source of avmm's own modules by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from hypothesis import strategies as st

from model.production import Production, mutate
from model.programs import hosts
from model.properties import beliefs, drained_at, drains, requested_at, requesting
from model.schedules import cases, played
from model.vcpu import Op


@dataclass(frozen=True)
class Bug:
    """What is edited (module, old, new), and the property that is to find it."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    finder: str
    """One of FINDERS, or "each checkpoint": only test_model_coordinator.py finds it for sure."""

    def planted(self) -> Production:
        edits: dict[str, list[tuple[str, str]]] = {}
        for module, old, new in self.edits:
            edits.setdefault(module, []).append((old, new))
        return mutate(edits)


_LOOK: Final = """\
            page.immediate_exit = 0
            if spot.asked or spot.stopping:
                self._state = _DRAINING
                if self._needs_completion(status):
                    drain(self._vcpu, self._serve_draining, self._policy)
                page.immediate_exit = 0
                if not spot.stopping:
                    self._state = _PARKED
                    spot.park()
                if spot.stopping:
                    return
                self._state = _RUNNING
"""
_IS_OUTPUT: Final = """\
    match page.exit():
        case PioExit(is_output=is_output):
            return is_output
        case MmioExit(is_write=is_write):
            return is_write
    return False
"""
_AWAIT: Final = """\
            # If it fails, `_wind_up` finds the exit without an answer.
            await interruptible(work)
            if self._state is _HANDED:
                self._state = _RUNNING
"""
_ANSWER: Final = """\
            mine = self._bridge.answer_and_poll(True)
"""
_UNDO: Final = """\
            with trio.CancelScope(shield=True):
                try:
                    await self._run_on()
                except Exception as failure:
                    # The guest runs on. The caller needs to know why it was not paused.
                    logger.exception("a pause failed, and on the way back:")
                    error.add_note(f"and on the way back: {failure!r}")
                    waited_for[-1] += f"; and on the way back: {failure!r}"  # for a deadline
            raise
"""
_PARK: Final = """\
            await self._vcpus.parked()
            self._deliver_coalesced()
"""
_DELIVER: Final = """\
            self._deliver_coalesced()
"""
_QUIESCE: Final = """\
            for device in self._devices:
                self._quiesced.append(device)
                self._enter(f"{device.name} has not finished what it has in flight")
                await device.quiesce()
"""
BUGS: Final = (
    Bug(
        "a single re-entry",
        (
            (
                "completion",
                "        if not policy.needs(status, flags, is_output=is_output(vcpu.page)):\n"
                "            return\n",
                "        return\n",
            ),
        ),
        "drain",
    ),
    Bug(
        "the drain goes on until EINTR, whatever the policy says",
        (
            (
                "completion",
                "        if not policy.needs(status, flags, is_output=is_output(vcpu.page)):\n"
                "            return\n",
                "        policy.needs(status, flags, is_output=is_output(vcpu.page))\n",
            ),
        ),
        "drain",
    ),
    Bug(
        "the loop drains whatever the policy says",
        (("loop", "if self._needs_completion(status):", "if True:"),),
        "loop",
    ),
    Bug(
        "the exit's reason is written before it is completed",
        (
            (
                "loop",
                "            status = run()\n",
                "            page.struct.exit_reason = 0\n            status = run()\n",
            ),
        ),
        "loop",
    ),
    Bug(
        "the drain writes the exit's reason before it completes",
        (
            (
                "completion",
                "        vcpu.page.immediate_exit = 1\n        status = vcpu.run()\n",
                "        vcpu.page.immediate_exit = 1\n"
                "        vcpu.page.struct.exit_reason = 0\n"
                "        status = vcpu.run()\n",
            ),
        ),
        "drain",
    ),
    Bug(
        "everything is taken for an output",
        (("completion", _IS_OUTPUT, "    return True\n"),),
        "drain",
    ),
    Bug(
        "nothing is taken for an output",
        (("completion", _IS_OUTPUT, "    return False\n"),),
        "drain",
    ),
    Bug(
        "no re-entry",
        (
            (
                "completion",
                "    for _ in range(DRAIN_LIMIT):\n",
                "    return\n    for _ in range(DRAIN_LIMIT):\n",
            ),
        ),
        "drain",
    ),
    Bug(
        "no re-entry in the loop",
        (("loop", "                    drain(self._vcpu,", "                    (self._vcpu,"),),
        "world",
    ),
    Bug(
        "the drain stops at -EAGAIN",
        (
            (
                "completion",
                "that waits for its SIPI\n            continue",
                "that waits for its SIPI\n            return",
            ),
        ),
        "drain",
    ),
    Bug(
        "unknown exits are taken for complete",
        (("completion", "return reason not in COMPLETE", "return reason in DOCUMENTED"),),
        "unknown",
    ),
    Bug(
        "the flag is trusted though the kernel lies",
        (
            (
                "completion",
                "self.mode is not CompletionMode.AUTO or self.lie",
                "self.mode is not CompletionMode.AUTO",
            ),
        ),
        "drain",
    ),
    Bug(
        "number 239 is trusted by itself",
        (("completion", "capability is not None and announced", "announced"),),
        "unknown",
    ),
    Bug(
        "an exit served while draining is not awaited",
        (
            (
                "loop",
                "            self._hand_over(pending)\n\n    @in_vcpu_thread\n    def _hand_over",
                "            pending.close()\n\n    @in_vcpu_thread\n    def _hand_over",
            ),
        ),
        "world",
    ),
    Bug(
        "lost kick: immediate_exit cleared after the look at the requests",
        (
            (
                "loop",
                _LOOK,
                _LOOK.replace("            page.immediate_exit = 0\n", "", 1)
                + "            page.immediate_exit = 0\n",
            ),
        ),
        "loop",
    ),
    Bug(
        "completion on another thread",
        (
            (
                "loop",
                "                    drain(self._vcpu, self._serve_draining, self._policy)\n",
                """\
                    import concurrent.futures
                    with concurrent.futures.ThreadPoolExecutor(1) as pool:
                        pool.submit(
                            drain, self._vcpu, self._serve_draining, self._policy
                        ).result()
""",
            ),
        ),
        "world",
    ),
    Bug(
        "the answer is written after the re-entry",
        (
            (
                "loop",
                _AWAIT + _ANSWER,
                _ANSWER + _AWAIT,
            ),
        ),
        "world",
    ),
    Bug(
        "a vCPU parks with a KVM_RUN still to be interrupted",
        (
            (
                "loop",
                _LOOK,
                _LOOK.replace("    page.immediate_exit = 0\n                if", "    if").replace(
                    "                if spot.stopping",
                    "                page.immediate_exit = 0\n                if spot.stopping",
                ),
            ),
        ),
        "world",
    ),
    Bug(
        "a stopped vCPU ends in the midst of its exit",
        (
            (
                "loop",
                "            if spot.asked or spot.stopping:\n                self._state",
                "            if spot.stopping:\n"
                "                return\n"
                "            if spot.asked:\n"
                "                self._state",
            ),
        ),
        "world",
    ),
    Bug(
        "an abandoned exit counts as finished",
        (
            (
                "loop",
                "        before, self._state = self._state, _ABANDONED\n",
                "        before = self._state\n",
            ),
        ),
        "failing world",
    ),
    Bug(
        "a failed vCPU is taken for parked",
        (("loop", "            if loop.failed:\n", "            if False:\n"),),
        "failing world",
    ),
    Bug("state is read before vCPUs are parked", (("migration", _PARK, _DELIVER),), "world"),
    Bug(
        "state is read before devices are quiesced",
        (("migration", "                await device.quiesce()\n", ""),),
        "world",
    ),
    Bug(
        "devices are quiesced before vCPUs are parked",
        (("migration", _PARK, _QUIESCE + _PARK),),
        "world",
    ),
    Bug(
        "coalesced writes are looked for before vCPUs are parked",
        (("migration", _PARK, _DELIVER + _PARK.removesuffix(_DELIVER)),),
        "world",
    ),
    Bug(
        "resume forgotten after a pause that failed",
        (("migration", _UNDO, "            raise\n"),),
        "failing world",
    ),
    Bug(
        "resume forgotten after a cancellation",
        (
            (
                "migration",
                "        except BaseException as error:\n",
                "        except Exception as error:\n",
            ),
        ),
        "world",
    ),
    Bug(
        "devices' resume is cut short by a cancellation",
        (
            ("migration", _UNDO, "            await self._run_on()\n            raise\n"),
            ("migration", "[trio.CancelScope(shield=True) for", "[trio.CancelScope() for"),
        ),
        "each checkpoint",
    ),
    Bug(
        "leaving is cut short by a cancellation",
        (
            (
                "migration",
                "            with trio.CancelScope(shield=True):\n"
                "                await self._release_one()\n",
                "            await self._release_one()\n",
            ),
            ("migration", "[trio.CancelScope(shield=True) for", "[trio.CancelScope() for"),
        ),
        "world",
    ),
    Bug(
        "the first of several pauses to be left resumes",
        (("migration", "if not self._holders and self", "if self"),),
        "world",
    ),
    Bug(
        "a pause that failed is counted",
        (
            (
                "migration",
                "        try:\n            if self._stand is Stand.RUNS:",
                "        self._holders += 1\n"
                "        try:\n            self._holders -= 1\n"
                "            if self._stand is Stand.RUNS:",
            ),
            (
                "migration",
                "                await self._stand_still(waited_for)\n"
                "            self._holders += 1\n",
                "                self._holders += 1\n"
                "                await self._stand_still(waited_for)\n"
                "                self._holders -= 1\n"
                "            self._holders += 1\n",
            ),
        ),
        "world",
    ),
)


def _drain(code: Production, case: dict[str, Any]) -> None:
    drained_at(code, **case)


def _loop(code: Production, case: dict[str, Any]) -> None:
    requested_at(code, **case)


def _world(code: Production, case: dict[str, Any]) -> None:
    played(code, **case)


_unknown: Final = st.fixed_dictionaries(
    {
        "program": st.lists(
            st.sampled_from([Op("unknown"), Op("compute"), Op("out"), Op("notice")]), min_size=1
        ),
        "host": hosts(),
        "believes": beliefs(),
        "pauses": st.none(),
    }
)

FINDERS: Final = {
    "unknown": (_unknown, _drain, 800),
    "drain": (drains, _drain, 800),
    "loop": (requesting, _loop, 4000),
    "world": (cases(), _world, 3000),
    "failing world": (cases(fails=True), _world, 800),
}
"""By name: what to draw, the property, and within how many examples it must find a bug
(they are the same in each run, so this is no matter of luck)."""
