"""Clones of a running machine: one, or many at the cost of one standstill.

While the machine stands still, its state is saved and its RAM is forked, once. All clones continue
from that: they share this RAM until they write to it. Their VMs are built side by side in threads,
because most of what building takes is waiting for the kernel's grace periods.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import trio

from avmm.bus.space import Placement
from avmm.config import HostSettings
from avmm.errors import AvmmError
from avmm.failures import gathered
from avmm.memory.ram import GuestMemory
from avmm.parts import Origin, Parts, build, description, dismantle
from avmm.parts.description import Described
from avmm.parts.placing import Unplaced
from avmm.parts.saving import saved
from avmm.running import Inside
from avmm.runstate import Life
from avmm.threads import in_thread, in_thread_shielded
from avmm.vcpu.calls import CallHandler

_AT_ONCE: Final = 32
"""How many clones are built at the same time. So there are threads left for other machines, which
may stand still meanwhile (`avmm.threads.MOST`).
"""


@dataclass(frozen=True)
class Fork:
    """What one clone of `Machine.fork_many` has for itself.

    `devices` and `calls` are as for `Machine`. `settings` of the host's side come before those
    that all clones have.
    """

    devices: Sequence[Placement | Unplaced] = ()
    calls: CallHandler | None = None
    settings: HostSettings = field(default_factory=HostSettings)


async def clones(
    inside: Inside, life: Life, name: str, forks: Sequence[Fork], deadline: float | None
) -> list[tuple[Parts, Life]]:
    """Build machines that continue from where this one is, one for each of `forks`. `name` is the
    operation's, for errors. The caller must run the parts, or dismantle them.

    Raises what `Machine.clone` raises. Nothing is left behind then.
    """
    built: dict[int, tuple[Parts, Life]] = {}
    async with AsyncExitStack() as stack:
        described, state, memories = await _copied(inside, life, name, forks, deadline, stack)
        room = trio.CapacityLimiter(_AT_ONCE)

        async def one(index: int, fork: Fork, described: Described, memory: GuestMemory) -> None:
            async with room:
                own = Life()
                # A device may keep what it was given of the state.
                its = state if len(forks) == 1 else await in_thread(copy.deepcopy, state)
                origin = Origin(its, lambda layout: memory, described)
                parts = await build(described.config, fork.devices, own.end, fork.calls, origin)
                built[index] = parts, own
                stack.push_async_callback(dismantle, parts)

        async with gathered("several clones cannot be made") as builds:
            for index, each in enumerate(zip(forks, described, memories, strict=True)):
                builds.start(partial(one, index, *each))
        stack.pop_all()  # memory and parts are the caller's now
    return [built[index] for index in range(len(forks))]


async def _copied(
    inside: Inside,
    life: Life,
    name: str,
    forks: Sequence[Fork],
    deadline: float | None,
    stack: AsyncExitStack,
) -> tuple[list[Described], dict[str, Any], list[GuestMemory]]:
    """The description of each clone, the machine's state, and forks of its RAM, which `stack`
    closes.
    """
    parts = inside.parts
    with inside.operation(name, life):
        told = await in_thread(parts.describe)
        described = []
        for fork in forks:
            described.append(description.read(told, fork.settings, own_addresses=True))
            await trio.lowlevel.checkpoint()
        async with inside.coordinator.paused(deadline):
            life.demand_meanwhile(name)
            state = await saved(parts)
            memories = [await _forked(parts.memory, stack)]
            life.demand_meanwhile(name)  # it may have been stopped meanwhile
        # Nothing runs in the first fork yet, so the others can be made of it.
        while len(memories) < len(forks):
            memories.append(await _forked(memories[0], stack))
        return described, state, memories


async def _forked(memory: GuestMemory, stack: AsyncExitStack) -> GuestMemory:
    """A fork of RAM, which `stack` closes. Call it while nothing writes to RAM."""

    def fork() -> GuestMemory:
        try:
            return memory.fork()
        except OSError as error:
            why = f"the host has no room for its RAM: {error.strerror or error!r}"
        except ValueError:  # RAM's views are released
            why = "it has ended"
        raise AvmmError(f"the machine cannot be cloned: {why}")

    forked = await in_thread(fork)
    stack.push_async_callback(in_thread_shielded, forked.close)
    return forked


@asynccontextmanager
async def together(machines: Sequence[AbstractAsyncContextManager[object]]) -> AsyncIterator[None]:
    """Enter all of these while the block is run, each in a task of its own, so that they are left
    at the same time.

    If one fails, the block and the others are cancelled. Raises what they and the block raise, as
    `raise_together` does.
    """
    inside, entered, leave = 0, trio.Event(), trio.Event()

    async def live(machine: AbstractAsyncContextManager[object]) -> None:
        nonlocal inside
        async with machine:
            inside += 1
            if inside == len(machines):
                entered.set()
            await leave.wait()
        if not leave.is_set():  # it has ended by itself, and would end its own block, too
            lives.cancel()

    async with gathered("clones and their block have failed") as lives:
        for machine in machines:
            lives.start(partial(live, machine))
        await entered.wait()
        try:
            yield
        finally:
            leave.set()
