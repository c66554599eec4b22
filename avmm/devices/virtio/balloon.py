"""The memory balloon (VIRTIO 1.2, 5.5): pages that the guest lends back to the host.

    await vm.balloon.set_target(256 << 20)   # returns when the guest has given as much

The guest puts pages into its balloon (inflates it) and they go back to the host at once. When it
takes them out again, they read as zeros. In a clone or a restored guest they read as what was
there when that guest began. With DEFLATE_ON_OOM the guest takes pages back by itself before it
runs out of memory, whatever the target is.

Free pages of the guest need not be in the balloon: its driver reports them, the longest runs
first, and they go back in the same way (5.5.6.7). The guest may find anything in them later.

The guest chooses the page numbers. Numbers that are not RAM are refused; any other mistake harms
only the guest.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

import trio

from avmm.ctrl_c import protected
from avmm.devices.state import DeviceState
from avmm.devices.virtio.device import GuestQueue, VirtioDevice, VirtioLink
from avmm.devices.virtio.port import Waiters
from avmm.devices.virtio.queue import Chain
from avmm.errors import ConfigError, GuestMemoryError
from avmm.memory.pages import PAGE
from avmm.plain import U32

logger = logging.getLogger("avmm.virtio")

F_STATS_VQ: Final = 1 << 1
F_DEFLATE_ON_OOM: Final = 1 << 2
F_PAGE_REPORTING: Final = 1 << 5
_INFLATE = 0
_OPTIONAL: Final = 2
"""The first queue that exists only if its feature was negotiated."""
_AT_ONCE: Final = 32
"""The runs that a driver reports in one chain; Linux's driver has no use for a shorter queue."""
_CONFIG: Final = struct.Struct("<II")
_ACTUAL: Final = 4
_STAT: Final = struct.Struct("<HQ")
_SLICE: Final = 4096
"""How many bytes of page numbers are processed before other tasks get their turn."""
_PIECE: Final = 4 << 20
"""How many bytes are given back before other tasks get their turn: as much as Linux reports in one
run."""
_MOST_STATS: Final = 64
_NAMES: Final = (
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
)
"""The statistics of 5.5.6.4, in the order of their tags; those about memory are in bytes."""


class Balloon(VirtioDevice):
    """A balloon. With `deflate_on_oom` the guest may take pages back before it runs out of memory.
    With `page_reporting` it may report which pages are free."""

    class State(DeviceState, version=1):
        target = U32
        actual = U32

    device_id: ClassVar[int] = 5

    def __init__(self, *, deflate_on_oom: bool = True, page_reporting: bool = True) -> None:
        self.features = F_STATS_VQ
        self.features |= F_DEFLATE_ON_OOM if deflate_on_oom else 0
        self.features |= F_PAGE_REPORTING if page_reporting else 0
        self.queue_sizes = (128, 128, _AT_ONCE, _AT_ONCE) if page_reporting else (128, 128, 16)
        self._target = 0
        self._actual = 0
        self.refused = 0
        """How many pages the guest gave that are not its RAM."""
        self._changed = Waiters()
        self._stats: dict[str, int] = {}
        # Rounds of asking for statistics, by number: the one that somebody waits for, the last one
        # begun, and the last one ended.
        self._stats_wanted = self._stats_asked = self._stats_given = 0
        self._ask = Waiters()

    @property
    def name(self) -> str:
        return "balloon"

    @property
    def config(self) -> bytes:
        return _CONFIG.pack(self._target, self._actual)

    def write_config(self, offset: int, data: bytes) -> None:
        both = bytearray(self.config)
        if offset >= _ACTUAL:
            both[offset : offset + len(data)] = data
            self._actual = _CONFIG.unpack_from(both)[1]
            self._wakeup.set()

    def attach(self, link: VirtioLink) -> None:
        super().attach(link)
        self._wakeup = link.wakeup()

    # -- the host's side -----------------------------------------------------------------------

    @property
    def target(self) -> int:
        """How large the balloon should be, in bytes."""
        return self._target * PAGE

    @property
    def actual(self) -> int:
        """How large the guest says that the balloon is, in bytes."""
        return self._actual * PAGE

    async def set_target(self, size: int) -> None:
        """Ask the guest for a balloon of `size` bytes; returns when it has one, or when another
        size is asked for.

        It waits as long as the guest has no driver, or cannot give that much. Cancelling does not
        change the size that was asked for. Raises `ConfigError` for an impossible size.
        """
        memory = sum(region.size for region in self.link.memory.ram)
        if type(size) is not int or size % PAGE or not 0 <= size <= memory:
            raise ConfigError(
                f"a balloon of {size!r} bytes: expected a multiple of {PAGE} up to {memory}"
            )
        self._target = size // PAGE
        self.link.config_changed()
        self._changed.set()
        await trio.lowlevel.checkpoint()
        while self._target == size // PAGE != self._actual:
            await self._changed.wait()

    async def stats(self) -> dict[str, int]:
        """What the guest reports about its memory, by names like "free_memory" (bytes).

        Waits for the guest's driver. Cancelling changes nothing.
        """
        wanted = self._stats_wanted = self._stats_asked + 1
        self._ask.set()
        await trio.lowlevel.checkpoint()
        while self._stats_given < wanted:
            await self._changed.wait()
        return dict(self._stats)

    # -- queues --------------------------------------------------------------------------------

    @protected
    async def run(self) -> None:
        """Wake the tasks that wait: the guest has reported a new size."""
        while True:
            await self._wakeup.wait()
            self._changed.set()

    async def serve(self, queues: Mapping[int, GuestQueue], features: int) -> None:
        # 5.5.2 numbers all possible queues. Linux numbers only those whose features it accepted.
        optional = [(F_STATS_VQ, self._serve_stats), (F_PAGE_REPORTING, self._serve_reports)]
        by_index = dict(enumerate((serve for bit, serve in optional if features & bit), _OPTIONAL))
        async with trio.open_nursery() as nursery:
            for index, queue in queues.items():
                nursery.start_soon(by_index.get(index, self.serve_queue), queue)

    @protected
    async def serve_queue(self, queue: GuestQueue) -> None:
        while True:
            chain = await queue.next()
            if queue.index == _INFLATE:
                await self._inflate(chain)
            queue.push(chain)  # pages that are taken out come back when the guest touches them

    async def _serve_reports(self, queue: GuestQueue) -> None:
        """Give reported pages back. The guest does not use them until its report is returned."""
        while True:
            chain = await queue.next()
            for part in chain.writable:
                for at in range(0, len(part), _PIECE):
                    self.link.memory.discard_view(part[at : at + _PIECE])
                    await queue.let_others_run()
            queue.push(chain)

    async def _inflate(self, chain: Chain) -> None:
        """Give back the pages that the guest puts into its balloon. After a pause this begins
        again with the whole chain; giving a page back twice does no harm."""
        while data := chain.take(_SLICE):
            for first, count in _runs(data):
                self._give_back(first, count)
            if chain.readable:
                await trio.lowlevel.checkpoint()

    def _give_back(self, first: int, count: int) -> None:
        try:
            self.link.memory.discard(first * PAGE, count * PAGE)
        except GuestMemoryError:
            if count > 1:  # some of them may be
                for page in range(first, first + count):
                    self._give_back(page, 1)
                return
            if not self.refused:
                logger.warning("balloon: the guest gives page %#x, which is not its RAM", first)
            self.refused += 1

    async def _serve_stats(self, queue: GuestQueue) -> None:
        """The driver's only buffer is kept until somebody asks. When it is given back, the driver
        fills it."""
        while True:
            chain = await queue.next()
            self._stats = dict(_stats(chain.take(_MOST_STATS * _STAT.size)))
            self._stats_given = self._stats_asked
            self._changed.set()
            while self._stats_wanted <= self._stats_given:
                await self._ask.wait()
            self._stats_asked += 1
            queue.push(chain)

    # -- its life ------------------------------------------------------------------------------

    def reset(self) -> None:
        self._actual = 0
        self._changed.set()

    def save(self) -> Mapping[str, Any]:
        return self.State.plain(target=self._target, actual=self._actual)

    def load(self, state: Mapping[str, Any]) -> None:
        saved = self.State.load(self.name, state)
        self._target, self._actual = saved.target, saved.actual
        self._changed.set()


def _runs(data: bytes) -> Iterator[tuple[int, int]]:
    """The page numbers in `data` as (first, count); Linux sends them in descending order."""
    numbers = sorted(number for (number,) in struct.iter_unpack("<I", data[: len(data) & ~3]))
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
        elif not count or number != first + count - 1:
            if count:
                yield first, count
            first, count = number, 1
    if count:
        yield first, count


def _stats(data: bytes) -> Iterator[tuple[str, int]]:
    """The (name, value) of each statistic in `data` whose tag is known."""
    for tag, value in struct.iter_unpack(_STAT.format, data[: len(data) // 10 * 10]):
        if tag < len(_NAMES):
            yield _NAMES[tag], value
