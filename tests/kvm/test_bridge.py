"""The hand-over between a vCPU's thread and its task, with real threads, and the kick."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

import avmm
from avmm.kvm import KvmError
from avmm.kvm.bridge import Bridge
from avmm.kvm.kick import accept_kicks, install_kick, kick

pytestmark = pytest.mark.usefixtures("nothing_left")

LOST = 20
"""Seconds after which a wake-up counts as lost."""
SPUN = 50e-6
"""Seconds that a poll takes only where it spins: far less than POLL_NS, far more than a call."""


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    bridge = Bridge()
    yield bridge
    # A turn that nobody took would keep all others from polling.
    bridge.poll(False)
    bridge.close()


def rings(bridge: Bridge) -> bool:
    return bool(select.select([bridge.bell], [], [], 0)[0])


def take_turn(bridge: Bridge, mine: bool, spin: bool) -> None:
    """The task's side of a turn, as `VcpuLoop` has it, but for trio."""
    while not mine:
        assert select.select([bridge.bell], [], [], LOST)[0], "the bell never rang"
        mine = bridge.woken() or bridge.poll(spin)


# -- one side at a time: these call both sides from one thread ------------------------------


def test_the_thread_has_the_first_turn(bridge: Bridge) -> None:
    assert not bridge.poll(True)


def test_leaving_gives_the_task_its_turn(bridge: Bridge) -> None:
    bridge.leave()
    assert bridge.poll(False)


def test_the_task_keeps_its_turn_until_it_answers(bridge: Bridge) -> None:
    bridge.leave()
    assert bridge.poll(False)
    assert bridge.poll(False)
    bridge.answer()
    assert not bridge.poll(False)


def test_answer_and_poll_answers_and_polls(bridge: Bridge) -> None:
    bridge.leave()
    assert bridge.poll(False)
    assert not bridge.answer_and_poll(False)
    bridge.leave()
    assert rings(bridge)
    assert bridge.woken()


def test_a_task_that_sleeps_is_rung_for_and_one_that_does_not_is_not(bridge: Bridge) -> None:
    bridge.leave()
    assert not rings(bridge)
    assert bridge.poll(False)
    bridge.answer()
    assert not rings(bridge)
    assert not bridge.poll(False)
    assert not rings(bridge)
    bridge.leave()
    assert rings(bridge)


def test_a_task_that_was_rung_for_has_its_turn_and_sleeps_no_more(bridge: Bridge) -> None:
    assert not bridge.poll(False)
    bridge.leave()
    assert bridge.woken()
    assert not rings(bridge)
    bridge.answer()
    bridge.leave()
    assert not rings(bridge)
    assert bridge.poll(False)


def test_a_task_that_gave_up_waiting_is_not_rung_for(bridge: Bridge) -> None:
    assert not bridge.poll(False)
    assert not bridge.woken()
    bridge.leave()
    assert not rings(bridge)
    assert bridge.woken()


def test_the_bell_is_ours_alone(bridge: Bridge) -> None:
    assert not os.get_inheritable(bridge.bell)
    assert not os.get_blocking(bridge.bell)


def wait(bridge: Bridge, seconds: float = 0) -> None:
    """The task sleeps for so long until it has its turn."""
    assert not bridge.poll(False)
    if seconds:
        time.sleep(seconds)
    bridge.leave()
    assert bridge.woken()
    bridge.answer()


def vain_polls(prepare: Callable[[Bridge], None], *, spin: bool = True) -> list[float]:
    """How long polls in vain take, by bridges of their own, each after `prepare`."""
    took = []
    for _ in range(25):
        bridge = Bridge()
        prepare(bridge)
        start = time.perf_counter()
        assert not bridge.poll(spin)
        took.append(time.perf_counter() - start)
        bridge.close()
    return took


def test_polling_spins_while_waits_are_short() -> None:
    assert min(vain_polls(lambda bridge: None)) >= SPUN
    assert statistics.median(vain_polls(wait)) >= SPUN


def test_polling_does_not_spin_where_it_may_not() -> None:
    assert min(vain_polls(lambda bridge: None, spin=False)) < SPUN


def test_polling_does_not_spin_after_a_long_wait() -> None:
    assert min(vain_polls(lambda bridge: wait(bridge, 2e-3))) < SPUN


def test_polling_spins_again_after_enough_short_waits() -> None:
    def prepare(bridge: Bridge) -> None:
        wait(bridge, 20e-3)
        for _ in range(10):
            wait(bridge)

    assert statistics.median(vain_polls(prepare)) >= SPUN


def test_polling_does_not_spin_while_another_vcpu_wants_its_task(bridge: Bridge) -> None:
    bridge.leave()
    assert min(vain_polls(lambda bridge: None)) < SPUN
    assert bridge.poll(False)
    assert min(vain_polls(lambda bridge: None)) >= SPUN


# -- both sides ----------------------------------------------------------------------------


class Side:
    """Runs a vCPU's part of the hand-over in a thread; `join` raises what it raised."""

    def __init__(self, main: Callable[[], None]) -> None:
        self.id = 0
        self.error: BaseException | None = None
        self._main = main
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(LOST)

    def _run(self, started: threading.Event) -> None:
        self.id = threading.get_native_id()
        started.set()
        try:
            self._main()
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(LOST)
        assert not self._thread.is_alive(), "the thread was never woken"
        if self.error is not None:
            raise self.error

    def ends_within(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()


class Turns:
    """Notes who has the turn, and notices at once where both have it."""

    def __init__(self) -> None:
        self.count = 0
        self.owner = ""

    def take(self, name: str, delay: Callable[[], None]) -> None:
        assert self.count % 2 == (name == "task"), f"{name} has the turn twice"
        self.owner = name
        delay()
        assert self.owner == name, f"{self.owner} has the turn, and {name} too"
        self.count += 1


def delays(seed: int, *, long: float) -> Callable[[], None]:
    """Half of them none, the others as long as a poll or, if `long` (a chance), as a sleep."""
    choose = random.Random(seed)

    def delay() -> None:
        chance = choose.random()
        if chance < long:
            time.sleep(choose.uniform(0, 300e-6))
        elif chance < 0.5:
            end = time.perf_counter() + choose.uniform(0, 2 * SPUN)
            while time.perf_counter() < end:
                pass

    return delay


TRIPS = 2_500


@pytest.mark.parametrize("spin", [True, False], ids=["polling", "not polling"])
@pytest.mark.parametrize(
    ("thread_sleeps", "task_sleeps"),
    [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1)],
    ids=["neither sleeps", "thread sleeps", "task sleeps", "both sleep"],
)
def test_turns_alternate_and_none_is_lost(
    bridge: Bridge, spin: bool, thread_sleeps: float, task_sleeps: float
) -> None:
    turns = Turns()

    def main() -> None:
        delay = delays(1, long=thread_sleeps)
        for _ in range(TRIPS):
            turns.take("thread", delay)
            bridge.call()
        bridge.leave()

    side = Side(main)
    delay = delays(2, long=task_sleeps)
    mine = bridge.poll(spin)
    for trip in range(TRIPS):
        take_turn(bridge, mine, spin)
        turns.take("task", delay)
        if trip % 2:
            mine = bridge.answer_and_poll(spin)
        else:
            bridge.answer()
            mine = bridge.poll(spin)
    take_turn(bridge, mine, spin)
    side.join()
    assert turns.count == 2 * TRIPS


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("stress") / "bridge_stress"
    source = Path(__file__).parents[1] / "support" / "bridge_stress.c"
    header = Path(avmm.__file__).parent / "kvm"
    command = [
        "cc",
        "-O2",
        "-std=gnu11",
        "-pthread",
        f"-I{header}",
        "-o",
        str(program),
        str(source),
    ]
    subprocess.run(command, check=True)
    return program


@pytest.mark.parametrize("spin", ["0", "1"], ids=["not polling", "polling"])
def test_no_wake_up_is_lost_in_whichever_order_the_sides_meet(stress: Path, spin: str) -> None:
    done = subprocess.run(
        [stress, "2000", spin], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.stdout == "ok\n"


async def test_turns_alternate_under_trio(bridge: Bridge) -> None:
    turns = Turns()

    def main() -> None:
        for _ in range(TRIPS):
            turns.take("thread", delay)
            bridge.call()
        bridge.leave()

    delay = delays(3, long=0.02)
    side = Side(main)
    mine = bridge.poll(True)
    with trio.fail_after(2 * LOST):
        while True:
            while not mine:
                try:
                    await trio.lowlevel.wait_readable(bridge.bell)
                finally:
                    mine = bridge.woken()
                mine = mine or bridge.poll(True)
            if turns.count == 2 * TRIPS:
                break
            turns.take("task", lambda: None)
            mine = bridge.answer_and_poll(True)
    side.join()


def test_a_kick_takes_nobodys_turn(bridge: Bridge) -> None:
    install_kick()
    turns = Turns()

    def main() -> None:
        accept_kicks()
        for _ in range(TRIPS // 10):
            turns.take("thread", lambda: None)
            bridge.call()
        bridge.leave()

    side = Side(main)
    delay = delays(4, long=0.5)
    mine = bridge.poll(False)
    for _ in range(TRIPS // 10):
        take_turn(bridge, mine, False)
        kick(side.id)
        turns.take("task", delay)
        kick(side.id)
        mine = bridge.answer_and_poll(False)
    take_turn(bridge, mine, False)
    side.join()
    assert turns.count == 2 * (TRIPS // 10)


def test_a_thread_that_waits_for_its_answer_lets_others_run(bridge: Bridge) -> None:
    side = Side(bridge.call)
    take_turn(bridge, bridge.poll(False), False)
    # Were the GIL held over there, this line would not be reached.
    assert not side.ends_within(0)
    bridge.answer()
    side.join()


# -- the kick ------------------------------------------------------------------------------


def test_the_kick_is_one_signal_that_is_not_queued() -> None:
    number = install_kick()
    assert number < signal.SIGRTMIN
    assert install_kick() == number
    status = Path("/proc/self/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt"))[8:], 16)
    assert caught >> (number - 1) & 1


def in_child(code: str) -> str:
    """What a fresh process prints, whose signals are nobody's."""
    prelude = "import signal\nfrom avmm.kvm.kick import install_kick\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        env=os.environ | {"PYTHONPATH": str(Path(avmm.__file__).parents[1])},
        capture_output=True,
        check=False,
        text=True,
    )
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("taken", ["lambda *_: None", "signal.SIG_IGN"])
def test_the_kick_is_a_signal_that_nobody_uses(taken: str) -> None:
    code = f"signal.signal(signal.SIGSTKFLT, {taken})\nprint(install_kick() == signal.SIGPWR)"
    assert in_child(code) == "True\n"


def test_where_every_signal_is_taken_that_is_said() -> None:
    code = """if True:
        for name in ("SIGSTKFLT", "SIGPWR", "SIGUSR1", "SIGUSR2"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        try:
            install_kick()
        except OSError as error:
            print(error)
    """
    assert "all have handlers already" in in_child(code)


def test_a_kick_runs_no_python_code() -> None:
    install_kick()
    ours, pythons = socket.socketpair()
    with ours, pythons:
        ours.setblocking(False)
        pythons.setblocking(False)
        before = signal.set_wakeup_fd(pythons.fileno())
        try:
            # To this very thread: it has been delivered when the call returns.
            kick(threading.get_native_id())
        finally:
            signal.set_wakeup_fd(before)
        with pytest.raises(BlockingIOError):
            ours.recv(1)


def test_a_kick_interrupts_a_blocking_call() -> None:
    install_kick()
    libc = ctypes.CDLL(None, use_errno=True)
    end, other = os.pipe()
    answers: list[tuple[int, int]] = []

    def main() -> None:
        accept_kicks()
        answers.append((libc.read(end, ctypes.create_string_buffer(1), 1), ctypes.get_errno()))

    side = Side(main)
    kick(side.id)
    # One would do once the thread is in the call, which cannot be seen from here.
    deadline = time.monotonic() + LOST
    while not side.ends_within(0.001) and time.monotonic() < deadline:
        kick(side.id)
    os.write(other, b"!")
    side.join()
    os.close(end)
    os.close(other)
    assert answers == [(-1, errno.EINTR)]


def test_a_thread_accepts_kicks_whatever_mask_it_inherited() -> None:
    number = install_kick()
    masks = []

    def main() -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        accept_kicks()
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    old = signal.pthread_sigmask(signal.SIG_BLOCK, [number, signal.SIGUSR1])
    try:
        Side(main).join()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    inherited, accepting = masks
    assert {number, signal.SIGUSR1} <= inherited
    assert accepting == inherited - {number}


def test_a_kick_gets_through_where_the_users_signal_queue_is_full() -> None:
    code = """if True:
        import resource, threading
        from avmm.kvm.kick import install_kick, kick
        install_kick()
        resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))
        try:
            kick(threading.get_native_id())
            print("sent")
        except OSError as error:
            print(error)
    """
    assert in_child(code) == "sent\n"


def test_a_kick_to_nobody_is_an_error() -> None:
    install_kick()
    with pytest.raises(KvmError, match=r"tgkill failed: No such process \(ESRCH\)"):
        kick(0x7FFF_FFFF)
