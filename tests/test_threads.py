"""Work that may block: where it runs, what cancelling does, and what its thread lets go of."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

from avmm import threads
from avmm.errors import AvmmError, ConfigError
from avmm.threads import in_thread, in_thread_shielded

CALLS = pytest.mark.parametrize("call", [in_thread, in_thread_shielded])


class Held:
    """Stands for a view of guest memory."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Whatever is kept in a circle stays there."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@CALLS
async def test_it_runs_in_another_thread(call: Callable[..., Awaitable[Any]]) -> None:
    ident = await call(threading.get_ident)
    assert ident != threading.get_ident()
    assert await call(divmod, 7, 4) == (1, 3)


@CALLS
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("kind", [OSError, ConfigError])
async def test_an_expected_error_keeps_nothing(
    call: Callable[..., Awaitable[Any]], kind: type[Exception]
) -> None:
    def fail(held: Held) -> None:
        mine = held
        try:
            raise ValueError("first", id(mine))
        except ValueError as error:
            raise kind("then") from error

    held = Held()
    is_held = weakref.ref(held)
    with pytest.raises(kind, match="then") as caught:
        await call(fail, held)
    assert isinstance(caught.value.__cause__, ValueError)
    del held, caught
    assert is_held() is None


@CALLS
@pytest.mark.usefixtures("no_collector")
async def test_a_call_that_has_returned_keeps_nothing(call: Callable[..., Awaitable[Any]]) -> None:
    held = Held()
    is_held = weakref.ref(held)
    assert await call(id, held) == id(held)
    del held
    assert is_held() is None


@CALLS
async def test_an_unexpected_error_says_where_it_was_raised(
    call: Callable[..., Awaitable[Any]],
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as caught:
        await call(fail)
    assert caught.traceback[-1].name == "fail"


async def test_cancelled_before_it_begins_it_is_not_called() -> None:
    called: list[bool] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await in_thread(called.append, True)
    assert scope.cancelled_caught
    assert not called


async def test_a_call_that_has_begun_returns_its_result_although_cancelled() -> None:
    begun, end = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        end.wait(20)
        return "opened"

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await trio.to_thread.run_sync(begun.wait, 20)
                scope.cancel()
                end.set()

            nursery.start_soon(cancel)
            with trio.CancelScope():
                result = await in_thread(work)
    assert result == "opened"


async def test_a_shielded_call_is_made_although_cancelled() -> None:
    called: list[bool] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await in_thread_shielded(called.append, True)
    assert called


async def test_users_threads_do_not_keep_it_waiting() -> None:
    end = threading.Event()
    async with trio.open_nursery() as nursery:
        limiter = trio.to_thread.current_default_thread_limiter()
        before, limiter.total_tokens = limiter.total_tokens, 1
        try:
            nursery.start_soon(trio.to_thread.run_sync, end.wait, 20)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(10):
                assert await in_thread(divmod, 1, 1) == (1, 0)
        finally:
            end.set()
            limiter.total_tokens = before


async def test_a_system_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", refuse)
    with pytest.raises(AvmmError, match="cannot start another thread: can't start new thread"):
        await in_thread(threading.get_ident)
    assert await in_thread_shielded(threading.get_ident) == threading.get_ident()


def test_each_run_of_trio_has_a_limiter_of_its_own() -> None:
    async def find() -> trio.CapacityLimiter:
        await in_thread(divmod, 1, 1)
        assert threads._limiter() is threads._limiter()
        return threads._limiter()

    assert trio.run(find) is not trio.run(find)
