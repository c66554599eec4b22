"""MSRs of a user's own: read, written, refused; and placements that KVM cannot do."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from support.engines import open_system
from support.guest import EXIT, machine

import avmm
from avmm.arch.x86_64.kvm import X86Vm
from avmm.devices.base import ReadAnswer, WriteAnswer
from avmm.kvm import KvmError

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kvm", "nothing_left")]

FIRST, SECOND = 0x1234_5600, 0x1234_5700
LINUX_5_10 = ("KVM_CAP_X86_USER_SPACE_MSR", "KVM_CAP_X86_MSR_FILTER")


class Registers(avmm.Device):
    """Remembers what is written; has no third one."""

    def __init__(self) -> None:
        self.values = [0x1111_2222_3333_4444, 0x5555_6666_7777_8888]

    def read(self, offset: int, size: int) -> ReadAnswer:
        if offset // 8 == len(self.values):
            raise avmm.MsrFault
        return self.values[offset // 8]

    def write(self, offset: int, size: int, value: int) -> WriteAnswer:
        if offset // 8 == len(self.values):
            raise avmm.MsrFault
        self.values[offset // 8] = value
        return None


async def test_two_devices_each_have_their_own(tmp_path: Path) -> None:
    one, two = Registers(), Registers()
    code = f"""
        mov ecx, {FIRST + 1}; rdmsr
        mov ecx, {SECOND}; wrmsr
    """
    devices = [avmm.msr(one, FIRST, 3), avmm.msr(two, SECOND, 3)]
    async with machine(tmp_path, code + EXIT.format(0), devices=devices) as vm:
        assert (await vm.wait()).status == 0
    assert one.values == Registers().values
    assert two.values == [0x5555_6666_7777_8888] * 2


@pytest.mark.parametrize("access", ["rdmsr", "wrmsr"])
async def test_one_that_is_refused_is_a_fault_of_the_guest(tmp_path: Path, access: str) -> None:
    """Which has no handler for it."""
    code = f"mov ecx, {FIRST + 2}; {access};"
    async with machine(
        tmp_path, code + EXIT.format(0), devices=[avmm.msr(Registers(), FIRST, 3)]
    ) as vm:
        assert (await vm.wait()).cause is avmm.Cause.TRIPLE_FAULT


async def test_what_kvm_keeps_to_itself_is_nobodys_else() -> None:
    message = r"Registers at msr 0x802 overlaps the LAPIC at 0x800-0x8ff"
    with pytest.raises(avmm.ConfigError, match=message):
        async with avmm.Machine(devices=[avmm.msr(Registers(), 0x802)]):
            pass


async def test_more_ranges_than_kvm_filters() -> None:
    devices = [avmm.msr(Registers(), FIRST + n) for n in range(17)]
    with pytest.raises(avmm.ConfigError, match=r"Registers: 17 ranges .* at most 16"):
        async with avmm.Machine(devices=devices):
            pass


def test_nor_are_any_left_out_below() -> None:
    with closing(open_system()) as system, closing(system.create_vm()) as vm:
        vm.filter_msrs([(FIRST + n, 1) for n in range(16)])
        with pytest.raises(KvmError, match="17 ranges of MSRs"):
            vm.filter_msrs([(FIRST + n, 1) for n in range(17)])


@pytest.mark.parametrize("lacking", LINUX_5_10)
async def test_a_kernel_that_does_not_hand_them_over(
    monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    check = X86Vm.check
    monkeypatch.setattr(X86Vm, "check", lambda vm, name: 0 if name == lacking else check(vm, name))
    with pytest.raises(avmm.ConfigError, match=r"Registers: this host's KVM .* \(Linux 5\.10\)"):
        async with avmm.Machine(devices=[avmm.msr(Registers(), FIRST)]):
            pass
