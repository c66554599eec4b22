"""Schedules: what happens when, drawn by hypothesis, played on a `World`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import trio
from hypothesis import strategies as st

from model.production import Production
from model.programs import hosts, programs
from model.properties import Believes, beliefs
from model.vcpu import Host, Op
from model.world import World, lived

Action = tuple[Any, ...]
"""A verb of `World` and what it is called with."""

cpu = st.integers(0, 3)
steps = st.tuples(st.just("step"), cpu, st.integers(1, 9))
answers = st.tuples(st.just("answer"), cpu)
pauses = st.tuples(st.just("pause"), st.none() | st.sampled_from([0.5, 2.0]))
nudges = st.tuples(st.just("nudge"), st.lists(st.integers(0, 6), min_size=2, max_size=6))
leaves = st.tuples(st.just("leave"), cpu)
cancels = st.tuples(st.just("cancel"), cpu)
times = st.tuples(st.just("advance"), st.sampled_from([0.25, 1.0]))
quiesces = st.tuples(st.just("quiesced"), cpu)
slow = st.tuples(st.just("slow"), st.lists(st.sampled_from(["now", "late"]), max_size=3))
interrupts = st.tuples(st.just("interrupt"), cpu, st.integers(32, 255))
lates = st.tuples(
    st.just("manner"), cpu, st.lists(st.sampled_from(["now", "late"]), min_size=1, max_size=4)
)
failing = st.one_of(
    st.tuples(st.just("manner"), cpu, st.just(["fail"])),
    st.tuples(st.just("manner"), cpu, st.just(["fail late"])),
    st.tuples(st.just("slow"), st.just(["now", "fail"])),
    st.tuples(st.just("abandon"), cpu),
)
CALM = (steps, steps, answers, pauses, nudges, leaves, cancels, times)
CALM += (quiesces, slow, interrupts, lates)


@st.composite
def episodes(draw: st.DrawFn, fails: bool) -> list[Action]:
    """The guest gets somewhere, somebody pauses it, and things happen."""
    episode: list[Action] = draw(st.lists(st.one_of(steps, steps, lates, slow), max_size=4))
    episode.append(draw(nudges))
    episode.append(draw(pauses))
    kinds = (*CALM, failing) if fails else CALM
    return episode + draw(st.lists(st.one_of(*kinds), max_size=6))


def _flat(several: Iterable[list[Action]]) -> list[Action]:
    return [action for episode in several for action in episode]


def schedules(fails: bool = False) -> st.SearchStrategy[list[Action]]:
    """Some episodes, one after another; then the machine may be stopped, and paused again."""
    stop: Action = ("halt",)
    ends = st.sampled_from([[], [stop], [stop, ("pause", None)]])
    several = st.lists(episodes(fails), min_size=1, max_size=4)
    return st.tuples(several.map(_flat), ends).map(_flat)


def cases(fails: bool = False) -> st.SearchStrategy[dict[str, Any]]:
    """All that `played` needs."""
    return st.fixed_dictionaries(
        {
            "several": st.lists(programs(4), min_size=1, max_size=3),
            "host": hosts(),
            "believes": beliefs(),
            "schedule": schedules(fails),
        }
    )


async def play(world: World, nursery: trio.Nursery, action: Action) -> None:
    """One action of a schedule."""
    verb, *rest = action
    if verb == "pause":
        if len([pauser for pauser in world.pausers if not pauser.done]) < 3:
            await world.pause(nursery, *rest)
    elif verb == "nudge":
        world.nudges[:] = rest[0]
    elif verb == "slow":
        world.quiesce_manner.extend(rest[0])
    else:
        await getattr(world, verb)(*rest)


def played(
    code: Production,
    several: Sequence[Sequence[Op]],
    host: Host,
    believes: Believes,
    schedule: Sequence[Action],
) -> World:
    """Play a schedule, then let all come to its end and compare it with undisturbed runs."""

    async def script(world: World, nursery: trio.Nursery) -> None:
        for action in schedule:
            await play(world, nursery, action)
        world.nudges.clear()
        await world.finish()
        await world.stop()
        while not all(one.ended for one in world.cpus):
            await trio.lowlevel.checkpoint()

    return lived(code, several, host, believes, script)
