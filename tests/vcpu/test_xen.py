"""Xen's hypercalls: answered by the handler, drained, and refused where nobody can."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.engines import open_system
from support.guest import EXIT, machine
from support.held_call import ANSWER, HeldCalls, caught

from avmm import Call, ConfigError
from avmm.kvm import constants
from avmm.vcpu.calls import XEN_MSR

pytestmark = pytest.mark.usefixtures("kvm")

PAGE, NUMBER = 0x20_0000, 17
MADE = f"mov rsp, 0x300000; mov ecx, {XEN_MSR}; mov eax, {PAGE}; xor edx, edx; wrmsr;"
"""The guest lets KVM fill its hypercall page."""
CALL = (
    "mov edi, 1; mov rsi, 0x1122334455667788; mov edx, 3; mov r10d, 4; mov r8d, 5; mov r9d, 6;"
    f"mov rax, {PAGE + 32 * NUMBER}; call rax; mov ebx, eax;"
)
EXPECTED = Call("xen", NUMBER, (1, 0x1122_3344_5566_7788, 3, 4, 5, 6))


@pytest.fixture
def intercepting(kvm: None) -> None:
    system = open_system()
    offered = system.check("KVM_CAP_XEN_HVM")
    system.close()
    if not offered & constants.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL:
        pytest.skip("this host's KVM does not hand Xen's hypercalls over (CONFIG_KVM_XEN)")


@pytest.mark.lab
@pytest.mark.usefixtures("intercepting")
async def test_a_xen_hypercall_is_answered(tmp_path: Path) -> None:
    calls: list[Call] = []

    def answer(call: Call) -> int:
        calls.append(call)
        return 40 + len(calls)

    code = MADE + CALL + CALL + EXIT.format("ebx")
    async with machine(tmp_path, code, calls=answer, xen=True) as vm:
        assert (await vm.wait()).status == 42
    assert calls == [EXPECTED, EXPECTED]


@pytest.mark.lab
@pytest.mark.usefixtures("intercepting")
async def test_kvms_hypercalls_are_xens_then(tmp_path: Path) -> None:
    """Without the setting KVM answers number 1 by itself; and it has no number 17."""
    calls: list[Call] = []

    def answer(call: Call) -> int:
        calls.append(call)
        return 42

    system = open_system()
    leaves = system.supported_cpuid()
    system.close()
    genu = int.from_bytes(b"Genu", "little")
    intel = any(e.ebx == genu for e in leaves.entries[0 : leaves.nent] if e.function == 0)
    code = f"mov eax, 1; {'vmcall' if intel else 'vmmcall'}; mov ebx, eax;" + EXIT.format("ebx")
    async with machine(tmp_path, code, calls=answer, xen=True) as vm:
        assert (await vm.wait()).status == 42
    assert [(call.kind, call.number) for call in calls] == [("xen", 1)]
    async with machine(tmp_path, code, calls=answer) as vm:
        assert (await vm.wait()).status == 0
    assert len(calls) == 1


@pytest.mark.lab
@pytest.mark.usefixtures("intercepting")
async def test_a_xen_hypercall_that_a_pause_catches_is_neither_lost_nor_repeated(
    tmp_path: Path,
) -> None:
    calls, code = HeldCalls(), MADE + CALL + EXIT.format("ebx")
    state = await caught(calls, tmp_path, code, xen=True)
    async with machine(tmp_path, "hlt") as fresh:
        first = fresh.memory.read(0, 4096)
    async with machine(tmp_path, code, state=state, calls=calls, xen=True) as vm:
        assert vm.memory.read(0, 4096) == first, "no hypercall page where there was none"
        assert (await vm.wait()).status == ANSWER
    assert calls.seen == [EXPECTED]


async def test_without_a_handler_nobody_would_answer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="xen: expected a handler for the hypercalls"):
        async with machine(tmp_path, "hlt", xen=True):
            pass


async def test_a_host_that_cannot_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avmm.arch.x86_64.kvm.X86Vm.intercept_xen", lambda vm, msr: False)
    with pytest.raises(ConfigError, match=r"xen: this host's KVM does not .*KVM_CAP_XEN_HVM"):
        async with machine(tmp_path, "hlt", calls=lambda call: 0, xen=True):
            pass
