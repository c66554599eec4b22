"""Threads for file I/O that may have to wait: one wake-up of trio for all that finished meanwhile.

`trio.to_thread.run_sync` costs each call a new hand-over in both directions. Here jobs go into
one queue, which a thread that is awake just goes on with, and come back in batches; or not to
trio at all, where their end is no matter of its.

Threads start when there is work for them and stay until `close`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeAlias

import outcome
import trio

from avmm.disks.base import Done

_Job: TypeAlias = tuple[Done, Callable[..., Any], tuple[Any, ...]]


class Pool:
    """At most `most` threads. Belongs to one thread's trio; `name` is what the threads are
    called."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._pending = 0
        self._counting = threading.Lock()
        """Of what is pending."""
        self._done: deque[tuple[trio.lowlevel.Task, outcome.Outcome[None]]] = deque()
        self._is_told = False
        """Will trio look at what is done, with nobody telling it?"""

    async def run(self, function: Callable[..., Any], *args: Any) -> None:
        """Call it in a thread; raises what it raises.

        A call that has begun cannot be taken back: cancelling waits for its end, and is then
        delivered at the next checkpoint.
        """
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()

        def done(error: Exception | None) -> None:
            if isinstance(error, OSError):
                # Of its own, for this frame knows `error` when trio's may have hung theirs on it.
                error = OSError(*error.args)
            result = outcome.Value(None) if error is None else outcome.Error(error)
            self._done.append((task, result))
            del error, result
            if not self._is_told:  # by two threads at once it may be told twice
                self._is_told = True
                try:
                    token.run_sync_soon(self._deliver)
                except trio.RunFinishedError:  # trio has crashed: nobody waits any more
                    self._is_told = False

        self.begin(done, function, *args)
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)

    def begin(self, done: Done, function: Callable[..., Any], *args: Any) -> None:
        """Call it in a thread, and there, after it, `done`, which must not raise.

        Raises `RuntimeError` where there is no thread and the system has none to give."""
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
            error: Exception | None = None
            try:
                function(*args)
            except OSError as raised:  # where it came from tells nothing, and knows the buffers
                error = raised.with_traceback(None)
            except Exception as raised:
                error = raised
            # Guest memory is let go of here, not when the next job comes.
            del job, function, args
            with self._counting:
                self._pending -= 1
            done(error)
            # An error may know frames that know the job: no circle, it holds buffers.
            del done, error

    def _deliver(self) -> None:
        self._is_told = False  # before it looks: who comes after its look tells it again
        while self._done:
            trio.lowlevel.reschedule(*self._done.popleft())

    def close(self) -> None:
        """End the threads, after what they have in hand; idempotent."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
