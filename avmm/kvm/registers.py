"""Python's side of the registers that C serves (registers.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from avmm.kvm._kvm import ffi, lib

if TYPE_CHECKING:
    pass

_ALL: Final = (1 << 64) - 1


class Writes:
    """What happens to a guest's write: numbers, as C has them."""

    TO_DEVICE: Final = lib.AVMM_TO_DEVICE
    STORES: Final = lib.AVMM_STORES
    IGNORES: Final = lib.AVMM_IGNORES
    CLEARS: Final = lib.AVMM_CLEARS
    COLLECTS: Final = lib.AVMM_COLLECTS


class ServedRegister:
    """Some bytes that C serves. Any thread may use it, and each call is made as a whole.

    `value`, its bits and `answer` are for registers of up to 8 bytes. They raise `ValueError` for
    others, and for numbers that do not fit.
    """

    def __init__(self, size: int, *, align: int = 1, whole: bool = False) -> None:
        """`size` zero bytes, at a multiple of `align` in the host's memory. With `whole`, accesses
        to a part of it are left to the device."""
        self.size = size
        self._memory = ffi.new("uint8_t[]", size + align - 1)
        start = int(ffi.cast("uintptr_t", self._memory))
        self._bytes = self._memory + (-start % align)
        self.struct = ffi.new(
            "struct avmm_register *",
            {"bytes": self._bytes, "size": size, "whole": whole, "answers": 1},
        )
        """For `DeviceClaims`."""
        lib.avmm_register_init(self.struct)
        self._value = ffi.new("uint64_t *")

    @property
    def value(self) -> int:
        """What a read of all of it gives, as a little-endian number."""
        return self._change(_ALL, 0)

    @value.setter
    def value(self, value: int) -> None:
        self._change(0, self._fitting(value))

    def set_bits(self, bits: int) -> None:
        """Set these bits, and leave the others as they are."""
        self._change(_ALL, self._fitting(bits))

    def clear_bits(self, bits: int) -> None:
        """Clear these bits, and leave the others as they are."""
        self._change(~self._fitting(bits) & _ALL, 0)

    def _change(self, kept: int, put: int) -> int:
        self._demand_number()
        return lib.avmm_register_change(self.struct, self.size, kept, put)

    def answer(self, value: int | None) -> None:
        """Give the guest's reads this number from now on; with None, leave them to the device."""
        number = self._fitting(0 if value is None else value)
        lib.avmm_register_answer(self.struct, value is not None, self.size, number)

    def _fitting(self, number: int) -> int:
        self._demand_number()
        if not 0 <= number < 1 << 8 * self.size:
            raise ValueError(f"{number:#x} does not fit a register of {self.size} bytes")
        return number

    def _demand_number(self) -> None:
        if self.size > 8:
            raise ValueError(f"the register has {self.size} bytes; a number has at most 8")

    def get(self, at: int = 0, size: int | None = None) -> bytes:
        """A copy of `size` bytes (all from there on) at `at`. Raises `ValueError` if there are
        not that many."""
        size = self.size - at if size is None else size
        self._check(at, size)
        data = ffi.new("uint8_t[]", size)
        lib.avmm_register_copy(self.struct, data, at, size, 0)
        return bytes(ffi.buffer(data))

    def put(self, data: bytes | bytearray | memoryview, at: int = 0) -> None:
        """Copy `data` there. Raises `ValueError` if it does not fit."""
        self._check(at, len(data))
        lib.avmm_register_copy(self.struct, ffi.from_buffer("uint8_t[]", data), at, len(data), 1)

    def _check(self, at: int, size: int) -> None:
        if at < 0 or size < 0 or at + size > self.size:
            raise ValueError(f"{size} bytes at {at:#x}: the register has {self.size} bytes")

    # -- the guest's accesses, where a vCPU's thread did not serve them in C ---------------------

    def read(self, at: int, size: int) -> int | None:
        """What the guest reads there; None if the device has to answer. One vCPU at a time."""
        if not lib.avmm_register_read(self.struct, at, size, self._value):
            return None
        return self._value[0]

    def write(self, how: int, at: int, size: int, value: int) -> bool:
        """Take the guest's write; False if the device has to."""
        return bool(lib.avmm_register_write(self.struct, how, at, size, value))

    # -- its state -------------------------------------------------------------------------------

    def save(self) -> bytes:
        """What it holds, for `load`. Nothing, if its reads are left to the device."""
        return self.get() if self.struct.answers else b""

    def load(self, data: bytes) -> None:
        """Hold what another register of this kind held. Raises `ValueError` if it cannot be that
        of such a register."""
        if not data and self.struct.whole:
            self.answer(None)
            return
        if len(data) != self.size:
            raise ValueError(f"{len(data)} bytes; expected {self.size}")
        self.put(data)
        self.struct.answers = 1

    def view(self) -> memoryview:
        """Its memory, without a copy, for a memory slot."""
        return memoryview(ffi.buffer(self._bytes, self.size))


class CollectingRegister(ServedRegister):
    """Collects whole writes of `width` bytes, up to `capacity` of them."""

    def __init__(self, width: int, capacity: int) -> None:
        super().__init__(width * capacity)
        self.width = width
        self.capacity = capacity
        self.struct.answers = 0
        self.struct.width = width
        self.struct.limit = capacity

    @property
    def count(self) -> int:
        """How many writes are there now."""
        return self.struct.count

    def limit(self, count: int) -> None:
        """From now on leave writes to the device while `count` of them, or more, are there."""
        lib.avmm_register_limit(self.struct, min(max(0, count), self.capacity))

    def push(self, value: int) -> bool:
        """Collect one more, whatever the limit is; False if there is no room."""
        return bool(lib.avmm_register_push(self.struct, value))

    def take(self, most: int | None = None) -> bytes:
        """Take up to `most` writes out, the oldest first: `width` bytes of each, little endian."""
        return self._copied(self.count if most is None else min(max(0, most), self.count), keep=0)

    def _copied(self, most: int, keep: int) -> bytes:
        data = ffi.new("uint8_t[]", most * self.width)
        count = lib.avmm_register_take(self.struct, data, most, keep)
        return bytes(ffi.buffer(data, count * self.width))

    def save(self) -> bytes:
        return self._copied(self.count, keep=1)

    def load(self, data: bytes) -> None:
        if len(data) % self.width or len(data) > self.size:
            raise ValueError(
                f"{len(data)} bytes; expected at most {self.capacity} times {self.width}"
            )
        bytes_ = ffi.from_buffer("uint8_t[]", data)
        lib.avmm_register_fill(self.struct, bytes_, len(data) // self.width)
