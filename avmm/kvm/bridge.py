"""Python's side of the hand-over (bridge.h)."""

from __future__ import annotations

import errno
import os

from avmm.forks import closed_in_child
from avmm.kvm._kvm import ffi, lib
from avmm.kvm.errors import KvmError


def eventfd() -> int:
    """A new eventfd, non-blocking and not inherited. Raises `KvmError` if there is none left."""
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise KvmError("eventfd", error.errno or errno.EMFILE) from None


class Bridge:
    """A turn that passes between a vCPU's thread and the task that serves it.

    The thread uses `call` and `leave`; the task uses the other methods. The thread has the turn
    first.
    """

    def __init__(self) -> None:
        self.bell = eventfd()
        """Readable when the task has been given the turn while it slept."""
        self.struct = ffi.new("struct avmm_bridge *", {"bell": self.bell})
        """For use in the other modules of `avmm.kvm`."""
        closed_in_child(self, Bridge.close)

    @property
    def is_handed(self) -> bool:
        """Must the task serve the exit, and not only await what the thread has handed over? Call
        it only while the task has the turn."""
        return bool(self.struct.handed)

    def call(self, handed: bool = False) -> None:
        """Give the task the turn and wait, without the GIL, until it answers. With `handed`, the
        task is to serve the exit."""
        lib.avmm_bridge_call(self.struct, handed)

    def leave(self) -> None:
        """Give the task the turn for good."""
        lib.avmm_bridge_leave(self.struct)

    def poll(self, may_spin: bool) -> bool:
        """Does the task have the turn? If not, the caller waits until `bell` is readable, and then
        calls `woken`."""
        return bool(lib.avmm_bridge_poll(self.struct, may_spin))

    def woken(self) -> bool:
        """Say that the task no longer waits for the bell, whether it rang or not. Returns whether
        the task has the turn."""
        return bool(lib.avmm_bridge_woken(self.struct))

    def answer(self) -> None:
        """Give the turn back to the thread."""
        lib.avmm_bridge_answer(self.struct)

    def answer_and_poll(self, may_spin: bool) -> bool:
        """`answer`, then `poll`, without taking the GIL in between."""
        return bool(lib.avmm_bridge_answer_and_poll(self.struct, may_spin))

    def close(self) -> None:
        """Close the bell, after the thread has left; idempotent."""
        if self.bell >= 0:
            os.close(self.bell)
            self.bell = -1
