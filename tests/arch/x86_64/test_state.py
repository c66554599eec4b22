"""State read from one machine and loaded into another: whole, in order, and never believed."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from support.engines import open_system
from support.guest import EXIT, machine

import avmm
from avmm import engine
from avmm.arch.x86_64 import cpu, layout
from avmm.arch.x86_64 import state as cpu_state
from avmm.arch.x86_64.features import demand
from avmm.arch.x86_64.kvm import X86System, X86Vcpu
from avmm.kvm import KvmError

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kvm", "nothing_left")]

PROMPT = b"avmm> "


async def prompt(vm: avmm.Machine) -> bytes:
    said = b""
    while not said.endswith(PROMPT):
        said += await vm.console.receive_some()
    return said


async def test_a_loaded_machine_goes_on_with_timers_cpus_and_half_typed_lines() -> None:
    async with avmm.Machine(memory="16M", cpus=2) as vm:
        await prompt(vm)
        await vm.console.send_all(b"cpus\r")
        await prompt(vm)
        await vm.console.send_all(b"echo hel")
        async with vm.paused(deadline=20):
            state = vm.save()
    async with avmm.Machine(memory="16M", cpus=2, state=state) as vm:
        await vm.console.send_all(b"lo\rcpus\rcount 3\rburn 1 1\rexit 5\r")
        said = b"".join([bytes(data) async for data in vm.console])
        assert (await vm.wait()).status == 5
    assert b"\r\nhello\r\n" in said
    assert said.count(b"answers an interrupt") == 2
    # One second of the guest's timer interrupt: it ticks on after the load.
    assert b"wrote to " in said


REGISTERS = """
    mov rax, 0x1111111111111111; mov rbx, 0x2222222222222222; mov r15, 0x3333333333333333
    mov rcx, cr4; or rcx, 0x600; mov cr4, rcx
    mov rdx, 0x4444444444444444; mov [0x200000], rdx; movups xmm3, [0x200000]
    std; stc
    1: inc r14; jmp 1b
"""


async def test_registers_survive_to_the_bit(tmp_path: Path) -> None:
    async with machine(tmp_path, REGISTERS) as vm:
        while vm.memory.read(0x200000, 8) == bytes(8):
            await trio.lowlevel.checkpoint()
        async with vm.paused():
            state = vm.save()
    again, vm_again = loaded(state)
    assert vm_again["irqchips"] == state["vm"]["irqchips"]
    # The TSC runs on and its deadline follows it; Hyper-V's two clocks run on as well.
    moving = {0x10, 0x6E0, 0x4000_0010, 0x4000_0020}
    was = {index: value for index, value in state["vcpus"][0]["msrs"] if index not in moving}
    now = {index: value for index, value in again["msrs"] if index not in moving}
    assert now == was
    for part in ("regs", "sregs", "xsave", "xcrs", "debugregs", "mp_state", "cpuid", "events"):
        assert again[part] == state["vcpus"][0][part], part


def loaded(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of a vCPU and of its VM that were given this machine's."""
    system = open_system()
    kvm = system.create_vm()
    kvm.create_irqchip(0xFFFB_C000, 0xFFFB_D000)
    kvm.create_pit()
    vcpu = kvm.create_vcpu(0)
    try:
        cpu_state.load_vm(kvm, state["vm"])
        cpu_state.load_vcpu(system, vcpu, state["vcpus"][0])
        cpu_state.load_time([vcpu], state["vcpus"])
        return cpu_state.save_vcpu(system, vcpu), cpu_state.save_vm(kvm)
    finally:
        vcpu.close()
        kvm.close()
        system.close()


HALTED = struct.pack("<I", 3)
DEADLINE, TSC, CR8 = 0x6E0, 0x10, 0x100
TPR, SPURIOUS, TIMER, DEADLINE_MODE = 0x80, 0xF0, 0x320, 2 << 17


def busy(state: dict[str, Any]) -> None:
    """In every part something that no new vCPU has (the structures of asm/kvm.h)."""
    vcpu, vm = state["vcpus"][0], state["vm"]
    vcpu["mp_state"] = HALTED
    breakpoints = struct.pack("<4QQQ", 0x1111, 0x2222, 0x3333, 0x4444, 0xFFFF_4FF1, 0x401)
    vcpu["debugregs"] = breakpoints + vcpu["debugregs"][len(breakpoints) :]
    head = vcpu["xcrs"][:16]
    vcpu["xcrs"] = head + struct.pack("<Q", 3) + vcpu["xcrs"][24:]
    # A #GP on its way, after an STI, an NMI pending while NMIs are masked; these parts are valid.
    events = struct.pack("<4BI4B4BII", 1, 13, 1, 0, 0x18, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1 | 4)
    vcpu["events"] = events + vcpu["events"][len(events) :]
    lapic, sregs, pit = bytearray(vcpu["lapic"]), bytearray(vcpu["sregs"]), bytearray(vm["pit"])
    for at, value in ((TPR, 0x20), (SPURIOUS, 0x1FF), (TIMER, DEADLINE_MODE | 0xEC)):
        struct.pack_into("<I", lapic, at, value)
    struct.pack_into("<Q", sregs, CR8, 2)  # the LAPIC's task priority, seen from the CPU
    struct.pack_into("<IHB", pit, 2 * PIT_CHANNEL, 0x1234, 0, 0)
    vcpu["lapic"], vcpu["sregs"], vm["pit"] = bytes(lapic), bytes(sregs), bytes(pit)
    vm["clock"] = 10**15
    msrs = dict(vcpu["msrs"])
    msrs[DEADLINE] = msrs[TSC] + 10**13
    vcpu["msrs"] = [[index, value] for index, value in msrs.items()]


PIT_CHANNEL, SHADOW = 24, 11


async def test_what_a_busy_vcpu_has_survives(tmp_path: Path) -> None:
    async with machine(tmp_path, "1: pause; jmp 1b") as vm, vm.paused():
        state = vm.save()
    before = copy.deepcopy(state)
    busy(state)
    wanted = state["vcpus"][0]
    for part in ("mp_state", "debugregs", "xcrs", "events", "lapic", "sregs"):
        assert wanted[part] != before["vcpus"][0][part], part
    vcpu, kvm = loaded(state)
    for part in ("mp_state", "regs", "sregs", "xsave", "xcrs", "debugregs"):
        assert vcpu[part] == wanted[part], part
    assert vcpu["events"][:SHADOW] == wanted["events"][:SHADOW]
    assert vcpu["events"][SHADOW]  # AMD has one bit for both kinds
    assert vcpu["events"][SHADOW + 1 : 20] == wanted["events"][SHADOW + 1 : 20]
    for at in (TPR, SPURIOUS, TIMER):
        assert vcpu["lapic"][at : at + 4] == wanted["lapic"][at : at + 4], hex(at)
    assert dict(vcpu["msrs"])[DEADLINE] == dict(wanted["msrs"])[DEADLINE]
    assert kvm["pit"][2 * PIT_CHANNEL :][:4] == struct.pack("<I", 0x1234)
    assert 0 <= kvm["clock"] - 10**15 < 60 * 10**9


NMI_PENDING, NMI_MASKED, PENDING_IS_VALID = 13, 14, 1


def test_two_nmis_that_wait_are_two(system: X86System) -> None:
    with fresh(system) as vcpu:
        state = cpu_state.save_vcpu(system, vcpu)
        events = bytearray(state["events"])
        events[NMI_PENDING], events[NMI_MASKED], events[16] = 2, 0, PENDING_IS_VALID
        cpu_state.load_vcpu(system, vcpu, state | {"events": bytes(events)})
        told = cpu_state.save_vcpu(system, vcpu)["events"][NMI_PENDING]
    if told == 1 and system.engine == engine.KVM:
        pytest.skip("this host's KVM tells only whether an NMI waits (before Linux 6.4)")
    assert told == 2


async def test_a_deadline_that_has_just_fired_is_saved_as_now(tmp_path: Path) -> None:
    """It reads 0 then; written as that, it would take the interrupt back."""
    async with machine(tmp_path, "1: pause; jmp 1b") as vm, vm.paused():
        state = vm.save()
    busy(state)
    msrs = dict(state["vcpus"][0]["msrs"])
    msrs[DEADLINE] = 0
    state["vcpus"][0]["msrs"] = [[index, value] for index, value in msrs.items()]
    found = dict(loaded(state)[0]["msrs"])
    assert found[DEADLINE] == found[TSC] != 0


@pytest.fixture
async def saved(tmp_path: Path) -> dict[str, Any]:
    async with machine(tmp_path, "1: pause; jmp 1b", cpus=2) as vm, vm.paused():
        return vm.save()


Spoil = Callable[[dict[str, Any]], object]


@pytest.fixture
def system() -> Iterator[X86System]:
    system = open_system()
    yield system
    system.close()


@contextmanager
def fresh(system: X86System) -> Iterator[X86Vcpu]:
    with closing(system.create_vm()) as vm:
        vm.create_irqchip(layout.KVM_IDENTITY_MAP, layout.KVM_TSS)
        with closing(vm.create_vcpu(0)) as vcpu:
            vcpu.set_cpuid(cpu.cpuid(system, 0, cpus=1))
            yield vcpu


class Noted:
    """A vCPU, and what is asked of it, in order."""

    def __init__(self, vcpu: X86Vcpu) -> None:
        self.vcpu = vcpu
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.vcpu, name)
        if not callable(found):
            return found

        def ask(*arguments: Any) -> Any:
            what = arguments[0] if arguments else None
            if name == "set_msrs":
                kinds = {{TSC: "tsc", DEADLINE: "deadline"}.get(index, "most") for index in what}
                what = "+".join(sorted(kinds))
            self.asked.append(f"{name} {what}" if isinstance(what, str) else name)
            return found(*arguments)

        return ask


def test_the_order_of_state_is_that_of_its_reasons(system: X86System) -> None:
    """`avmm.arch.x86_64.state` gives them; on many a host a guest in a test would not notice."""
    with fresh(system) as vcpu:
        reading: Any = Noted(vcpu)
        state = cpu_state.save_vcpu(system, reading)
    assert reading.asked[0] == "state mp_state"
    assert reading.asked[-1] == "state events"
    parts = ("regs", "sregs", "xcrs", "debugregs", "lapic")
    assert {f"state {part}" for part in parts} < set(reading.asked)
    with fresh(system) as vcpu:
        writing: Any = Noted(vcpu)
        cpu_state.load_vcpu(system, writing, state)
        cpu_state.load_time([writing], [state])
    written = [what for what in writing.asked if what.startswith(("set_", "clock_paused"))]
    time = [what for what in written if "tsc" in what]
    assert [what for what in written if what not in (*time, "set_cpuid")] == [
        "set_cpuid_leaves",
        *(f"set_state {part}" for part in ("mp_state", "regs", "sregs")),
        "set_xsave",
        *(f"set_state {part}" for part in ("xcrs", "debugregs", "lapic")),
        "set_msrs most",
        "set_state events",
        "clock_paused",
        *["set_msrs deadline"] * (DEADLINE in dict(state["msrs"])),
    ]
    assert time
    assert max(map(written.index, time)) > written.index("clock_paused")


def test_an_msr_that_kvm_does_not_give_is_named(system: X86System) -> None:
    with fresh(system) as vcpu, pytest.raises(KvmError, match="0xbadf00d"):
        vcpu.msrs([0x10, 0xBADF00D, 0x174])


NUMBERS: Final = (0, 0, 0, 13, 0, 0, 0), (1, 0, 0, 0, 0, 0, 0)
FEATURES: Final = (
    *((0x1, 0, "ecx"), (0x1, 0, "edx"), (0x6, 0, "eax"), (0x7, 0, "ebx"), (0x7, 0, "ecx")),
    *((0x7, 0, "edx"), (0x7, 1, "eax"), (0x7, 1, "ebx"), (0x7, 1, "ecx"), (0x7, 1, "edx")),
    *((0x7, 2, "edx"), (0xD, 0, "eax"), (0xD, 0, "edx"), (0xD, 1, "eax")),
    *((0x4000_0001, 0, "eax"), (0x8000_0001, 0, "ecx"), (0x8000_0001, 0, "edx")),
    *((0x8000_0007, 0, "edx"), (0x8000_0008, 0, "ebx"), (0x8000_0021, 0, "eax")),
)


@pytest.mark.parametrize(("function", "index", "register"), FEATURES)
def test_a_feature_that_only_the_state_has_is_named(
    function: int, index: int, register: str
) -> None:
    words = [0] * 4
    words[["eax", "ebx", "ecx", "edx"].index(register)] = 1 << 8
    leaf = (function, index, 0, *words)
    demand([*NUMBERS, leaf], [*NUMBERS, leaf])
    demand(NUMBERS, [*NUMBERS, leaf])
    named = rf"bits\): {function:#x}\.{index} {register} bits 8$"
    with pytest.raises(avmm.StateError, match=named):
        demand([*NUMBERS, leaf], NUMBERS)


def _promise(state: dict[str, Any], function: int, column: int, bits: int) -> None:
    """Bits that no KVM offers: RDT-A and a reserved one."""
    for leaf in state["vcpus"][1]["cpuid"]:
        if leaf[:2] == [function, 0]:
            leaf[column] |= bits


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.update(version=99), "machine's state has version 99, expected 2$"),
        (lambda s: s.update(version=1), "machine's state has version 1, expected 2$"),
        (lambda s: s.update(memory_size=1), "memory_size is 1, expected 4194304, as the ma"),
        (lambda s: s.update(vcpus=s["vcpus"][:1]), "vcpus is a list of 1, expected a list of 2$"),
        (
            lambda s: s["devices"].pop(),
            r"devices is a list of \d+, expected the states of Serial, ",
        ),
        (lambda s: s["devices"].reverse(), "devices is a list of .*, expected the states of Ser"),
        (lambda s: s.update(devices=5), "state: devices is 5, expected a list of 0 to"),
        (lambda s: s.update(memory=[[1 << 60, b"x"]]), "memory does not fit"),
        (lambda s: s.update(memory=[[-4096, b"x"]]), r"memory\[0\]\[0\] is -4096, expected a n"),
        (lambda s: s.update(memory=[[0, "text"]]), r"memory\[0\]\[1\] is 'text', expected bytes"),
        (lambda s: s.update(more=1), "machine's state has 'more', expected the keys version, me"),
        (lambda s: s["vm"].update(version=2), "the VM's state has version 2"),
        (lambda s: s["vm"].pop("pit"), "the VM's state lacks pit, expected the keys version, "),
        (lambda s: s["vm"].update(pit=b"short"), "5 bytes, expected"),
        (
            lambda s: s["vm"].update(clock=-1),
            "the VM's state: clock is -1, expected a number from 0 to 0xf{16}",
        ),
        (lambda s: s["vm"]["irqchips"].pop(), "irqchips is a list of 2, expected a list of 3 e"),
        (lambda s: s["vm"].update(irqchips=[520] * 3), r"irqchips\[0\] is 520, expected .* bytes"),
        (lambda s: s["vm"].update(more=1), "the VM's state has 'more', expected the keys version"),
        (lambda s: s["vm"].update(irqchips=[b"", b"", b""]), "two PICs and an IOAPIC"),
        (lambda s: s["vm"]["irqchips"].reverse(), "two PICs and an IOAPIC"),
        (lambda s: s["vm"].update(irqchips=[c[:9] for c in s["vm"]["irqchips"]]), "9 bytes, exp"),
        (lambda s: s.update(version=True), "machine's state has version True, expected 2"),
        (lambda s: s["vm"].update(version=True), "the VM's state has version True"),
        (
            lambda s: s["vcpus"][1].pop("lapic"),
            "vCPU 1's state lacks lapic, expected the keys version, mp_state",
        ),
        (lambda s: s["vcpus"][1].update(regs=b"x"), "regs: 1 bytes, expected 144"),
        (lambda s: s["vcpus"][1].update(xsave=b"x" * 64), "XSAVE area has 64 bytes"),
        (lambda s: s["vcpus"][1].update(version=2), "vCPU 1's state has version 2, expected 1"),
        (lambda s: s["vcpus"][1].update(more=1), "vCPU 1's state has 'more', expected the keys"),
        (lambda s: s["vcpus"][1].update(regs="x" * 144), "regs is 'x.* expected 0 to 65536 bytes"),
        (lambda s: s["vcpus"][1].update(tsc_offset=-1), "tsc_offset is -1, expected a number"),
        (lambda s: s["vcpus"][1].pop("tsc_offset"), "vCPU 1's state lacks tsc_offset"),
        (
            lambda s: s["vcpus"][1].update(cpuid=[[1, 2]]),
            r"cpuid\[0\] is a list of 2, expected a l",
        ),
        (
            lambda s: s["vcpus"][1].update(cpuid=[[1 << 32] * 7]),
            r"cpuid\[0\]\[0\] is 0x10{8}, exp",
        ),
        (
            lambda s: s["vcpus"][1].update(msrs=[[1 << 70, 0]]),
            r"msrs\[0\]\[0\] is 0x4.*, expected",
        ),
        (lambda s: s["vcpus"][1]["msrs"].append([0x12345678, 0]), "lacks MSRs .*0x12345678"),
        (lambda s: s["vcpus"][1].update(msrs=[]), "has no values of the MSRs 0x10, 0x174"),
        (lambda s: s["vcpus"][1].update(cpuid=[]), "does not describe a processor"),
        (lambda s: _promise(s, 7, 4, 1 << 15), "lacks features .*: 0x7.0 ebx bits 15$"),
        (lambda s: _promise(s, 1, 5, 1 << 16), "lacks features .*: 0x1.0 ecx bits 16$"),
        # VMX and SVM, which none is told of: what a guest's guests are doing is in no state.
        (lambda s: _promise(s, 1, 5, 1 << 5), "lacks features .*: 0x1.0 ecx bits 5$"),
        (lambda s: _promise(s, 0x8000_0001, 5, 1 << 2), "features .*: 0x80000001.0 ecx bits 2$"),
        (lambda s: s["vcpus"][1].update(tsc_khz=1), "cannot scale it|refuses|does not let"),
        *(
            (lambda s, khz=khz: s["vcpus"][1].update(tsc_khz=khz), "tsc_khz is .* number from 1 t")
            for khz in (0, -1, 1 << 32, 1 << 70)
        ),
    ],
)
async def test_what_is_no_state_of_this_machine_is_refused(
    saved: dict[str, Any], tmp_path: Path, spoil: Spoil, message: str
) -> None:
    state = copy.deepcopy(saved)
    spoil(state)
    with pytest.raises(avmm.StateError, match=message):
        async with machine(tmp_path, EXIT.format(0), cpus=2, state=state):
            pytest.fail("it was loaded")


async def test_an_msr_that_kvm_does_not_take_is_named(
    saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: X86Vcpu, values: dict[int, int]) -> None:
        raise avmm.KvmError("KVM_SET_MSRS", 22, f"MSR {next(iter(values)):#x} refused")

    monkeypatch.setattr(X86Vcpu, "set_msrs", refuse)
    with pytest.raises(avmm.StateError, match=r"refuses the state of vCPU 0: .*MSR 0x.* refused"):
        async with machine(tmp_path, EXIT.format(0), cpus=2, state=saved):
            pytest.fail("it was loaded")


async def test_a_tsc_that_kvm_keeps_for_itself_is_not_let_go_back(
    saved: dict[str, Any], tmp_path: Path
) -> None:
    state = copy.deepcopy(saved)
    for vcpu in state["vcpus"]:
        vcpu["msrs"] = [[index, 1 << 60 if index == 0x10 else v] for index, v in vcpu["msrs"]]
    try:
        async with machine(tmp_path, EXIT.format(0), cpus=2, state=state):
            pass
    except avmm.StateError as error:
        assert "would go back by" in str(error)
    else:
        pytest.skip("this KVM sets a guest's TSC")


COUNT_CYCLES = "1: rdtsc; shl rdx, 32; or rax, rdx; mov [0x200000], rax; jmp 1b"


async def test_a_young_guests_tsc_does_not_go_back(tmp_path: Path) -> None:
    """KVM synchronises a TSC that is near what it expects with its own, which has just begun."""
    async with machine(tmp_path, COUNT_CYCLES, cpus=2) as vm:
        while vm.memory.read(0x200000, 8) == bytes(8):
            await trio.lowlevel.checkpoint()
        async with vm.paused(deadline=20):
            state = vm.save()
    async with machine(tmp_path, COUNT_CYCLES, cpus=2, state=state) as vm:
        with vm.memory.view(0x200000, 8) as seen:
            before = bytes(seen)
            while bytes(seen) == before:
                await trio.lowlevel.checkpoint()
            assert int.from_bytes(seen, "little") > int.from_bytes(before, "little")


async def test_tscs_keep_their_distance(tmp_path: Path) -> None:
    """One vCPU's TSC is a second ahead of the others', as a guest may set it."""
    async with machine(tmp_path, COUNT_CYCLES, cpus=3) as vm, vm.paused(deadline=20):
        state = vm.save()
    offsets = [vcpu["tsc_offset"] for vcpu in state["vcpus"]]
    if offsets[0] is None:
        pytest.skip("this KVM does not tell TSC offsets")
    ahead = 1000 * state["vcpus"][1]["tsc_khz"]
    state["vcpus"][1]["tsc_offset"] = (offsets[1] + ahead) % (1 << 64)
    async with machine(tmp_path, COUNT_CYCLES, cpus=3, state=state) as vm:
        loaded = [vcpu.tsc_offset() for vcpu in vm._inside.parts.vcpus]
    if not any(loaded):
        pytest.skip("this KVM gives guests the host's TSC")
    saved = [vcpu["tsc_offset"] for vcpu in state["vcpus"]]
    distances = [[(offset - all_[0]) % (1 << 64) for offset in all_] for all_ in (saved, loaded)]
    assert distances[0] == distances[1]


async def test_a_frequency_that_kvm_does_not_take_over_is_noticed(
    saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A KVM that says it can scale a TSC, and does not."""
    check = X86System.check
    monkeypatch.setattr(
        X86System, "check", lambda self, name: name == "KVM_CAP_TSC_CONTROL" or check(self, name)
    )
    monkeypatch.setattr(X86Vcpu, "set_tsc_khz", lambda self, khz: None)
    state = copy.deepcopy(saved)
    state["vcpus"][1]["tsc_khz"] += 100_000
    with pytest.raises(avmm.StateError, match="does not let a TSC run at"):
        async with machine(tmp_path, EXIT.format(0), cpus=2, state=state):
            pytest.fail("it was loaded")
