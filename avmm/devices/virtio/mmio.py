"""virtio-mmio: registers through which a driver finds and sets up a virtio device.

VIRTIO 1.2, 4.2, version 2 (no legacy interface), and 3.1 for the order of things.

**Notifications** come through a doorbell for each queue (`Host.doorbell`), without an exit if KVM
supports that. A write to QueueNotify that does arrive here rings the same doorbell.

**A session** is the time in which the device works: `VirtioDevice.serve` runs in a task of `run`,
from DRIVER_OK to the next reset, pause, QueueReady = 0 or broken rule. Each of these cancels the
session and waits until it has ended, so no part of it can touch guest memory later. A reset that
has to wait is answered with an awaitable: only the vCPU that resets waits, and reads Status = 0
afterwards.

**Who touches what.** Registers belong to whoever holds `host.lock`. Rings belong to the session;
while there is none, they too belong to whoever holds `host.lock`.

**Saving.** A session that starts, also after a load, looks at every queue first, whether or not it
was notified, and an interrupt that the guest has not acknowledged is raised again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import trio

from avmm.ctrl_c import protected
from avmm.devices.base import Device, Doorbell, Host, ReadAnswer, Wakeup, WriteAnswer
from avmm.devices.registers import Register
from avmm.devices.state import DeviceState
from avmm.devices.virtio.device import GuestQueue, VirtioDevice
from avmm.devices.virtio.queue import QueueError, Virtqueue
from avmm.errors import ConfigError, DeviceError
from avmm.plain import MAPPING, U8, U32, U64, Int, ListOf

if TYPE_CHECKING:
    from avmm.memory.ram import GuestMemory

logger = logging.getLogger("avmm.virtio")

SIZE: Final = 0x200
"""Bytes of address space: registers, and config space from 0x100 on."""
CONFIG: Final = 0x100

# 4.2.2, table 4.1.
MAGIC_VALUE: Final = 0x000
VERSION: Final = 0x004
DEVICE_ID: Final = 0x008
VENDOR_ID: Final = 0x00C
DEVICE_FEATURES: Final = 0x010
DEVICE_FEATURES_SEL: Final = 0x014
DRIVER_FEATURES: Final = 0x020
DRIVER_FEATURES_SEL: Final = 0x024
QUEUE_SEL: Final = 0x030
QUEUE_SIZE_MAX: Final = 0x034
QUEUE_SIZE: Final = 0x038
QUEUE_READY: Final = 0x044
QUEUE_NOTIFY: Final = 0x050
INTERRUPT_STATUS: Final = 0x060
INTERRUPT_ACK: Final = 0x064
STATUS: Final = 0x070
QUEUE_DESC_LOW: Final = 0x080
QUEUE_DESC_HIGH: Final = 0x084
QUEUE_DRIVER_LOW: Final = 0x090
QUEUE_DRIVER_HIGH: Final = 0x094
QUEUE_DEVICE_LOW: Final = 0x0A0
QUEUE_DEVICE_HIGH: Final = 0x0A4
SHM_SEL: Final = 0x0AC
SHM_LEN_LOW: Final = 0x0B0
SHM_BASE_HIGH: Final = 0x0BC
CONFIG_GENERATION: Final = 0x0FC

MAGIC: Final = 0x74726976
VENDOR: Final = 0x4D4D5641  # "AVMM"

# 2.1
ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 64
FAILED: Final = 128
_STATUS_BITS: Final = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

# 6
F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
_TRANSPORT: Final = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1

USED_BUFFER: Final = 1
CONFIG_CHANGE: Final = 2

_WORD: Final = 0xFFFF_FFFF
_REPORTED_AT_MOST: Final = 16
_PLACES: Final = {
    QUEUE_DESC_LOW: ("desc", 0),
    QUEUE_DESC_HIGH: ("desc", 32),
    QUEUE_DRIVER_LOW: ("driver", 0),
    QUEUE_DRIVER_HIGH: ("driver", 32),
    QUEUE_DEVICE_LOW: ("device", 0),
    QUEUE_DEVICE_HIGH: ("device", 32),
}
_SETTINGS: Final = frozenset({QUEUE_SIZE, *_PLACES})


class _Session:
    """A time in which the device works; see the top of this file."""

    def __init__(self) -> None:
        self.queues: dict[int, GuestQueue] = {}
        self.scope = trio.CancelScope()
        self.ended = trio.Event()


class VirtioMmio(Device):
    """Shows `model` to the guest; place it at `SIZE` bytes of address space with an interrupt.

    `event_idx` and `indirect` offer these features of rings. With `doorbells`, KVM handles the
    guest's notifications if it can; without, each causes an exit.
    """

    class State(DeviceState, version=1):
        status = U8
        device_features_sel = U32
        driver_features_sel = U32
        driver_features = U64
        queue_sel = U32
        interrupt_status = Int(0, USED_BUFFER | CONFIG_CHANGE)
        generation = U32
        queues = ListOf(MAPPING, least=1)
        model = MAPPING

    max_width: ClassVar[int] = 4
    acpi_hid: ClassVar[str] = "LNRO0005"

    def __init__(
        self,
        model: VirtioDevice,
        *,
        doorbells: bool = True,
        event_idx: bool = True,
        indirect: bool = True,
    ) -> None:
        self.model = model
        self._rings = F_VERSION_1
        self._rings |= F_EVENT_IDX if event_idx else 0
        self._rings |= F_INDIRECT_DESC if indirect else 0
        if model.features & _TRANSPORT:
            raise DeviceError(f"{model.name} offers feature bits that are the transport's")
        self._use_doorbells = doorbells
        self._queues: list[Virtqueue] = []
        self._bells: list[Doorbell] = []
        self._session: _Session | None = None
        self._held = False
        self._resetting = False
        self._reported: set[object] = set()
        self._wake: Wakeup
        self._status_register: Register
        self._interrupts: Register

    def _clear(self) -> None:
        """2.4.1: reset everything to its value after power-on, except what the device offers."""
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._driver_features = 0
        self._queue_sel = 0
        self._interrupts.value = 0
        self._generation = 0
        for queue in self._queues:
            queue.reset()
        self._set_status(0)  # last: a driver that reads this takes the reset for done

    @property
    def name(self) -> str:
        return f"virtio {self.model.name}"

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM; see `VirtioLink`."""
        return self.host.memory

    def attach(self, host: Host) -> None:
        super().attach(host)
        if host.interrupt is None:
            raise ConfigError(f"{self.name} is placed without an interrupt: it needs one")
        self._wake = host.wakeup()
        self._queues = [Virtqueue(host.memory, size) for size in self.model.queue_sizes]
        self._bells = [
            host.doorbell(QUEUE_NOTIFY, 4, index, by_exit=not self._use_doorbells)
            for index in range(len(self._queues))
        ]
        # C serves what drivers access while they work. `State` has what is in them.
        self._status_register = host.registers.constant(STATUS, 4, saved=False)
        self._interrupts = host.registers.clearable(
            INTERRUPT_STATUS, 4, clear_at=INTERRUPT_ACK, saved=False
        )
        self._clear()
        self.model.attach(self)

    def _set_status(self, status: int) -> None:
        self._status = self._status_register.value = status

    # -- the driver's side: registers, in a vCPU's thread --------------------------------------

    def read(self, offset: int, size: int) -> ReadAnswer:
        if offset >= CONFIG:
            data = self.model.config[offset - CONFIG : offset - CONFIG + size]
            return int.from_bytes(data, "little")
        if size != 4 or offset % 4:
            self._report(("read", offset, size), "a read of %d bytes at %#x", size, offset)
            return 0
        return self._read(offset)

    def _read(self, offset: int) -> int:
        if offset == MAGIC_VALUE:
            return MAGIC
        if offset == VERSION:
            return 2
        if offset == DEVICE_ID:
            return self.model.device_id
        if offset == VENDOR_ID:
            return VENDOR
        if offset == DEVICE_FEATURES:
            select = self._device_features_sel
            return self._offered >> 32 * select & _WORD if select < 2 else 0
        if offset == CONFIG_GENERATION:
            return self._generation
        if SHM_LEN_LOW <= offset <= SHM_BASE_HIGH:
            return _WORD  # 4.2.2: no such region
        queue = self._selected
        if offset == QUEUE_SIZE_MAX:
            return queue.max_size if queue is not None else 0
        if offset == QUEUE_READY:
            return int(queue is not None and queue.ready)
        self._report(("read", offset, 4), "a read of %d bytes at %#x", 4, offset)
        return 0

    def write(self, offset: int, size: int, value: int) -> WriteAnswer:
        if offset >= CONFIG:
            if not self._resetting:
                self.model.write_config(offset - CONFIG, value.to_bytes(size, "little"))
            return None
        if size != 4 or offset % 4:
            self._report(("write", offset, size), "a write of %d bytes at %#x", size, offset)
            return None
        if offset == QUEUE_NOTIFY:
            if value < len(self._bells):
                self._bells[value].ring()
            return None
        if offset == STATUS:
            return self._write_status(value)
        if self._resetting:
            return None  # another vCPU writes before the device has reported that it is reset
        return self._write(offset, value)

    def _write(self, offset: int, value: int) -> WriteAnswer:
        if offset == DEVICE_FEATURES_SEL:
            self._device_features_sel = value
        elif offset == DRIVER_FEATURES_SEL:
            self._driver_features_sel = value
        elif offset == DRIVER_FEATURES:
            self._write_features(value)
        elif offset == QUEUE_SEL:
            self._queue_sel = value
        elif offset == QUEUE_READY:
            return self._write_ready(value)
        elif offset in _SETTINGS:
            self._write_setting(offset, value)
        elif offset != SHM_SEL:
            self._report(("write", offset, 4), "a write of %d bytes at %#x", 4, offset)
        return None

    @property
    def _offered(self) -> int:
        return self.model.features | self._rings

    @property
    def _selected(self) -> Virtqueue | None:
        return self._queues[self._queue_sel] if self._queue_sel < len(self._queues) else None

    def _write_features(self, value: int) -> None:
        if self._status & FEATURES_OK:
            self._report("features", "features that change after FEATURES_OK")
        elif self._driver_features_sel < 2:
            shift = 32 * self._driver_features_sel
            self._driver_features &= ~(_WORD << shift)
            self._driver_features |= value << shift
        elif value:
            self._report("features", "features beyond bit 63")

    def _write_setting(self, offset: int, value: int) -> None:
        """4.2.3.2: only while the queue is not ready."""
        queue = self._selected
        if queue is None or queue.ready:
            text = "a write at %#x, but no queue is selected, or one that is ready"
            self._report(("setting", offset), text, offset)
        elif offset == QUEUE_SIZE:
            queue.size = value
        else:
            name, shift = _PLACES[offset]
            other = getattr(queue, name) & ~(_WORD << shift)
            setattr(queue, name, other | value << shift)

    def _write_ready(self, value: int) -> WriteAnswer:
        queue = self._selected
        ready = bool(value & 1)
        if queue is None or queue.ready == ready:
            return None
        if not self._is_live:
            self._set_ready(queue, ready)
            return None
        return self._change_ready(queue, ready)

    async def _change_ready(self, queue: Virtqueue, ready: bool) -> None:
        """Change whether the queue is ready while the device is at work: the session ends, and a
        new one starts with the queues that are then ready."""
        await self._stop()
        with self.host.lock:
            self._set_ready(queue, ready)
        self._wake.set()

    def _set_ready(self, queue: Virtqueue, ready: bool) -> None:
        if not ready:
            queue.stop()
        queue.ready = ready

    def _write_status(self, value: int) -> WriteAnswer:
        if value == 0:
            if not self._status & DRIVER_OK:
                self._clear()
                return None
            self._resetting = True
            return self._reset()
        if self._resetting:
            return None
        new = value & _STATUS_BITS & ~self._status  # 2.1.1: a driver never clears a bit
        if new & FEATURES_OK:
            taken = self._driver_features
            if taken & ~self._offered or not taken & F_VERSION_1:
                self._report("refused", "features %#x: FEATURES_OK stays clear", taken)
                new &= ~FEATURES_OK
        if new & DRIVER_OK and not (self._status | new) & FEATURES_OK:
            self._report("order", "DRIVER_OK without FEATURES_OK")
            new &= ~DRIVER_OK
        self._set_status(self._status | new)
        if new & DRIVER_OK:
            self._wake.set()
        return None

    async def _reset(self) -> None:
        await self._stop()
        self.model.reset()
        with self.host.lock:
            self._clear()
            self._resetting = False

    # -- the device's side: in trio -------------------------------------------------------------

    @property
    def _is_live(self) -> bool:
        return self._status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK

    @protected
    async def run(self) -> None:
        """Run a session whenever the device should be at work."""
        async with trio.open_nursery() as nursery:
            if type(self.model).run is not VirtioDevice.run:
                nursery.start_soon(self.model.run)
            self._wake.set()  # the device may have been loaded while it was at work
            while True:
                await self._wake.wait()
                with self.host.lock:
                    if not self._is_live or self._held or self._resetting:
                        continue
                    session = self._session = _Session()
                try:
                    with session.scope:
                        await self._serve(session.queues)
                        await trio.sleep_forever()
                finally:
                    for guest_queue in session.queues.values():
                        guest_queue.end()
                    with self.host.lock:
                        for queue in self._queues:
                            queue.hold()
                    self._session = None
                    session.ended.set()

    async def _serve(self, queues: dict[int, GuestQueue]) -> None:
        """Run until cancelled, or until the guest breaks a rule. Then the device needs a reset."""
        features = self._driver_features
        event_idx, indirect = bool(features & F_EVENT_IDX), bool(features & F_INDIRECT_DESC)
        try:
            for index, (queue, bell) in enumerate(zip(self._queues, self._bells, strict=True)):
                if queue.ready:
                    queue.start(event_idx=event_idx, indirect=indirect)
                    queues[index] = GuestQueue(index, queue, bell, self._used_buffer)
            await self.model.serve(queues, features)
        except* QueueError as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self._needs_reset(str(error))

    async def _stop(self) -> None:
        """End the session, and return when it has ended."""
        while (session := self._session) is not None:
            session.scope.cancel()
            await session.ended.wait()

    def _needs_reset(self, why: str) -> None:
        """2.1.2: report that the device needs a reset, and do nothing more until the driver resets
        it."""
        with self.host.lock:
            self._set_status(self._status | NEEDS_RESET)
            self._interrupts.set_bits(CONFIG_CHANGE)
        self._report(why, "%s: the device needs a reset", why)
        self._pulse()

    def _used_buffer(self) -> None:
        self._interrupts.set_bits(USED_BUFFER)
        self._pulse()

    def config_changed(self) -> None:
        """Config space has changed; see `VirtioLink`."""
        with self.host.lock:
            self._generation = self._generation + 1 & _WORD
            tell = self._is_live and not self._resetting
            if tell:
                self._interrupts.set_bits(CONFIG_CHANGE)
        if tell and not self._held:
            self._pulse()

    def wakeup(self) -> Wakeup:
        """See `VirtioLink`."""
        return self.host.wakeup()

    def _pulse(self) -> None:
        # Raise the interrupt even if the bit is already set. A driver may look at its rings before
        # it acknowledges, and would then never learn of what came in between.
        assert self.host.interrupt is not None
        self.host.interrupt.pulse()

    def finish(self) -> None:
        self.model.finish()

    async def quiesce(self) -> None:
        self._held = True
        await self._stop()

    async def resume(self) -> None:
        if self._held:
            self._held = False
            if self._interrupts.value:
                self._pulse()
            self._wake.set()

    # -- state ------------------------------------------------------------------------------------

    async def release(self) -> None:
        await self.model.release()

    async def acquire(self) -> None:
        await self.model.acquire()

    @property
    def saves_in_thread(self) -> bool:
        return self.model.saves_in_thread

    def save(self) -> Mapping[str, Any]:
        model = dict(self.model.save())  # this may take long, so the lock is not held
        with self.host.lock:
            return self.State.plain(
                status=self._status,
                device_features_sel=self._device_features_sel,
                driver_features_sel=self._driver_features_sel,
                driver_features=self._driver_features,
                queue_sel=self._queue_sel,
                interrupt_status=self._interrupts.value,
                generation=self._generation,
                queues=[queue.save() for queue in self._queues],
                model=model,
            )

    def load(self, state: Mapping[str, Any]) -> None:
        saved = self.State.load(self.name, state)
        status, features = saved.status, saved.driver_features
        if status & ~(_STATUS_BITS | NEEDS_RESET):
            raise saved.wrong("status", "bits that a device has")
        if status & DRIVER_OK and not status & FEATURES_OK:
            raise saved.wrong("status", "FEATURES_OK if DRIVER_OK is set")
        if status & FEATURES_OK and (features & ~self._offered or not features & F_VERSION_1):
            raise saved.wrong("driver_features", f"some of {self._offered:#x}, with VERSION_1")
        if len(saved.queues) > len(self._queues):
            raise saved.wrong("queues", f"a list of {len(self._queues)}")
        queues = [Virtqueue(self.host.memory, queue.max_size) for queue in self._queues]
        # A state with fewer queues comes from an avmm whose device had fewer. Its driver does not
        # know the others.
        for queue, queue_state in zip(queues, saved.queues, strict=False):
            queue.load(queue_state)
        if self._session is not None:
            raise DeviceError(f"{self.name} is at work: it can be loaded when quiesced")
        self.model.load(saved.model)
        with self.host.lock:  # nothing is refused from here on
            self._set_status(status)
            self._driver_features = features
            self._device_features_sel = saved.device_features_sel
            self._driver_features_sel = saved.driver_features_sel
            self._queue_sel = saved.queue_sel
            self._interrupts.value = saved.interrupt_status
            self._generation = saved.generation
            self._queues = queues
        if self._interrupts.value:
            self._pulse()
        self._wake.set()

    def _report(self, key: object, text: str, *values: object) -> None:
        """Log once that the guest did something odd. The number of lines is bounded, because the
        guest decides how often it does so."""
        if key not in self._reported and len(self._reported) < _REPORTED_AT_MOST:
            self._reported.add(key)
            logger.warning(f"{self.name}: {text}", *values)
