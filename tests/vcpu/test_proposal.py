"""The kernel's own word for what needs completion: believed where it is true, caught where not."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from support.engines import open_system
from support.guest import EXIT, machine
from support.held_call import ANSWER, HeldCalls, caught

import avmm
from avmm import Call, Device
from avmm.arch.x86_64.kvm import X86Vcpu
from avmm.kvm import constants
from avmm.machine import machine_of
from avmm.memory.ram import GuestMemory
from avmm.parts import Parts
from avmm.vcpu.completion import NEEDS_COMPLETION, CompletionPolicy

pytestmark = pytest.mark.usefixtures("kvm")
proposing = pytest.mark.lab(only="proposing")

PROPOSED = 239
OTHER = 3
"""KVM_CAP_USER_MEMORY: every kernel answers for it, and it says nothing about completion."""
ECHO = "mov dx, 0x300; 1: in eax, dx; out dx, eax; jmp 1b"


class Echo(Device):
    """Gives the guest one number after the other, and keeps what comes back."""

    def __init__(self) -> None:
        self.given = 0
        self.seen: list[int] = []

    def read(self, offset: int, size: int) -> int:
        self.given += 1
        return self.given - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(value)


async def pauses(vm: avmm.Machine, echo: Echo, until: Callable[[], object]) -> None:
    """Pause it now here, now there, until an input and an output have been caught, and so on."""
    for _ in range(500):
        async with vm.paused(deadline=60):
            count = len(echo.seen)
        while len(echo.seen) == count:
            await trio.lowlevel.checkpoint()
        if until():
            break


def announces(capability: int) -> bool:
    system = open_system()
    try:
        return system.announces(capability)
    finally:
        system.close()


@pytest.mark.lab
async def test_a_kernel_that_lies_is_caught_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if announces(PROPOSED):
        pytest.skip("this kernel sets the flag")
    echo = Echo()
    config = {"devices": [avmm.pio(echo, 0x300, 4)], "completion_capability": OTHER}
    async with machine(tmp_path, ECHO, **config) as vm:
        policy = vm._inside.parts.policy
        assert policy.describe() == f"the kernel's flag (capability {OTHER})"
        await pauses(vm, echo, lambda: policy.lie)
        assert policy.describe().startswith("the documented list (KVM_RUN_NEEDS_COMPLETION")
    lie = f"KVM_RUN_NEEDS_COMPLETION (capability {OTHER}) is clear where it must be set"
    assert f"{lie}, at KVM_EXIT_IO, so avmm goes by its own list of exits" in caplog.text
    assert echo.seen == list(range(len(echo.seen)))


@proposing
async def test_the_number_alone_is_not_believed(tmp_path: Path) -> None:
    assert announces(PROPOSED)
    async with machine(tmp_path, "1: pause; jmp 1b") as vm:
        assert vm._inside.parts.policy.describe() == "the documented list"


@proposing
async def test_the_kernel_proves_itself(tmp_path: Path) -> None:
    echo = Echo()
    async with machine(tmp_path, ECHO, devices=[avmm.pio(echo, 0x300, 4)]) as vm:
        policy = vm._inside.parts.policy
        await pauses(vm, echo, lambda: policy.by_flag)
        assert policy.describe() == "the kernel's flag (proved)"
    assert echo.seen == list(range(len(echo.seen)))


class Gated(Device):
    """Answers each access when it may."""

    def __init__(self) -> None:
        self.close()

    def close(self) -> None:
        self.asked, self.open = trio.Event(), trio.Event()

    async def read(self, offset: int, size: int) -> int:  # type: ignore[override]
        await self._pass()
        return 0

    async def write(self, offset: int, size: int, value: int) -> None:  # type: ignore[override]
        await self._pass()

    async def _pass(self) -> None:
        self.asked.set()
        await self.open.wait()


class Entries:
    """How often the only vCPU of these parts was entered, by its loop or to complete an exit."""

    def __init__(self, parts: Parts) -> None:
        self.count = 0
        for runs in (parts.vcpus[0], parts.group.loops[0]._spot):
            runs.run = self._counted(runs.run)

    def _counted(self, run: Callable[[], int]) -> Callable[[], int]:
        def counted() -> int:
            self.count += 1
            return run()

        return counted

    async def until_parked(self, vm: avmm.Machine, device: Gated) -> int:
        """For the exit that the device has in hand, the one that brought it included."""
        await device.asked.wait()
        before = self.count - 1
        entries = []
        async with trio.open_nursery() as nursery:

            async def pause() -> None:
                async with vm.paused(deadline=20):
                    entries.append(self.count - before)
                    device.close()

            nursery.start_soon(pause)
            while not vm._inside.parts.group._lot.asked:
                await trio.lowlevel.checkpoint()
            device.open.set()
        return entries[0]


@pytest.mark.parametrize(
    ("config", "at_output"),
    [
        pytest.param({"completion": "always"}, 2, marks=pytest.mark.lab),
        pytest.param({"completion": "list"}, 2, marks=pytest.mark.lab),
        pytest.param({"completion_capability": PROPOSED}, 1, marks=proposing),
        pytest.param({}, 1, marks=proposing, id="proved"),
    ],
)
async def test_an_output_that_the_kernel_is_through_with_is_not_entered_for_again(
    tmp_path: Path, config: dict[str, Any], at_output: int
) -> None:
    """An element of `rep outs`; an input, which shows the flag as well, always is."""
    device = Gated()
    code = """
        2: mov dx, 0x300
        in al, dx
        mov esi, 0x100000
        mov ecx, 3
        rep outsb
        jmp 2b
    """
    vm = machine(tmp_path, code, devices=[avmm.pio(device, 0x300, 1)], **config)
    parts = await vm._build()
    entries = Entries(parts)  # before its vCPU's thread begins
    async with machine_of(parts, vm._life) as vm:
        for _ in range(3):
            assert await entries.until_parked(vm, device) == 2
            for _ in range(3):
                assert await entries.until_parked(vm, device) == at_output


@proposing
@pytest.mark.timeout(180)
@pytest.mark.parametrize("cpus", ["1", "2"])
def test_the_torture_guest_with_the_flag_alone_deciding(cpus: str) -> None:
    options = ["--capability", str(PROPOSED), "--cpus", cpus, "--every", "23", "--first", "3"]
    torture(*options, *(["--hypercall"] if cpus == "1" else []))
    if cpus == "1":  # the hypercall is its last access, the filtered MSR's come before it
        torture(*options, "--hypercall", "--last", "16", "--every", "1")


@pytest.mark.lab(only="stock", long=True)
@pytest.mark.timeout(180)
def test_the_torture_guest_with_its_hypercalls() -> None:
    torture("--hypercall", "--every", "23", "--first", "3")
    torture("--hypercall", "--last", "16", "--every", "1")


def torture(*options: str) -> None:
    """The guest, moved at some of its exits."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "support.torture", *options],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[1]) > 10
    assert "its own list" not in done.stderr


CALL = "mov eax, 12; mov rbx, 0x100000; mov ecx, 1; xor edx, edx; vmmcall; mov ebx, eax;"


@pytest.mark.lab(only="stock")
async def test_a_hypercall_is_answered_on_stock_kvm(tmp_path: Path) -> None:
    calls: list[Call] = []

    def answer(call: Call) -> int:
        calls.append(call)
        return 42

    async with machine(tmp_path, CALL + EXIT.format("ebx"), calls=answer) as vm:
        assert (await vm.wait()).status == 42
    assert [(call.kind, call.number, call.args[:3]) for call in calls] == [
        ("kvm", 12, (0x10_0000, 1, 0))
    ]


@pytest.mark.parametrize(
    "capability",
    [
        pytest.param(None, marks=pytest.mark.lab(only="stock")),
        pytest.param(PROPOSED, marks=proposing),
    ],
)
async def test_a_hypercall_that_a_pause_catches_is_neither_lost_nor_repeated(
    tmp_path: Path, capability: int | None
) -> None:
    calls, code = HeldCalls(), CALL + EXIT.format("ebx")
    config: dict[str, Any] = {"completion_capability": capability}
    state = await caught(calls, tmp_path, code, **config)
    async with machine(tmp_path, code, state=state, calls=calls, **config) as vm:
        assert (await vm.wait()).status == ANSWER
    assert len(calls.seen) == 1


@pytest.fixture
def halting() -> Iterator[X86Vcpu]:
    """A vCPU of a VM without interrupt chips, in real mode, before `hlt`."""
    system = open_system()
    vm = system.create_vm()
    memory = GuestMemory("1M")
    vm.set_memory(0, 0, memory.addresses()[0][1])
    memory.write(0x1000, b"\xf4")
    vcpu = vm.create_vcpu(0)
    sregs, regs = vcpu.sregs(), vcpu.regs()
    sregs.cs.base = sregs.cs.selector = 0
    regs.rip, regs.rflags = 0x1000, 2
    vcpu.set_sregs(sregs)
    vcpu.set_regs(regs)
    yield vcpu
    vcpu.close()
    vm.close()
    memory.close()
    system.close()


@proposing
def test_an_exit_without_the_flag_is_not_entered_again(halting: X86Vcpu) -> None:
    policy = CompletionPolicy(capability=PROPOSED, announced=True)
    status = halting.run()
    assert status == constants.KVM_EXIT_HLT
    assert not halting.page.flags & NEEDS_COMPLETION
    assert not policy.needs(status, halting.page.flags)
    halting.page.immediate_exit = 1
    assert halting.run() == -errno.EINTR
    assert not policy.lie
