"""The side that the guest comes to: takes RAM and state in, up to the moment at which it may run.

Whatever fails before COMMIT has come whole leaves nothing behind here, and the source is told why.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from avmm.errors import ConfigError, PeerAbortedError, ProtocolError
from avmm.memory.pages import unpack
from avmm.parts import dismantle
from avmm.parts.saving import load
from avmm.plain import ANYTHING, Fields
from avmm.threads import in_thread
from avmm.transfer.connection import Connection
from avmm.transfer.frames import Buffer, MessageKind
from avmm.transfer.protocol import (
    Commit,
    Destination,
    DestinationState,
    Event,
    Offer,
    Pages,
    Round,
    State,
)

if TYPE_CHECKING:
    from avmm.machine import Machine
    from avmm.parts import Parts


logger = logging.getLogger(__name__)

_COMMIT_SECONDS: Final = 20.0
"""As long may COMMIT take: a source that hears nothing any more wants back what is held here."""
_LONG: Final = (MessageKind.OFFER, MessageKind.STATE_END)
"""What is decoded, in a thread. All else is taken at once. To put a MiB of pages into RAM takes
some tenths of a millisecond; the way to a thread and back, for each frame, would add to that."""
_ABORT_SECONDS: Final = 0.2
"""How long an ABORT that has left may be on its way."""


class _Offer(Fields):
    """What OFFER tells; read by `avmm.parts`."""

    description = ANYTHING
    cpus = ANYTHING


class Receiver:
    """One guest, over one stream. `make` makes its machine of a description and its CPUs'
    needs."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        stall_seconds: float,
        make: Callable[[object, object], Machine],
        on_round: Callable[[int], object],
    ) -> None:
        self._side = Destination()
        self._connection = Connection(stream, self._side, stall_seconds)
        self._make = make
        self._on_round = on_round
        self._machine: Machine | None = None
        self._parts: Parts | None = None
        self._has_acquired = False

    async def receive(self) -> Machine:
        """The machine, to be entered: the guest may run. Raises as `avmm.receive`."""
        try:
            await self._until_commit()
        except BaseException as error:
            if self._parts is not None:
                await self._let_go(self._parts)
            if not isinstance(error, PeerAbortedError):
                await self._connection.give_up(_told(error))
            raise
        assert self._machine is not None
        return self._machine

    async def _let_go(self, parts: Parts) -> None:
        """Of what was acquired, too: devices of the caller's are not closed with the machine."""
        try:
            if self._has_acquired:
                with trio.CancelScope(shield=True):
                    await parts.release()
        except OSError as error:
            logger.error("what the guest has of this host cannot be let go of: %s", error)
        finally:
            await dismantle(parts)

    async def confirm(self) -> None:
        """Tell the source that the guest runs here. That it cannot be told is no failure here: it
        keeps the guest stopped. Cannot be cancelled, but for a line that stands still."""
        with trio.CancelScope(shield=True):
            await self._connection.say(self._side.running())

    async def _until_commit(self) -> None:
        while True:
            due = self._side.due
            if due is None:
                is_ready = self._side.state is DestinationState.READY
                await self._connection.hear(_COMMIT_SECONDS if is_ready else math.inf)
                continue
            if due is MessageKind.PAGES:
                self._take()
                await trio.lowlevel.checkpoint()  # more of them may have come
                continue
            event, answer = await in_thread(self._take) if due in _LONG else self._take()
            if answer:
                await self._connection.say(answer)
            if isinstance(event, Offer):
                self._parts = await self._prepared(event.description)
                await self._connection.say(self._side.accept())
            elif isinstance(event, Round):
                self._on_round(event.number)
            elif isinstance(event, State):
                assert self._parts is not None
                await load(self._parts, event.state)
                await self._acquire(self._parts)
                self._has_acquired = True
                await self._connection.say(self._side.ready())
            elif isinstance(event, Commit):
                return

    async def _acquire(self, parts: Parts) -> None:
        try:
            await parts.acquire()
        except ConfigError:
            # A source that has given up says so, or cuts the line, and holds everything again.
            await self._connection.watch(_ABORT_SECONDS)
            raise

    def _take(self) -> tuple[Event | None, list[Buffer]]:
        """What the frame that is due says, and what to answer; pages are put into RAM."""
        taken = self._side.next()
        assert taken is not None
        event, answer = taken
        if isinstance(event, Pages):
            self._unpack(event)
            return None, answer
        return event, answer

    async def _prepared(self, told: object) -> Parts:
        offer = _Offer.read("the offer", told)
        self._machine = self._make(offer.description, offer.cpus)
        return await self._machine.prepare()

    def _unpack(self, pages: Pages) -> None:
        assert self._parts is not None
        packed, memory = pages.packed, self._parts.memory
        if not unpack(memory.whole, memory.fd, packed.runs, packed.data):
            raise ProtocolError("PAGES tells of pages that are not RAM, or not there")


def _told(error: BaseException) -> str:
    if isinstance(error, trio.Cancelled):
        return "the destination was stopped"
    return f"{type(error).__name__}: {error}"
