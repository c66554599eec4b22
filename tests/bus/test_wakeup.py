"""Wake-ups: none is lost, whichever thread made them and whichever sets them."""

from __future__ import annotations

import threading

import pytest
import trio
import trio.testing

from avmm.bus.wakeup import TaskWakeup


async def test_it_wakes_who_waits_and_who_comes_later() -> None:
    wakeup = TaskWakeup()
    wakeup.set()
    with trio.fail_after(5):
        await wakeup.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wakeup.wait)
            await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(wakeup.set)


async def test_a_cancelled_wait_loses_nothing() -> None:
    wakeup = TaskWakeup()
    wakeup.set()
    with trio.CancelScope() as scope:
        scope.cancel()
        await wakeup.wait()
    assert scope.cancelled_caught
    with trio.fail_after(5):
        await wakeup.wait()


async def test_one_task_waits() -> None:
    wakeup = TaskWakeup()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wakeup.wait)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await wakeup.wait()
        wakeup.set()


async def test_it_can_be_made_in_a_thread_of_no_loop_with_the_loops_token() -> None:
    token = trio.lowlevel.current_trio_token()
    made: list[TaskWakeup] = []
    refused: list[Exception] = []

    def make() -> None:
        try:
            TaskWakeup()
        except RuntimeError as error:
            refused.append(error)
        made.append(TaskWakeup(token))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert len(refused) == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made[0].wait)
        await trio.testing.wait_all_tasks_blocked()
        setter = threading.Thread(target=made[0].set)
        setter.start()
        setter.join()
