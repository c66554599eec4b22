"""The bundled shell as the guest of measurements: types on its console and reads the answer."""

from __future__ import annotations

import re
from typing import Final

import trio

from avmm.errors import AvmmError

PROMPT: Final = b"avmm> "
_BURN_MOST: Final = 4000
"""MiB a second; as fast as it goes."""
_TRIES: Final = 30


async def read_until(console: trio.abc.ReceiveStream, mark: bytes) -> bytes:
    """What the guest prints, to the first `mark`."""
    said = b""
    while mark not in said:
        more = await console.receive_some()
        if not more:
            raise AvmmError(f"the guest has ended, expected {mark!r} after {said[-200:]!r}")
        said += more
    return said


async def ask(console: trio.abc.Stream, line: bytes) -> str:
    """Type a line: what is printed up to the next prompt."""
    await console.send_all(line)
    return (await read_until(console, PROMPT)).decode(errors="replace")


async def fill(console: trio.abc.Stream, memory: int) -> None:
    """From its start on: have the guest write to all of its RAM's pages, so that none is zero."""
    await read_until(console, PROMPT)
    said = ""
    for _ in range(_TRIES):
        said = await ask(console, b"burn %d 1\r" % _BURN_MOST)
        match = re.search(r"wrote to \d+ pages, (\d+) MiB", said)
        # All in one go: pages' first time may be slow. The guest's timer may not tick yet.
        if match is not None and int(match[1]) >= memory >> 20:
            return
    raise AvmmError(f"the guest does not write to all of its memory: {said!r}")


async def begin_dirtying(console: trio.abc.Stream, rate: int) -> None:
    """Have it write to `rate` MiB of pages a second, until a key is pressed."""
    await console.send_all(b"burn %d\r" % rate)
    await read_until(console, b"any key stops\r\n")
