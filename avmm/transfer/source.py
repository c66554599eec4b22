"""The source: copies RAM while the guest runs, stops the guest, and hands it over.

At most one side ever runs the guest. Before COMMIT is begun, everything is undone after a failure,
a timeout or a cancellation, at whatever byte: the guest runs on as if nothing had been asked. From
then on this cannot be cancelled, and is undone only if the destination says that it has given up.
The source waits `answer_seconds` for RUNNING. If that does not come, the guest stays stopped,
`HandOverUnknownError` is raised, and somebody has to decide.

The protocol's `SourceState` says what has to be undone, and whether that is possible. It also
covers the standstill and what was released.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from avmm.ctrl_c import protected, undisturbed
from avmm.errors import ConfigError, HandOverUnknownError, MigrationError, PeerAbortedError
from avmm.memory.pages import PAGE, Bitmap, Packed, Packer
from avmm.parts.saving import saved
from avmm.plain import encode
from avmm.progress import MigrationProgress, Report
from avmm.sides import in_trio
from avmm.threads import in_thread
from avmm.transfer.connection import Connection
from avmm.transfer.frames import MOST_DATA_PAGES, MOST_RUNS
from avmm.transfer.pace import Pace
from avmm.transfer.protocol import Source
from avmm.transfer.states import SourceState

if TYPE_CHECKING:
    from avmm.memory.dirty import DirtyLog
    from avmm.migration import Coordinator
    from avmm.parts import Parts
    from avmm.runstate import Life

logger = logging.getLogger(__name__)

_TAKE_BACK_SECONDS: Final = 5.0
"""How long a destination that has died may take to let go of a disk."""
_TAKE_BACK_STEP: Final = 0.05
_GIVEN_UP: Final = (SourceState.ABORTED, SourceState.TAKING_BACK)
_FRAME_SECONDS: Final = 1.0
"""How long a frame of pages takes at most if there is a bandwidth. To the destination, a line on
which nothing comes is dead."""
_LIFE_SECONDS: Final = 5.0
"""How often the source shows that it lives, while it has nothing to send."""
_NO_PAGES: Final = Packed(memoryview(b""), memoryview(b""))
_SAMPLE_SECONDS: Final = 0.1
"""How often progress is reported within a round."""


@dataclass(frozen=True)
class Options:
    """How to migrate; see `avmm.Machine.migrate`."""

    target_downtime: float = 0.1
    bandwidth: float | None = None
    deadline: float | None = None
    stall_seconds: float = 30.0
    answer_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("target_downtime", "stall_seconds", "answer_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} {getattr(self, name)!r}: expected seconds, above 0")
        if self.bandwidth is not None and not self.bandwidth >= PAGE:
            raise ConfigError(f"bandwidth {self.bandwidth!r}: expected {PAGE} bytes/s or more")


class Sender:
    """One migration of one machine. `nursery` is the machine's, and `life` has its state."""

    def __init__(
        self,
        parts: Parts,
        coordinator: Coordinator,
        stream: trio.abc.Stream,
        options: Options,
        nursery: trio.Nursery,
        life: Life,
        on_progress: Callable[[MigrationProgress], object],
    ) -> None:
        self._parts = parts
        self._coordinator = coordinator
        self._options = options
        self._nursery = nursery
        self._life = life
        self._on_progress = on_progress
        self._source = Source(secrets.token_bytes(16))
        self._connection = Connection(stream, self._source, options.stall_seconds)
        self._pace = Pace(options.target_downtime, options.bandwidth)
        self._packer = Packer(parts.memory.whole, _frame_pages(options.bandwidth), MOST_RUNS)
        self._round = 0

    @property
    def state(self) -> SourceState:
        """Where the guest is. After `send` has returned or raised: DONE, ABORTED or UNKNOWN."""
        return self._source.state

    @in_trio
    async def send(self) -> Report:
        """Hand the guest over. When this returns, the guest runs at the destination and never
        again here.

        Raises `MigrationError` if that is not possible (the guest runs on here), `RunstateError`
        if the guest ends before, and `HandOverUnknownError` if nobody knows whether it was handed
        over (the guest stays paused).
        """
        begin = trio.current_time()
        try:
            await self._agree()
            async with self._parts.dirty_log() as log:
                left = await in_thread(self._parts.memory.populated)
                await self._copy_live(log, left)
                stopped = trio.current_time()  # about: some vCPUs may stand still a little earlier
                async with AsyncExitStack() as stack:
                    async with self._showing_life():  # a device may take long to finish
                        still = self._coordinator.paused(self._options.deadline)
                        await stack.enter_async_context(still)
                    self._source.stand_still()
                    await in_thread(log.collect, left)
                    await self._copy(left, stopped)
                    await self._hand_over()
                    arrived = trio.current_time()
        except BaseException as error:
            await self._give_up(error)
            raise
        return Report(
            arrived - stopped, trio.current_time() - begin, self._connection.sent, self._round
        )

    async def _agree(self) -> None:
        await self._connection.say(self._source.hello())
        await self._until(SourceState.AGREED)
        offer = await in_thread(self._offer)
        await self._connection.say(self._source.offer(offer))
        await self._until(SourceState.COPYING)

    def _offer(self) -> bytes:
        return encode({"description": self._parts.describe(), "cpus": self._parts.needs})

    async def _until(self, state: SourceState) -> None:
        while self._source.state is not state:
            if not self._source.next():
                await self._connection.hear()

    async def _copy_live(self, log: DirtyLog, left: Bitmap) -> None:
        """Send rounds until the rest can go over within the target downtime."""
        throttling = trio.CancelScope()
        self._nursery.start_soon(self._throttle, throttling)
        try:
            while True:
                start, sent = trio.current_time(), self._connection.sent
                await self._copy(left, start)
                await in_thread(log.collect, left)
                sent = self._connection.sent - sent
                if self._pace.round_ended(sent, trio.current_time() - start, len(left)):
                    return
        finally:
            throttling.cancel()

    @protected
    async def _throttle(self, scope: trio.CancelScope) -> None:
        with scope:
            await self._coordinator.throttle(lambda: self._pace.throttle)

    @asynccontextmanager
    async def _showing_life(self) -> AsyncIterator[None]:
        """Send a frame without pages now and then inside the block, in which nothing else is
        sent."""
        scope, over = trio.CancelScope(), trio.Event()
        failures: list[Exception] = []
        self._nursery.start_soon(self._show_life, scope, over, failures)
        try:
            yield
        finally:
            scope.cancel()
            await undisturbed(over.wait)  # the next frame must not come into the midst of that one
        if failures:  # the other side has given up, perhaps, and has said why
            raise failures[0]

    @protected
    async def _show_life(
        self, scope: trio.CancelScope, over: trio.Event, failures: list[Exception]
    ) -> None:
        try:
            with scope:
                while True:
                    await trio.sleep(_LIFE_SECONDS)
                    with trio.CancelScope(shield=True):
                        await self._connection.say(self._source.pages(_NO_PAGES))
        except Exception as error:  # of any type, because a stream may raise anything
            failures.append(error)
        finally:
            over.set()

    async def _copy(self, left: Bitmap, start: float) -> None:
        """Send one round: the pages in `left`, which is empty then."""
        self._round += 1
        self._packer.rewind()
        total, first, told = len(left), self._connection.sent, start
        self._tell(0, total)
        next_pages = partial(self._packer.next, left, skip_zeros=self._round == 1)
        while (packed := await in_thread(next_pages)) is not None:
            self._life.demand_meanwhile("migrate")
            await self._connection.say(self._source.pages(packed))
            now = trio.current_time()
            if delay := self._pace.delay(self._connection.sent - first, now - start):
                await trio.sleep(delay)
            if now - told > _SAMPLE_SECONDS:
                told = now
                self._tell(total - len(left), len(left))
        self._life.demand_meanwhile("migrate")
        await self._connection.say(self._source.round(self._round))

    def _tell(self, sent: int, left: int) -> None:
        pace = self._pace
        self._on_progress(
            MigrationProgress(
                self._round,
                sent,
                left,
                pace.rate,
                pace.dirty_rate,
                pace.expected_downtime(left),
                pace.throttle,
                self._connection.sent,
            )
        )

    async def _hand_over(self) -> None:
        """Do everything after the guest has come to a standstill."""
        try:
            self._source.release()
            async with self._showing_life():
                await self._let_go()
                # Saved only now: output that somebody receives from a console later would come
                # twice.
                state = await saved(self._parts)
            for frame in self._source.stated(await in_thread(encode, state)):
                await self._connection.say(frame)
            await self._until(SourceState.READY)
            await trio.lowlevel.checkpoint_if_cancelled()
            self._life.hand_over()
        except BaseException as error:
            await self._give_up(error)
            raise
        await undisturbed(self._commit)

    async def _give_up(self, error: BaseException) -> None:
        """Undo what has to be undone, if that is still possible."""
        self._source.give_up()
        # Tell the destination first: if it is ready, it holds what has to be taken back here.
        try:
            if self.state in _GIVEN_UP and not isinstance(error, PeerAbortedError):
                await self._connection.give_up(_told(error))
        finally:
            if self.state is SourceState.TAKING_BACK:
                await self._take_back()

    async def _let_go(self) -> None:
        try:
            await self._parts.release()
        except OSError as error:
            raise MigrationError(
                "the guest's disks, interfaces or sockets on this host cannot be released: "
                f"{error.strerror or error}"
            ) from error

    async def _take_back(self) -> None:
        """Take back what was released, because the guest must not run on here without it."""
        try:
            await undisturbed(self._acquire_again)
            self._source.take_back()
        except Exception as error:  # of any type, because a user's device may raise anything
            why = str(error) or repr(error)
            raise HandOverUnknownError(
                f"the guest was not handed over, but it stays stopped: {why}"
            ) from error
        finally:
            if self.state is SourceState.TAKING_BACK:
                self._keep_stopped()

    def _keep_stopped(self) -> None:
        self._source.lose()
        self._coordinator.retain()

    async def _acquire_again(self) -> None:
        give_up = trio.current_time() + _TAKE_BACK_SECONDS
        while True:
            try:
                await self._parts.acquire()
            except ConfigError:
                if trio.current_time() >= give_up:
                    raise
                await trio.sleep(_TAKE_BACK_STEP)
            else:
                return

    async def _commit(self) -> None:
        why = f"no answer came for {self._options.answer_seconds} s"
        given_up: list[PeerAbortedError] = []
        try:
            with trio.move_on_after(self._options.answer_seconds):
                await self._connection.say(self._source.commit())
                await self._until(SourceState.DONE)
        except PeerAbortedError as error:  # the destination has not run the guest and never will
            given_up.append(error)
        except Exception as error:  # a stream may raise anything, and COMMIT may have left
            why = str(error) or repr(error)
        finally:  # also if the program is interrupted
            if self.state is SourceState.DONE:
                self._coordinator.forsake()
            elif self.state is SourceState.TAKING_BACK:
                await self._take_back()
            else:
                self._keep_stopped()
        if self.state is SourceState.ABORTED:
            raise given_up[0]
        if self.state is SourceState.UNKNOWN:
            raise HandOverUnknownError(
                f"COMMIT was sent, then {why}: the guest runs at the destination, or nowhere. It "
                "stays stopped here. Look whether it runs there. If it does, end it here: "
                "settle(runs_here=False). Only if you are sure that it does not run there and "
                "never will, let it run on here: settle(runs_here=True)"
            )


def _told(error: BaseException) -> str:
    """The reason that the other side is given."""
    if isinstance(error, trio.Cancelled):
        return "the migration was cancelled"
    return f"{type(error).__name__}: {error}"


def _frame_pages(bandwidth: float | None) -> int:
    """How many pages a frame holds at most."""
    if bandwidth is None:
        return MOST_DATA_PAGES
    return max(1, int(min(MOST_DATA_PAGES, bandwidth * _FRAME_SECONDS / PAGE)))
