"""The side that the guest comes to: takes RAM and state in, up to the moment at which it may run.

Whatever fails before COMMIT has come whole leaves nothing behind here, and the source is told why.
What there is to be let go of, the protocol's `DestinationState` tells.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from avmm.errors import ConfigError, PeerAbortedError, ProtocolError
from avmm.memory.pages import unpack
from avmm.parts import dismantle
from avmm.parts.saving import load
from avmm.plain import ANYTHING, Fields
from avmm.sides import in_trio
from avmm.threads import in_thread
from avmm.transfer.connection import Connection
from avmm.transfer.frames import MessageKind
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
    from avmm.parts import Parts


logger = logging.getLogger(__name__)

_COMMIT_SECONDS: Final = 20.0
"""How long COMMIT may take. A source that hears nothing more wants back what is held here."""
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
    """One guest, over one stream. `make` builds its parts, in standby, out of a description and
    its CPUs' needs."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        stall_seconds: float,
        make: Callable[[object, object], Awaitable[Parts]],
        on_round: Callable[[int], object],
    ) -> None:
        self._side = Destination()
        self._connection = Connection(stream, self._side, stall_seconds)
        self._make = make
        self._on_round = on_round

    @in_trio
    async def receive(self) -> Parts:
        """The guest's parts: it may run, and nowhere else. Raises as `avmm.receive`."""
        try:
            offer = _Offer.read("the offer", await self._offered())
            parts = await self._make(offer.description, offer.cpus)
            try:
                await self._fill(parts)
            except BaseException:
                self._side.give_up()
                await self._let_go(parts)
                raise
        except BaseException as error:
            self._side.give_up()
            if not isinstance(error, PeerAbortedError):
                await self._connection.give_up(_told(error))
            raise
        return parts

    async def _let_go(self, parts: Parts) -> None:
        """Of what was acquired, too: devices of the caller's are not closed with the machine."""
        with trio.CancelScope(shield=True):
            try:
                if self._side.state is DestinationState.LETTING_GO:
                    await parts.release()
            except OSError as error:
                logger.error("what the guest has of this host cannot be let go of: %s", error)
            finally:
                if self._side.state is DestinationState.LETTING_GO:
                    self._side.let_go()
                await dismantle(parts)

    @in_trio
    async def confirm(self) -> None:
        """Tell the source that the guest runs here. That it cannot be told is no failure here: it
        keeps the guest stopped. Cannot be cancelled, but for a line that stands still."""
        with trio.CancelScope(shield=True):
            await self._connection.say(self._side.running())

    async def _next(self) -> Event:
        """What the source says next, after what there is to be answered at once."""
        while True:
            due = self._side.due
            if due is None:
                is_ready = self._side.state is DestinationState.READY
                await self._connection.hear(_COMMIT_SECONDS if is_ready else math.inf)
                continue
            taken = await in_thread(self._side.next) if due in _LONG else self._side.next()
            assert taken is not None
            event, answer = taken
            if answer:
                await self._connection.say(answer)
            if event is not None:
                return event

    async def _offered(self) -> object:
        event = await self._next()
        if not isinstance(event, Offer):
            raise ProtocolError(f"{event} came before OFFER")
        return event.description

    async def _fill(self, parts: Parts) -> None:
        """Until COMMIT."""
        await self._connection.say(self._side.accept())
        while not isinstance(event := await self._next(), Commit):
            if isinstance(event, Pages):
                self._unpack(event, parts)
                await trio.lowlevel.checkpoint()  # more of them may have come
            elif isinstance(event, Round):
                self._on_round(event.number)
            elif isinstance(event, State):
                await load(parts, event.state)
                await self._acquire(parts)
                self._side.acquire()
                await self._connection.say(self._side.ready())

    async def _acquire(self, parts: Parts) -> None:
        try:
            await parts.acquire()
        except ConfigError:
            # A source that has given up says so, or cuts the line, and holds everything again.
            await self._connection.watch(_ABORT_SECONDS)
            raise

    def _unpack(self, pages: Pages, parts: Parts) -> None:
        packed, memory = pages.packed, parts.memory
        if not unpack(memory.whole, memory.fd, packed.runs, packed.data):
            raise ProtocolError("PAGES tells of pages that are not RAM, or not there")


def _told(error: BaseException) -> str:
    if isinstance(error, trio.Cancelled):
        return "the destination was stopped"
    return f"{type(error).__name__}: {error}"
