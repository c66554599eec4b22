"""A guest that a pause catches while its hypercall waits for an answer."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import trio

from avmm import Call
from support.guest import machine

ANSWER = 42


class HeldCalls:
    """The handler of a guest's hypercalls. It answers when it may."""

    def __init__(self) -> None:
        self.seen: list[Call] = []
        self.asked, self.go_on = trio.Event(), trio.Event()

    def __call__(self, call: Call) -> Awaitable[int]:
        return self._answer(call)

    async def _answer(self, call: Call) -> int:
        self.seen.append(call)
        self.asked.set()
        await self.go_on.wait()
        return ANSWER


async def caught(calls: HeldCalls, tmp_path: Path, code: str, **config: Any) -> dict[str, Any]:
    """The state of a guest that was asked to pause before its hypercall was answered."""
    states = []
    async with machine(tmp_path, code, calls=calls, **config) as vm:
        await calls.asked.wait()
        async with trio.open_nursery() as nursery:

            async def pause() -> None:
                async with vm.paused(deadline=20):
                    states.append(vm.save())

            nursery.start_soon(pause)
            while not vm._inside.parts.group._lot.asked:
                await trio.lowlevel.checkpoint()
            calls.go_on.set()
    return states[0]
