"""The side that the guest comes to: takes RAM and state in, up to the moment at which it may run.

Whatever fails before COMMIT has come whole leaves nothing behind here, and the source is told why.
What there is to be let go of, the protocol's `DestinationState` tells.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from avmm.errors import PeerAbortedError, ProtocolError, StateError
from avmm.memory.pages import unpack
from avmm.parts.building import dismantle
from avmm.sides import in_trio
from avmm.transfer.line import Line
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
    from avmm.parts.machine_parts import Parts


logger = logging.getLogger(__name__)

_COMMIT_SECONDS: Final = 20.0
"""COMMIT may take so long: a source that hears nothing any more wants back what is held here."""


class Receiver:
    """One guest, over one stream. `make` builds its parts, in standby, out of a description and
    its CPUs' needs."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        stall_seconds: float,
        make: Callable[[Any, Any], Awaitable[Parts]],
        on_round: Callable[[int], object],
    ) -> None:
        self._side = Destination()
        self._line = Line(stream, self._side, stall_seconds)
        self._make = make
        self._on_round = on_round

    @in_trio
    async def receive(self) -> Parts:
        """The guest's parts: it may run, and nowhere else. Raises as `avmm.receive`."""
        try:
            offer = await self._offered()
            if type(offer) is not dict or set(offer) != {"description", "cpus"}:
                raise StateError("an offer is a description of a machine and of its CPUs")
            parts = await self._make(offer["description"], offer["cpus"])
            try:
                await self._fill(parts)
            except BaseException:
                self._side.give_up()
                await self._let_go(parts)
                raise
        except BaseException as error:
            self._side.give_up()
            if not isinstance(error, PeerAbortedError):
                await self._line.give_up(_told(error))
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
            await self._line.say(self._side.running())

    async def _next(self) -> Event:
        """What the source says next, after what there is to be answered at once."""
        while True:
            taken = self._side.next()
            if taken is None:
                is_ready = self._side.state is DestinationState.READY
                await self._line.hear(_COMMIT_SECONDS if is_ready else math.inf)
                continue
            event, answer = taken
            if answer:
                await self._line.say(answer)
            if event is not None:
                return event

    async def _offered(self) -> Any:
        event = await self._next()
        if not isinstance(event, Offer):
            raise ProtocolError(f"{event} came before OFFER")
        return event.description

    async def _fill(self, parts: Parts) -> None:
        """Until COMMIT."""
        await self._line.say(self._side.accept())
        while not isinstance(event := await self._next(), Commit):
            if isinstance(event, Pages):
                self._unpack(event, parts)
            elif isinstance(event, Round):
                self._on_round(event.number)
            elif isinstance(event, State):
                parts.load(event.state)
                await parts.acquire()
                self._side.acquire()
                await self._line.say(self._side.ready())

    def _unpack(self, pages: Pages, parts: Parts) -> None:
        packed, memory = pages.packed, parts.memory
        if not unpack(memory.whole, memory.fd, packed.runs, packed.data):
            raise ProtocolError("PAGES tells of pages that are not RAM, or not there")


def _told(error: BaseException) -> str:
    if isinstance(error, trio.Cancelled):
        return "the destination was stopped"
    return f"{type(error).__name__}: {error}"
