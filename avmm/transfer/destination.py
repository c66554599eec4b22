"""The destination: receives RAM and state, up to the moment at which the guest may run.

If anything fails before all of COMMIT has come, nothing is left behind here, and the source is
told why. The protocol's `DestinationState` says what has to be released.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from avmm.ctrl_c import undisturbed
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
    Event,
    Offer,
    Pages,
    Round,
    State,
)
from avmm.transfer.states import DestinationState

if TYPE_CHECKING:
    from avmm.parts import Parts


logger = logging.getLogger(__name__)

_COMMIT_SECONDS: Final = 20.0
"""How long to wait for COMMIT. A source that has lost the line wants back what is held here."""
_LONG: Final = (MessageKind.OFFER, MessageKind.STATE_END)
"""The messages that are decoded in a thread. All others are decoded at once."""
_ABORT_SECONDS: Final = 0.2
"""How long an ABORT that has left may take to arrive."""


class _Offer(Fields):
    """The contents of OFFER. `avmm.parts` reads the fields."""

    description = ANYTHING
    cpus = ANYTHING


class Receiver:
    """Receives one guest over one stream. `make` builds its parts, in standby, from a description
    and the needs of its CPUs."""

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
        """Receive the guest, and return its parts. From then on it may run here, and nowhere else.
        Raises what `avmm.receive` raises."""
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
        """Close the parts, and first release what was acquired, because the caller's own devices
        are not closed with the machine."""
        await undisturbed(self._close, parts)

    async def _close(self, parts: Parts) -> None:
        try:
            if self._side.state is DestinationState.LETTING_GO:
                await parts.release()
        except OSError as error:
            logger.error(
                "the guest's disks, interfaces or sockets on this host cannot be released: %s",
                error,
            )
        finally:
            if self._side.state is DestinationState.LETTING_GO:
                self._side.let_go()
            await dismantle(parts)

    @in_trio
    async def confirm(self) -> None:
        """Tell the source that the guest runs here. Raises what `Connection.say` raises; the guest
        may run all the same, because the source keeps it stopped. This cannot be cancelled, but it
        gives up if the line stands still."""
        await undisturbed(self._connection.say, self._side.running())

    async def _next(self) -> Event:
        """Wait for the next event, and meanwhile send the answers that have to be sent at once."""
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
        """Receive RAM and state, until COMMIT has come."""
        await self._connection.say(self._side.accept())
        while not isinstance(event := await self._next(), Commit):
            if isinstance(event, Pages):
                await in_thread(_unpack, event, parts)  # writing fresh RAM takes milliseconds
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
            # Perhaps the source has given up and holds everything again. Then it says so, or cuts
            # the line.
            await self._connection.watch(_ABORT_SECONDS)
            raise


def _unpack(pages: Pages, parts: Parts) -> None:
    packed, memory = pages.packed, parts.memory
    if not unpack(memory.whole, memory.fd, packed.runs, packed.data):
        raise ProtocolError("PAGES has pages outside of RAM, or does not have their contents")


def _told(error: BaseException) -> str:
    if isinstance(error, trio.Cancelled):
        return "the destination was stopped"
    return f"{type(error).__name__}: {error}"
