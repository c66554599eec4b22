"""Threads for file I/O that may have to wait: one wake-up of trio for all that finished meanwhile.

`trio.to_thread.run_sync` costs each call a new hand-over in both directions. Here jobs go into one
queue. A thread that is awake takes the next one from it, and finished jobs go back to trio in
batches, or not at all if trio need not know that they ended.

Threads start when there is work for them and stay until `close`. A deterministic run has none
(`avmm.chance`): there the calls are made at once, in trio's thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeAlias

import outcome
import trio

from avmm import chance
from avmm.disks.base import Done

_Job: TypeAlias = tuple[Done, Callable[..., Any], tuple[Any, ...]]


class Pool:
    """At most `most` threads. It belongs to the trio loop of one thread. The threads get the name
    `name`."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._pending = 0
        self._counting = threading.Lock()
        """Protects `_pending`."""
        self._done: deque[tuple[trio.lowlevel.Task, outcome.Outcome[None]]] = deque()
        self._is_told = False
        """Will trio look for finished jobs anyway, without being told?"""

    async def run(self, function: Callable[..., Any], *args: Any) -> None:
        """Call `function` in a thread. Raises what it raises.

        A call that has begun cannot be stopped. A cancellation waits for it to end, and is then
        delivered at the next checkpoint.
        """
        if chance.is_fixed():
            function(*args)
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()

        def done(error: Exception | None) -> None:
            if isinstance(error, OSError):
                # The task gets a new error, because trio attaches its frames to that one, and the
                # thread still refers to the old one.
                error = OSError(*error.args)
            result = outcome.Value(None) if error is None else outcome.Error(error)
            self._done.append((task, result))
            del error, result
            if not self._is_told:  # two threads at once may both tell it, which does no harm
                self._is_told = True
                try:
                    token.run_sync_soon(self._deliver)
                except trio.RunFinishedError:  # trio has crashed: nobody is waiting
                    self._is_told = False

        self.begin(done, function, *args)
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)

    def begin(self, done: Done, function: Callable[..., Any], *args: Any) -> None:
        """Call `function` in a thread, and then, in the same thread, `done`, which must not raise.

        Raises `RuntimeError` if there is no thread yet and the system cannot start one."""
        if chance.is_fixed():
            done(_error_of(function, args))
            return
        if self._pending >= len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more of them
                if not self._threads:
                    raise
            else:
                self._threads.append(thread)
        with self._counting:
            self._pending += 1
        self._jobs.put((done, function, args))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            done, function, args = job
            error = _error_of(function, args)
            # Release guest memory now, not when the next job comes.
            del job, function, args
            with self._counting:
                self._pending -= 1
            done(error)
            # An error may refer to frames that refer to the job. That must not become a circle,
            # because the job holds buffers.
            del done, error

    def _deliver(self) -> None:
        self._is_told = False  # set before trio looks: a job that ends after that tells it again
        while self._done:
            trio.lowlevel.reschedule(*self._done.popleft())

    def close(self) -> None:
        """End the threads, after the jobs that they have; idempotent."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()


def _error_of(function: Callable[..., Any], args: tuple[Any, ...]) -> Exception | None:
    """Call the function. Return what it raised, for whoever waits for it."""
    try:
        function(*args)
    except OSError as raised:
        return raised.with_traceback(None)  # it says nothing useful, and refers to the buffers
    except Exception as raised:
        return raised
    return None
