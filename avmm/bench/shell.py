"""The bundled shell as the guest of measurements: types on its console and reads the answer."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from typing import Final

import trio

from avmm.errors import AvmmError
from avmm.machine import Machine

PROMPT: Final = b"avmm> "
_BURN_MOST: Final = 4000
"""MiB per second: more than it can do, so that it writes as fast as possible."""
_TRIES: Final = 30


async def read_until(console: trio.abc.ReceiveStream, mark: bytes) -> bytes:
    """What the guest prints, up to the first `mark` and perhaps some more. Raises `AvmmError` if
    the guest ends first.
    """
    said = b""
    while mark not in said:
        more = await console.receive_some()
        if not more:
            raise AvmmError(f"the guest has ended; expected {mark!r} after {said[-200:]!r}")
        said += more
    return said


async def idle(stack: AsyncExitStack) -> None:
    """Start a guest that waits at its prompt until `stack` is closed."""
    vm = await stack.enter_async_context(Machine(memory=16 << 20))
    await read_until(vm.console, PROMPT)


async def ask(console: trio.abc.Stream, line: bytes) -> str:
    """Type a line. Returns what is printed up to the next prompt."""
    await console.send_all(line)
    return (await read_until(console, PROMPT)).decode(errors="replace")


async def fill(console: trio.abc.Stream, memory: int) -> None:
    """Call this first after the guest's start: it has the guest write to every page of its RAM, so
    that none is zero.
    """
    await read_until(console, PROMPT)
    said = ""
    for _ in range(_TRIES):
        said = await ask(console, b"burn %d 1\r" % _BURN_MOST)
        match = re.search(r"wrote to \d+ pages, (\d+) MiB", said)
        # All pages in one go: the first write to a page may be slow, and the guest's timer may not
        # tick yet.
        if match is not None and int(match[1]) >= memory >> 20:
            return
    raise AvmmError(f"the guest did not write to all of its memory: {said!r}")


async def begin_dirtying(console: trio.abc.Stream, rate: int) -> None:
    """Have the guest write to `rate` MiB of pages per second, until a key is pressed."""
    await console.send_all(b"burn %d\r" % rate)
    await read_until(console, b"any key stops\r\n")
