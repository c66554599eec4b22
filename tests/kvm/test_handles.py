"""The border to the kernel: errors that say what to do, handles that close, and a real VM."""

from __future__ import annotations

import errno
import grp
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.assembler import assemble
from support.engines import open_system

import avmm
from avmm.arch.x86_64.board import PINS
from avmm.arch.x86_64.kvm import X86System, X86Vcpu, X86Vm
from avmm.bus.interrupts import Interrupts, IrqLine
from avmm.errors import AvmmError, ConfigError
from avmm.kvm import KvmError, KvmUnavailable, capabilities, constants, errors, exit_name
from avmm.kvm.exits import MmioExit
from avmm.kvm.kick import accept_kicks, install_kick, kick

pytestmark = pytest.mark.lab(also="stock")

PAGE = 4096
ORIGIN = 0x1000
RAM = 0x1_0000
LAPIC_BASE = 0xFEE0_0000


# -- errors in words -----------------------------------------------------------------------


def test_an_error_says_what_failed_why_and_what_to_do() -> None:
    error = KvmError("KVM_CREATE_VM", errno.EBUSY)
    assert str(error) == (
        "KVM_CREATE_VM failed: Device or resource busy (EBUSY); "
        "another hypervisor on this host holds the CPU's VM mode"
    )
    assert (error.ioctl, error.errno) == ("KVM_CREATE_VM", errno.EBUSY)
    assert isinstance(error, AvmmError)
    assert isinstance(error, OSError)


def test_a_hint_of_the_callers_comes_first() -> None:
    error = KvmError("KVM_CREATE_VM", errno.EBUSY, "wait")
    assert str(error) == "KVM_CREATE_VM failed: Device or resource busy (EBUSY); wait"


def test_some_errors_mean_the_same_whatever_failed() -> None:
    assert "a newer kernel is needed" in str(KvmError("KVM_SIGNAL_MSI", errno.ENOTTY))
    assert "ulimit -n" in str(KvmError("KVM_CREATE_VCPU", errno.EMFILE))


def test_an_error_without_a_hint_ends_there() -> None:
    assert str(KvmError("KVM_RUN", errno.EIO)) == "KVM_RUN failed: Input/output error (EIO)"


def test_an_error_without_a_name_is_its_number() -> None:
    assert str(KvmError("KVM_RUN", 9999)) == "KVM_RUN failed: Unknown error 9999 (9999)"


def test_every_hint_is_for_an_ioctl_that_exists() -> None:
    for ioctl, number in errors._HINTS:
        assert hasattr(constants, ioctl)
        assert number in errno.errorcode


# -- no KVM --------------------------------------------------------------------------------


def refusal(path: object) -> KvmUnavailable:
    with pytest.raises(KvmUnavailable) as caught:
        X86System(str(path))
    return caught.value


def test_a_missing_device_says_how_to_get_one(tmp_path: Path) -> None:
    assert str(refusal(tmp_path / "kvm")) == (
        f"open {tmp_path}/kvm failed: No such file or directory (ENOENT); this machine offers no "
        "KVM: enable virtualization in the firmware (or nested virtualization in the outer "
        "hypervisor) and load the module kvm_intel or kvm_amd"
    )


@pytest.mark.usefixtures("nothing_left")
def test_a_file_that_is_not_kvm_is_no_kvm(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    for path in (tmp_path / "kvm", "/dev/null"):
        error = refusal(path)
        assert error.errno == errno.ENODEV
        assert str(error).startswith(f"open {path} failed: ")
        assert "this machine offers no KVM" in str(error)


def test_a_device_closed_to_the_user_is_said(tmp_path: Path) -> None:
    child = """if True:
        import grp, os  # grp: where Python lies may be closed to the other user
        from avmm.arch.x86_64.kvm import X86System
        from avmm.kvm import KvmUnavailable
        os.chmod(".", 0o755)
        open("kvm", "w").close()
        os.chmod("kvm", 0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            X86System("kvm")
        except KvmUnavailable as error:
            print(error)
    """
    paths = [str(Path(avmm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", child],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        check=False,
        text=True,
    )
    assert not done.stderr
    assert done.stdout.startswith(
        "open kvm failed: Permission denied (EACCES); this user may not use it: "
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_who_may_use_the_device_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "kvm"
    path.touch()

    def group(name: str) -> None:
        monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=name))

    group("kvm")
    assert "join the group 'kvm' (`sudo usermod -aG kvm $USER`)" in str(
        errors.unavailable(str(path), number)
    )
    group("root")
    assert f"only root may use {path} here" in str(errors.unavailable(str(path), number))
    assert "administrator" in str(errors.unavailable(f"{path}/none", number))


def fake_system(
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[[int], int] = lambda capability: 1,
    version: int = constants.KVM_API_VERSION,
) -> None:
    """Any file is KVM, of that version and with those capabilities."""

    def ioctl(self: X86System, name: str, argument: int = 0) -> int:
        return version if name == "KVM_GET_API_VERSION" else check(argument)

    monkeypatch.setattr(X86System, "_ioctl_value", ioctl)


@pytest.mark.parametrize(("name", "since"), X86System.REQUIRED.items())
@pytest.mark.usefixtures("nothing_left")
def test_a_kernel_that_lacks_something_is_too_old(
    monkeypatch: pytest.MonkeyPatch, name: str, since: str
) -> None:
    missing = getattr(constants, name)
    fake_system(monkeypatch, lambda capability: int(capability != missing))
    text = str(refusal("/dev/null"))
    assert text.endswith(f"its KVM lacks {name}: Linux {since} or newer is needed")


@pytest.mark.usefixtures("nothing_left")
def test_another_api_version_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_system(monkeypatch, version=11)
    assert "lacks API version 12 (it has 11)" in str(refusal("/dev/null"))


def test_cpuid_is_asked_for_with_more_and_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_system(monkeypatch)
    rooms = []

    def ioctl(self: X86System, name: str, cpuid: Any) -> None:
        rooms.append(cpuid.nent)
        if cpuid.nent < 200:
            raise KvmError(name, errno.E2BIG)
        cpuid.nent = 150

    monkeypatch.setattr(X86System, "_ioctl", ioctl)
    system = X86System("/dev/null")
    assert system.supported_cpuid().nent == 150
    assert rooms == [64, 128, 256]
    system.close()


@pytest.mark.usefixtures("nothing_left")
def test_a_vcpu_that_cannot_be_mapped_is_closed() -> None:
    fd, other = os.pipe()
    with pytest.raises(KvmError, match="mmap of kvm_run failed"):
        X86Vcpu(fd, 0, 2 * PAGE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    os.close(other)


# -- names ---------------------------------------------------------------------------------


def test_exits_have_names() -> None:
    assert exit_name(constants.KVM_EXIT_UNKNOWN) == "KVM_EXIT_UNKNOWN"
    assert exit_name(constants.KVM_EXIT_EXCEPTION) == "KVM_EXIT_EXCEPTION"
    assert exit_name(constants.KVM_EXIT_MMIO) == "KVM_EXIT_MMIO"
    assert exit_name(9999) == "exit reason 9999"


def test_capabilities_have_names() -> None:
    assert {*X86System.REQUIRED, "KVM_CAP_READONLY_MEM"} <= set(capabilities())


# -- handles -------------------------------------------------------------------------------


@pytest.fixture
def system(kvm: None, nothing_left: None) -> Iterator[X86System]:
    system = open_system()
    yield system
    system.close()


@pytest.fixture
def vm(system: X86System) -> Iterator[X86Vm]:
    vm = system.create_vm()
    yield vm
    vm.close()


@pytest.fixture
def vcpu(vm: X86Vm) -> Iterator[X86Vcpu]:
    vcpu = vm.create_vcpu(0)
    yield vcpu
    vcpu.close()


def test_the_system_tells_what_it_can(system: X86System) -> None:
    assert system.check("KVM_CAP_USER_MEMORY") == 1
    assert system.max_vcpus >= 1
    assert system.run_size >= PAGE
    indices = system.msr_indices()
    assert len(set(indices)) == len(indices) > 0
    cpuid = system.supported_cpuid()
    assert {0, 1} <= {entry.function for entry in cpuid.entries[0 : cpuid.nent]}


@pytest.mark.parametrize("kind", ["system", "vm", "vcpu"])
def test_a_closed_handle_is_closed_once_and_refuses(
    request: pytest.FixtureRequest, kind: str
) -> None:
    handle = request.getfixturevalue(kind)
    fd = handle.fd
    handle.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    stranger = os.memfd_create("stranger")
    handle.close()
    os.close(stranger)
    with pytest.raises(KvmError, match=r"KVM_CHECK_EXTENSION failed: .* \(EBADF\)"):
        handle.check("KVM_CAP_USER_MEMORY")


def test_a_closed_vcpu_has_no_kvm_run(vcpu: X86Vcpu) -> None:
    def mappings() -> int:  # the software engine has one of its own until the VM is closed
        return Path("/proc/self/maps").read_text().count("-vcpu")

    before, held = mappings(), vcpu.page.struct
    vcpu.close()
    assert mappings() == before - 1, "whoever holds it still"
    del held
    assert vcpu.page.exit_reason == vcpu.page.flags == 0
    vcpu.page.immediate_exit = 1  # not in anybody's memory
    with pytest.raises(ValueError, match="the vCPU is closed"):
        vcpu.page.io()
    assert vcpu.run() == -errno.EBADF


def test_a_vcpu_exists_once(vm: X86Vm, vcpu: X86Vcpu) -> None:
    with pytest.raises(KvmError, match=r"EEXIST\); a vCPU with this number exists already"):
        vm.create_vcpu(0)


def test_a_vcpu_too_many_is_refused(vm: X86Vm) -> None:
    with pytest.raises(KvmError, match=r"EINVAL\); more vCPUs than this host's KVM allows"):
        vm.create_vcpu(1 << 20)


def test_a_write_rings_one_eventfd_at_a_time(vm: X86Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = avmm.kvm.eventfd()
    try:
        assert vm.ioeventfd(fd, 0xC000_0050, 4, 1)
        assert vm.ioeventfd(fd, 0xC000_0050, 4, 2)
        with pytest.raises(KvmError, match="KVM_IOEVENTFD failed"):
            vm.ioeventfd(fd, 0xC000_0050, 4, 1)
        assert vm.ioeventfd(fd, 0xC000_0050, 4, 1, assign=False)
        assert vm.ioeventfd(fd, 0xC000_0050, 4, 1)
        monkeypatch.setattr(vm, "check", lambda _: 0)
        assert not vm.ioeventfd(fd, 0xC000_0050, 4, 3)
    finally:
        os.close(fd)


def test_an_msr_that_kvm_does_not_know_is_named(vcpu: X86Vcpu) -> None:
    efer, nonsense = 0xC000_0080, 0xBAD_F00D
    vcpu.set_msrs({efer: 0})
    with pytest.raises(KvmError, match="MSR 0xbadf00d refused"):
        vcpu.set_msrs({efer: 0, nonsense: 0, efer + 1: 0})


def test_registers_are_kept(vcpu: X86Vcpu) -> None:
    regs, sregs = vcpu.regs(), vcpu.sregs()
    regs.rax, regs.r15, regs.rip, sregs.ds.selector = 0x1122334455667788, 15, 0x77, 0x123
    vcpu.set_regs(regs)
    vcpu.set_sregs(sregs)
    regs, sregs = vcpu.regs(), vcpu.sregs()
    assert (regs.rax, regs.r15, regs.rip) == (0x1122334455667788, 15, 0x77)
    assert sregs.ds.selector == 0x123


def test_the_tsc_ticks(vcpu: X86Vcpu) -> None:
    assert vcpu.tsc_khz() > 100_000


# -- a guest -------------------------------------------------------------------------------


class Guest:
    """64 KiB of RAM and a vCPU that starts at ORIGIN in real mode, all segments at 0."""

    def __init__(self, stack: ExitStack, system: X86System, source: str, *, irqchip: bool) -> None:
        self.ram = memoryview(stack.enter_context(mmap.mmap(-1, RAM)))
        stack.callback(self.ram.release)
        code = assemble(source, 16, ORIGIN)
        self.ram[ORIGIN : ORIGIN + len(code)] = code
        self.vm = system.create_vm()
        stack.callback(self.vm.close)
        self.vm.set_memory(0, 0, self.ram)
        if irqchip:
            self.vm.create_irqchip(0xFFFB_C000, 0xFFFB_D000)
        self.vcpu = self.vm.create_vcpu(0)
        stack.callback(self.vcpu.close)
        self.page = self.vcpu.page
        regs, sregs = self.vcpu.regs(), self.vcpu.sregs()
        sregs.cs.base = sregs.cs.selector = 0
        regs.rip, regs.rsp, regs.rflags = ORIGIN, 0x8000, 2
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(regs)

    def run(self) -> str:
        """Run to the next exit."""
        while (reason := self.vcpu.run()) == -errno.EINTR:
            pass  # a kick that another test's vCPU did not live to see
        assert reason >= 0, os.strerror(-reason)
        assert reason == self.page.exit_reason
        return exit_name(reason)

    def out(self) -> tuple[int, bytes]:
        """Run to the next exit, which must be an output: port and data."""
        assert self.run() == "KVM_EXIT_IO"
        direction, size, port, count, offset = self.vcpu.page.io()
        assert direction == constants.KVM_EXIT_IO_OUT
        return port, self.vcpu.page.io_load(offset, size * count)

    def inp(self, data: bytes) -> None:
        """Answer the input that the guest has just asked for."""
        direction, size, _, count, offset = self.vcpu.page.io()
        assert direction == constants.KVM_EXIT_IO_IN
        assert size * count == len(data)
        self.vcpu.page.io_store(offset, data)


Boot = Callable[..., Guest]


@pytest.fixture
def boot(system: X86System) -> Iterator[Boot]:
    with ExitStack() as stack:
        yield lambda source, irqchip=False: Guest(stack, system, source, irqchip=irqchip)


def test_a_guest_talks_through_ports(boot: Boot) -> None:
    guest = boot("mov eax, 0x44434241; out 0x55, al; mov dx, 0x1234; out dx, eax; hlt")
    assert guest.out() == (0x55, b"A")
    assert guest.out() == (0x1234, b"ABCD")
    assert guest.run() == "KVM_EXIT_HLT"


def test_a_guest_gets_what_is_put_into_kvm_run(boot: Boot) -> None:
    guest = boot("in ax, 0x55; not ax; out 0x56, ax; hlt")
    assert guest.run() == "KVM_EXIT_IO"
    guest.inp(b"\x34\x12")
    assert guest.out() == (0x56, b"\xcb\xed")


def test_a_string_input_lands_in_memory(boot: Boot) -> None:
    guest = boot("mov dx, 0x55; mov di, 0x4000; mov cx, 300; cld; rep insb; hlt")
    data = bytes(at % 251 for at in range(300))
    given = 0
    while guest.run() == "KVM_EXIT_IO":
        _, _, _, count, _ = guest.page.io()
        guest.inp(data[given : given + count])
        given += count
    assert guest.ram[0x4000:0x4200] == data.ljust(0x200, b"\0")


def test_what_is_not_memory_is_an_mmio_exit(boot: Boot) -> None:
    guest = boot("mov ax, 0x2000; mov ds, ax; mov eax, [0x10]; mov [0x20], ax; hlt")
    assert guest.run() == "KVM_EXIT_MMIO"
    address, _, length, is_write = guest.vcpu.page.mmio()
    assert (address, length, is_write) == (0x2_0010, 4, 0)
    guest.vcpu.page.answer_mmio(0x44434241)
    assert guest.run() == "KVM_EXIT_MMIO"
    address, data, length, is_write = guest.vcpu.page.mmio()
    assert (address, data & 0xFFFF, length, is_write) == (0x2_0020, 0x4241, 2, 1)
    assert guest.run() == "KVM_EXIT_HLT"


def test_a_readonly_slot_can_be_read_but_writes_exit(boot: Boot) -> None:
    guest = boot("mov ax, 0x2000; mov ds, ax; mov al, [3]; out 0x55, al; mov [3], ah; hlt")
    rom = memoryview(mmap.mmap(-1, PAGE))
    rom[:4] = b"abcd"
    guest.vm.set_memory(1, 0x2_0000, rom.toreadonly(), readonly=True)
    assert guest.out() == (0x55, b"d")
    assert guest.run() == "KVM_EXIT_MMIO"
    assert guest.page.exit() == MmioExit(0x2_0003, 1, is_write=True)
    assert guest.run() == "KVM_EXIT_HLT"
    assert bytes(rom[:4]) == b"abcd"


def test_slots_that_overlap_are_refused(boot: Boot) -> None:
    guest = boot("hlt")
    with pytest.raises(KvmError, match=r"EEXIST\); the slot overlaps another one"):
        guest.vm.set_memory(1, RAM - PAGE, guest.ram[:PAGE])


def test_real_mode_addresses_are_physical(boot: Boot) -> None:
    assert boot("hlt").vcpu.translate(0x4321) == 0x4321


def test_an_unmapped_address_has_no_translation(boot: Boot) -> None:
    vcpu = boot("hlt").vcpu
    sregs = vcpu.sregs()
    # Long mode with a PML4 of zeros.
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x8000_0011, 0x2000, 0x20, 0x500
    sregs.cs.l, sregs.cs.db = 1, 0
    vcpu.set_sregs(sregs)
    assert vcpu.translate(0x4321) is None


def test_immediate_exit_does_not_let_the_guest_run(boot: Boot) -> None:
    guest = boot("out 0x55, al; hlt")
    guest.page.immediate_exit = 1
    assert guest.vcpu.run() == -errno.EINTR
    guest.page.immediate_exit = 0
    assert guest.out()[0] == 0x55


def test_immediate_exit_finishes_the_pending_input(boot: Boot) -> None:
    guest = boot("in al, 0x55; hlt")
    assert guest.run() == "KVM_EXIT_IO"
    guest.inp(b"\x5a")
    guest.page.immediate_exit = 1
    assert guest.vcpu.run() == -errno.EINTR
    regs = guest.vcpu.regs()
    assert (regs.rax & 0xFF, regs.rip) == (0x5A, ORIGIN + 2)


def test_a_kick_interrupts_a_guest_that_spins(boot: Boot) -> None:
    install_kick()
    guest = boot("1: jmp 1b")
    ids: list[int] = []
    answers: list[int] = []
    started = threading.Event()

    def main() -> None:
        accept_kicks()
        ids.append(threading.get_native_id())
        started.set()
        answers.append(guest.vcpu.run())

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    assert started.wait(10)
    # One kick would do once the guest runs, which cannot be seen from here; nor need it be.
    for _ in range(1000):
        kick(ids[0])
        thread.join(0.01)
        if not thread.is_alive():
            break
    assert answers == [-errno.EINTR]


def test_the_raw_loop_serves_a_guest_to_its_end(boot: Boot) -> None:
    guest = boot(
        """
        mov dx, 0x3fd; in al, dx; test al, 0x20; jz bad
        mov dx, 0x3f8; mov al, 'h'; out dx, al; mov al, 'i'; out dx, al
        in al, 0x99; test al, al; jnz bad; out 0x99, al
        mov ax, 0x2000; mov ds, ax; mov al, [0]; test al, al; jnz bad; mov [0], al
        mov al, 1; out 0xf8, al
    bad:
        hlt
        """
    )
    assert guest.vcpu.run_raw() == b"hi"


def test_the_raw_loop_names_an_exit_that_it_does_not_know(boot: Boot) -> None:
    with pytest.raises(KvmError, match="unexpected KVM_EXIT_HLT"):
        boot("hlt").vcpu.run_raw()


# -- interrupts ----------------------------------------------------------------------------

TAKES_IRQ = """
    mov word ptr [(0x20 + {irq}) * 4], offset handler
    mov word ptr [(0x20 + {irq}) * 4 + 2], 0
    mov al, 0x11; out 0x20, al
    mov al, 0x20; out 0x21, al
    mov al, 4; out 0x21, al
    mov al, 1; out 0x21, al
    mov al, 0xff & ~(1 << {irq}); out 0x21, al
    out 0x55, al
1:  sti
    hlt
    jmp 1b
handler:
    mov al, 0x20; out 0x20, al
    out 0x56, al
    iret
"""
"""Says at port 0x55 that it is ready and at 0x56 that its PIC has interrupted it."""


def test_an_eventfd_interrupts_the_guest(boot: Boot) -> None:
    guest = boot(TAKES_IRQ.format(irq=5), irqchip=True)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    guest.vm.irqfd(fd, 5)
    assert guest.out()[0] == 0x55
    for _ in range(3):
        os.eventfd_write(fd, 1)
        assert guest.out()[0] == 0x56
    os.close(fd)


def test_a_driven_input_interrupts_the_guest(boot: Boot) -> None:
    guest = boot(TAKES_IRQ.format(irq=3), irqchip=True)
    assert guest.out()[0] == 0x55
    for _ in range(3):
        guest.vm.irq_line(3, True)
        assert guest.out()[0] == 0x56
        guest.vm.irq_line(3, False)


def test_the_timer_interrupts_the_guest(boot: Boot) -> None:
    program = "mov al, 0x34; out 0x43, al; mov al, 0; out 0x40, al; mov al, 4; out 0x40, al\n"
    guest = boot(program + TAKES_IRQ.format(irq=0), irqchip=True)
    guest.vm.create_pit()
    assert guest.out()[0] == 0x55
    assert guest.out()[0] == 0x56


def test_an_eventfd_drives_one_interrupt_until_it_is_taken_back(boot: Boot) -> None:
    guest = boot("hlt", irqchip=True)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    guest.vm.irqfd(fd, 5)
    with pytest.raises(KvmError, match=r"EBUSY\); this eventfd drives another interrupt already"):
        guest.vm.irqfd(fd, 6)
    guest.vm.irqfd(fd, 5, assign=False)
    guest.vm.irqfd(fd, 6)
    os.close(fd)


def enable_lapic(vcpu: X86Vcpu) -> None:
    lapic = vcpu.lapic()
    lapic.regs[0xF0:0xF2] = [b"\xff", b"\x01"]  # spurious vector 255, enabled
    vcpu.set_lapic(lapic)


def pending(vcpu: X86Vcpu) -> set[int]:
    """The vectors that wait in the local APIC (IRR)."""
    regs = vcpu.lapic().regs
    found = set()
    for vector in range(256):
        byte = 0x200 + vector // 32 * 16 + vector % 32 // 8
        if regs[byte][0] >> vector % 8 & 1:
            found.add(vector)
    return found


def wait_pending(vcpu: X86Vcpu, vectors: set[int]) -> None:
    """KVM may deliver what an eventfd asks for from a task of its own."""
    deadline = time.monotonic() + 10
    while not vectors <= pending(vcpu):
        assert time.monotonic() < deadline, f"{vectors} never came"
        os.sched_yield()
    assert pending(vcpu) == vectors


def test_a_message_reaches_the_local_apic(boot: Boot) -> None:
    guest = boot("hlt", irqchip=True)
    assert guest.vm.signal_msi(LAPIC_BASE, 0x41) == 0
    assert pending(guest.vcpu) == set()
    enable_lapic(guest.vcpu)
    assert guest.vm.signal_msi(LAPIC_BASE, 0x41) > 0
    assert pending(guest.vcpu) == {0x41}


def test_a_route_turns_an_eventfd_into_a_message(boot: Boot) -> None:
    guest = boot("hlt", irqchip=True)
    enable_lapic(guest.vcpu)
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    guest.vm.set_routing([], {24: (LAPIC_BASE, 0x41), 25: (LAPIC_BASE, 0x93)})
    for gsi, fd in enumerate(fds, 24):
        guest.vm.irqfd(fd, gsi)
    os.eventfd_write(fds[1], 1)
    wait_pending(guest.vcpu, {0x93})
    os.eventfd_write(fds[0], 1)
    wait_pending(guest.vcpu, {0x41, 0x93})
    for fd in fds:
        os.close(fd)


def test_routes_to_pins_and_messages_live_side_by_side(boot: Boot) -> None:
    guest = boot(TAKES_IRQ.format(irq=5), irqchip=True)
    enable_lapic(guest.vcpu)
    # The PIC's pin 5 under another number: KVM's own table has no 40.
    pins = [(40, constants.KVM_IRQCHIP_PIC_MASTER, 5)]
    guest.vm.set_routing(pins, {41: (LAPIC_BASE, 0x41)})
    assert guest.out()[0] == 0x55
    guest.vm.irq_line(40, True)
    assert guest.out()[0] == 0x56
    guest.vm.irq_line(41, True)
    wait_pending(guest.vcpu, {0x41})


def test_a_route_to_nowhere_is_refused(boot: Boot) -> None:
    guest = boot("hlt", irqchip=True)
    with pytest.raises(KvmError, match="KVM_SET_GSI_ROUTING failed"):
        guest.vm.set_routing([(0, 99, 0)], {})


# -- interrupt lines (avmm.bus.interrupts) ------------------------------------------------------


@pytest.fixture
def interrupts(boot: Boot) -> Iterator[tuple[Guest, Interrupts]]:
    guest = boot(TAKES_IRQ.format(irq=5), irqchip=True)
    interrupts = Interrupts(PINS)
    yield guest, interrupts
    interrupts.close()
    interrupts.close()


def test_a_line_interrupts_the_guest_at_each_rise(interrupts: tuple[Guest, Interrupts]) -> None:
    guest, lines = interrupts
    line = lines.line(5, "Foo")
    lines.connect(guest.vm)
    assert guest.out()[0] == 0x55
    for _ in range(3):
        line.set(True)
        assert guest.out()[0] == 0x56
        line.set(False)
    line.pulse()
    assert guest.out()[0] == 0x56


def test_what_was_raised_before_there_was_a_vm_reaches_it(
    interrupts: tuple[Guest, Interrupts],
) -> None:
    guest, lines = interrupts
    lines.line(5, "Foo").pulse()
    assert guest.out()[0] == 0x55
    lines.connect(guest.vm)
    assert guest.out()[0] == 0x56


def test_a_line_that_is_high_does_not_rise() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    line = IrqLine(fd)
    for level in (False, True, True, True, False, False, True):
        line.set(level)
    assert os.eventfd_read(fd) == 2
    line.pulse()
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_lines_and_messages_do_not_take_each_others_place(
    interrupts: tuple[Guest, Interrupts],
) -> None:
    guest, lines = interrupts
    line = lines.line(5, "Foo")
    lines.connect(guest.vm)
    messages = [lines.message(LAPIC_BASE, vector) for vector in (0x41, 0x93)]
    assert guest.out()[0] == 0x55
    line.pulse()
    assert guest.out()[0] == 0x56
    enable_lapic(guest.vcpu)
    messages[1].pulse()
    wait_pending(guest.vcpu, {0x93})
    messages[0].pulse()
    wait_pending(guest.vcpu, {0x41, 0x93})


@pytest.mark.parametrize(
    ("gsi", "why"),
    [
        (-1, "does not exist"),
        (0, "belongs to the timer"),
        (2, "belongs to the second PIC"),
        (24, "does not exist"),
    ],
)
def test_a_line_that_cannot_be_had_is_refused_by_name(
    interrupts: tuple[Guest, Interrupts], gsi: int, why: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        interrupts[1].line(gsi, "Foo")
    assert (
        str(caught.value) == f"Foo: interrupt {gsi} {why}; expected 1, 3 to 7, 9 to 12 or 14 to 23"
    )


def test_a_line_has_one_driver(interrupts: tuple[Guest, Interrupts]) -> None:
    interrupts[1].line(5, "Foo")
    interrupts[1].line(23, "Foo")
    with pytest.raises(ConfigError, match="Bar: interrupt 5 is already driven by Foo"):
        interrupts[1].line(5, "Bar")
