"""A Machine in other people's programs: other event loops, other threads, many at once."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import trio

import avmm

pytestmark = [pytest.mark.lab(also="stock"), pytest.mark.usefixtures("kvm", "nothing_left")]


async def converse() -> avmm.Outcome:
    async with avmm.Machine(memory="16M") as vm:
        await vm.console.send_all(b"echo over there\rexit 9\r")
        said = b"".join([bytes(data) async for data in vm.console])
        assert b"\r\nover there\r\n" in said
        return await vm.wait()


def test_trio_in_a_thread_that_is_not_the_main_one() -> None:
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(trio.run(converse)))
    thread.start()
    thread.join()
    assert outcomes[0].status == 9


# Other event loops install handlers and loop state of their own: each in its own process.
ANYIO = """
import anyio
from tests_embedding import converse
print(anyio.run(converse, backend="trio").status)
"""
TRIO_ASYNCIO = """
import trio_asyncio
from tests_embedding import converse
print(trio_asyncio.run(converse).status)
"""


@pytest.mark.parametrize("program", [ANYIO, TRIO_ASYNCIO], ids=["anyio", "trio-asyncio"])
def test_other_event_loops_on_trio(program: str) -> None:
    source = program.replace("from tests_embedding import converse", _CONVERSE)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, check=False)
    assert done.stdout.split() == [b"9"], done.stderr.decode()


_CONVERSE = """
import avmm
async def converse():
    async with avmm.Machine(memory="16M") as vm:
        await vm.console.send_all(b"echo over there\\rexit 9\\r")
        said = b"".join([bytes(data) async for data in vm.console])
        assert b"over there" in said
        return await vm.wait()
"""


async def test_a_pause_between_two_words_loses_no_byte() -> None:
    async with avmm.Machine(memory="16M") as vm:
        await vm.console.send_all(b"echo one ")
        async with trio.open_nursery() as nursery, vm.paused():
            # A quiesced console takes nothing: sending waits until the guest runs on.
            nursery.start_soon(vm.console.send_all, b"two\rexit 0\r")
            await trio.testing.wait_all_tasks_blocked()
        said = b"".join([bytes(data) async for data in vm.console])
    assert b"\r\none two\r\n" in said


async def test_the_console_keeps_what_was_printed_for_after_the_end() -> None:
    async with avmm.Machine(memory="16M") as vm:
        await vm.console.send_all(b"echo the end\rexit 0\r")
        await vm.wait()
        said = b"".join([bytes(data) async for data in vm.console])
    assert b"the end" in said


async def test_a_machine_before_its_block_says_so() -> None:
    vm = avmm.Machine()
    with pytest.raises(avmm.AvmmError, match="inside its `async with`"):
        vm.console  # noqa: B018


async def test_config_and_settings_exclude_each_other() -> None:
    with pytest.raises(avmm.ConfigError, match="not both"):
        avmm.Machine(avmm.MachineConfig(), memory="64M")
    with pytest.raises(avmm.ConfigError, match="unknown setting 'memroy'"):
        avmm.Machine(memroy="64M")  # type: ignore[call-arg]
