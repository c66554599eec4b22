"""The software engine's chips, alone: their C compiled for the tests, with a clock and a memory
that the tests hold in their hands.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cffi import FFI

FOLDER = Path(__file__).parents[2] / "avmm" / "soft" / "chips"
RAM = 1 << 16
KHZ = 2_000_000
INTERRUPT, NMI, INIT, SIPI, UNHALT, TIMER = (1 << bit for bit in range(6))
NEVER = (1 << 63) - 1
MASTER, SLAVE, IOAPIC = 0, 1, 2

_IOCTLS = """
CREATE_IRQCHIP CREATE_PIT2 GET_IRQCHIP SET_IRQCHIP GET_PIT2 SET_PIT2 GET_CLOCK SET_CLOCK
IRQ_LINE IRQ_LINE_STATUS SIGNAL_MSI SET_GSI_ROUTING IRQFD REINJECT_CONTROL
GET_LAPIC SET_LAPIC KVMCLOCK_CTRL NMI CREATE_VM CREATE_VCPU
"""
_CDEF = (
    "".join(f"#define KVM_{name} ...\n" for name in _IOCTLS.split())
    + """
struct kvm_pic_state { uint8_t last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select,
    poll, special_mask, init_state, auto_eoi,
    rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr,
    elcr_mask; };
struct kvm_ioapic_state { uint64_t base_address; uint32_t ioregsel, id, irr, pad;
    union { uint64_t bits; } redirtbl[24]; };
struct kvm_irqchip { uint32_t chip_id, pad; union { char dummy[512]; struct kvm_pic_state pic;
    struct kvm_ioapic_state ioapic; } chip; };
struct kvm_lapic_state { char regs[0x400]; ...; };
struct kvm_pit_channel_state { uint32_t count; uint16_t latched_count; uint8_t count_latched,
    status_latched, status, read_state, write_state, write_latch, rw_mode, mode, bcd, gate;
    int64_t count_load_time; ...; };
struct kvm_pit_state2 { struct kvm_pit_channel_state channels[3]; uint32_t flags; ...; };
struct kvm_pit_config { uint32_t flags; ...; };
struct kvm_clock_data { uint64_t clock; uint32_t flags; uint64_t realtime, host_tsc; ...; };
struct kvm_irq_level { union { uint32_t irq; int32_t status; }; uint32_t level; };
struct kvm_msi { uint32_t address_lo, address_hi, data, flags; ...; };
struct kvm_irqfd { uint32_t fd, gsi, flags, resamplefd; ...; };
struct kvm_irq_routing_irqchip { uint32_t irqchip, pin; };
struct kvm_irq_routing_s390_adapter { uint64_t ind_addr, summary_addr, ind_offset;
    uint32_t summary_offset, adapter_id; };
struct kvm_irq_routing_msi { uint32_t address_lo, address_hi, data, pad; };
struct kvm_irq_routing_entry { uint32_t gsi, type, flags, pad; union {
    struct kvm_irq_routing_irqchip irqchip; struct kvm_irq_routing_msi msi;
    struct kvm_irq_routing_s390_adapter adapter; uint32_t pad[8]; } u; };
struct kvm_irq_routing { uint32_t nr, flags; struct kvm_irq_routing_entry entries[]; };

struct fake { int64_t ns; uint64_t tsc; int64_t wall; uint64_t kicks; uint8_t *ram; ...; };
struct soft_chips *fake_create(struct fake *fake, int real, int threadless);
long sys_ioctl(int fd, unsigned long request, void *argument);
"""
)
_SOURCE = """
#include "chips.h"
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <x86intrin.h>
struct fake { int64_t ns; uint64_t tsc; int64_t wall; uint64_t kicks; uint8_t *ram; };
static void fake_clock(void *owner, struct soft_chips_time *now)
{
    struct fake *f = owner;
    now->ns = f->ns;
    now->tsc = f->tsc;
}
static int64_t fake_wall(void *owner) { return ((struct fake *)owner)->wall; }
static void fake_kick(void *owner, int cpu)
{
    __atomic_fetch_or(&((struct fake *)owner)->kicks, 1ULL << cpu, __ATOMIC_SEQ_CST);
}
static int fake_write(void *owner, uint64_t gpa, const void *data, size_t size)
{
    struct fake *f = owner;
    if (gpa + size > RAM || gpa + size < gpa)
        return -EFAULT;
    memcpy(f->ram + gpa, data, size);
    return 0;
}
static uint64_t host_khz(void)
{
    struct timespec pause = { .tv_nsec = 10000000 }, a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    uint64_t first = __rdtsc();
    nanosleep(&pause, NULL);
    clock_gettime(CLOCK_MONOTONIC, &b);
    uint64_t ticks = __rdtsc() - first;
    return ticks * 1000000 / ((b.tv_sec - a.tv_sec) * 1000000000LL + b.tv_nsec - a.tv_nsec);
}
static struct soft_chips *fake_create(struct fake *f, int real, int threadless)
{
    struct soft_chips_host host = { .owner = f, .tsc_khz = real ? host_khz() : KHZ,
        .clock = real ? NULL : fake_clock, .wall = real ? NULL : fake_wall, .kick = fake_kick,
        .write_guest = fake_write, .runs_timers = real, .threadless = threadless };
    return soft_chips_create(&host);
}
static long sys_ioctl(int fd, unsigned long request, void *argument)
{
    long answer = ioctl(fd, request, argument);
    return answer < 0 ? -errno : answer;
}
"""


@functools.cache
def module() -> Any:
    """The compiled chips."""
    header = (FOLDER / "chips.h").read_text()
    begin = header.index("struct soft_chips *soft_chips_create")
    functions = [
        statement.rpartition("*/")[2].strip() + ";"
        for statement in header[begin : header.index("#endif", begin)].split(";")
        if "soft_chips_host" not in statement.rpartition("*/")[2]
        and "soft_chips_" in statement.rpartition("*/")[2]
        and "(" in statement.rpartition("*/")[2]
    ]
    ffi = FFI()
    ffi.cdef("struct soft_chips;\n" + _CDEF + "\n".join(functions))
    ffi.set_source(
        "soft_chips_alone",
        f"enum {{ RAM = {RAM}, KHZ = {KHZ} }};\n{_SOURCE}",
        sources=[str(path) for path in sorted(FOLDER.glob("*.c"))],
        include_dirs=[str(FOLDER)],
        extra_compile_args=[
            "-O1",
            "-g",
            "-std=gnu11",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
        ],
        libraries=["pthread"],
    )
    folder = tempfile.mkdtemp(prefix="chips")
    try:
        path = ffi.compile(tmpdir=folder)
        spec = importlib.util.spec_from_file_location("soft_chips_alone", path)
        assert spec and spec.loader
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    finally:
        shutil.rmtree(folder)
    return loaded


class Chips:
    """The chips of one VM, with a clock that stands still until a test moves it."""

    def __init__(self, cpus: int = 1, *, real: bool = False, threadless: bool = True) -> None:
        loaded = module()
        self.ffi, self.lib = loaded.ffi, loaded.lib
        self.fake = self.ffi.new("struct fake *")
        self.ram = self.ffi.new("uint8_t[]", RAM)
        self.fake.ram = self.ram
        self.fake.ns, self.fake.tsc, self.fake.wall = 10**12, 2 * 10**12, 10**18
        self.c = self.lib.fake_create(self.fake, real, threadless)
        assert self.c
        self.vm("CREATE_IRQCHIP")
        self.vm("CREATE_PIT2", "struct kvm_pit_config *", {"flags": 1})
        for cpu in range(cpus):
            assert self.lib.soft_chips_add_cpu(self.c, cpu) == 0
        self.cpus = cpus

    def close(self) -> None:
        self.lib.soft_chips_destroy(self.c)
        self.c = None

    def __enter__(self) -> Chips:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- ioctls ----

    def _argument(self, kind: str | None, value: Any) -> Any:
        if kind is None:
            return self.ffi.NULL if value is None else self.ffi.cast("void *", value)
        return self.ffi.new(kind, value) if not isinstance(value, self.ffi.CData) else value

    def try_vm(self, name: str, kind: str | None = None, value: Any = None) -> tuple[int, Any]:
        argument = self._argument(kind, value)
        return self.lib.soft_chips_vm_ioctl(
            self.c, getattr(self.lib, f"KVM_{name}"), argument
        ), argument

    def vm(self, name: str, kind: str | None = None, value: Any = None) -> Any:
        answer, argument = self.try_vm(name, kind, value)
        assert answer >= 0, (name, answer)
        return argument

    def cpu(self, cpu: int, name: str, kind: str | None = None, value: Any = None) -> Any:
        argument = self._argument(kind, value)
        request = getattr(self.lib, f"KVM_{name}")
        answer = self.lib.soft_chips_cpu_ioctl(self.c, cpu, request, argument)
        assert answer >= 0, (name, answer)
        return argument

    def line(self, gsi: int, level: int) -> int:
        value = {"irq": gsi, "level": level}
        return int(self.vm("IRQ_LINE_STATUS", "struct kvm_irq_level *", value).status)

    def msi(self, dest: int = 0, vector: int = 0, mode: int = 0, *, logical: bool = False,
            hint: bool = False, level: bool = False) -> int:  # fmt: skip
        address = 0xFEE0_0000 | dest << 12 | hint << 3 | logical << 2
        data = vector | mode << 8 | (0xC000 if level else 0)
        value = {"address_lo": address, "data": data}
        return self.try_vm("SIGNAL_MSI", "struct kvm_msi *", value)[0]

    def route(self, *entries: tuple[int, int, Any, Any]) -> int:
        """(gsi, 1, chip, pin) or (gsi, 2, address, data)."""
        table = self.ffi.new(
            "struct kvm_irq_routing *", {"nr": len(entries), "entries": len(entries)}
        )
        for entry, (gsi, kind, a, b) in zip(table.entries, entries, strict=False):
            entry.gsi, entry.type = gsi, kind
            if kind == 1:
                entry.u.irqchip.irqchip, entry.u.irqchip.pin = a, b
            else:
                entry.u.msi.address_lo, entry.u.msi.address_hi = a & 0xFFFF_FFFF, a >> 32
                entry.u.msi.data = b
        return self.try_vm("SET_GSI_ROUTING", "struct kvm_irq_routing *", table)[0]

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resample: int = 0) -> int:
        value = {"fd": fd, "gsi": gsi, "flags": flags, "resamplefd": resample}
        return int(self.try_vm("IRQFD", "struct kvm_irqfd *", value)[0])

    # ---- what a guest does ----

    def out(self, port: int, *values: int) -> None:
        for value in values:
            assert self.lib.soft_chips_pio(
                self.c, 0, 1, port, 1, self.ffi.new("uint64_t *", value)
            )

    def inp(self, port: int) -> int:
        value = self.ffi.new("uint64_t *")
        assert self.lib.soft_chips_pio(self.c, 0, 0, port, 1, value)
        return int(value[0])

    def store(self, gpa: int, value: int, cpu: int = 0, size: int = 4) -> None:
        pointer = self.ffi.new("uint64_t *", value)
        assert self.lib.soft_chips_mmio(self.c, cpu, 1, gpa, size, pointer)

    def load(self, gpa: int, cpu: int = 0, size: int = 4) -> int:
        value = self.ffi.new("uint64_t *")
        assert self.lib.soft_chips_mmio(self.c, cpu, 0, gpa, size, value)
        return int(value[0])

    def apic(self, register: int, value: int | None = None, cpu: int = 0) -> int:
        """Read or write a LAPIC's register, as the mode of that LAPIC has it."""
        if self.msr(0x1B, cpu=cpu) & 0x400:
            return self.msr(0x800 + (register >> 4), value, cpu=cpu)
        if value is None:
            return self.load(0xFEE0_0000 + register, cpu)
        self.store(0xFEE0_0000 + register, value, cpu)
        return 0

    def try_msr(
        self, index: int, value: int | None = None, cpu: int = 0, host: bool = False
    ) -> Any:
        if value is None:
            out = self.ffi.new("uint64_t *")
            return self.lib.soft_chips_msr_get(self.c, cpu, index, out, host), out[0]
        return self.lib.soft_chips_msr_set(self.c, cpu, index, value, host), 0

    def msr(self, index: int, value: int | None = None, cpu: int = 0, host: bool = False) -> int:
        answer, out = self.try_msr(index, value, cpu, host)
        assert answer == 0, (hex(index), answer)
        return int(out)

    def entry(self, pin: int, bits: int | None = None) -> int:
        """Read or write an entry of the I/O APIC's table; the upper half is written first."""
        halves = []
        for half in (1, 0):
            self.store(0xFEC0_0000, 0x10 + 2 * pin + half)
            if bits is not None:
                self.store(0xFEC0_0010, bits >> 32 * half & 0xFFFF_FFFF)
            halves.append(self.load(0xFEC0_0010))
        return halves[0] << 32 | halves[1]

    def enable(self, cpu: int = 0, x2: bool = False) -> None:
        """Switch a LAPIC on, and the PIC's wire to it off."""
        if x2:
            self.msr(0x1B, self.msr(0x1B, cpu=cpu) | 0xC00, cpu=cpu)
        self.apic(0xF0, 0x1FF, cpu)
        self.apic(0x350, 0x1_0000, cpu)

    # ---- what a vCPU does ----

    def attention(self, cpu: int = 0) -> int:
        return int(self.lib.soft_chips_attention(self.c, cpu))

    def take(self, cpu: int = 0) -> int:
        return int(self.lib.soft_chips_take_interrupt(self.c, cpu))

    def serve(self, cpu: int = 0) -> int:
        """Take an interrupt, and end it at once."""
        vector = self.take(cpu)
        if vector >= 0:
            self.eoi(cpu)
        return vector

    def eoi(self, cpu: int = 0) -> None:
        self.apic(0xB0, 0, cpu)

    def startup(self, cpu: int, mask: int = INIT | SIPI) -> tuple[int, int]:
        vector = self.ffi.new("uint8_t *")
        return self.lib.soft_chips_take_startup(self.c, cpu, mask, vector), vector[0]

    # ---- time ----

    def at(self, ns: int) -> None:
        """Let the clock show a later moment (ns since the start), and run the timers."""
        passed = 10**12 + ns - self.fake.ns
        self.fake.ns += passed
        self.fake.tsc += passed * KHZ // 1_000_000
        self.fake.wall += passed
        self.lib.soft_chips_run_timers(self.c)

    def next(self, cpu: int = -1) -> int:
        deadline = int(self.lib.soft_chips_next_deadline(self.c, cpu))
        return deadline if deadline == NEVER else deadline - 10**12

    # ---- state ----

    def chip(self, number: int) -> Any:
        state = self.vm("GET_IRQCHIP", "struct kvm_irqchip *", {"chip_id": number})
        return state.chip.ioapic if number == IOAPIC else state.chip.pic

    def registers(self, cpu: int = 0) -> bytes:
        state = self.cpu(cpu, "GET_LAPIC", "struct kvm_lapic_state *")
        return bytes(self.ffi.buffer(state))

    def register(self, offset: int, cpu: int = 0) -> int:
        return int.from_bytes(self.registers(cpu)[offset : offset + 4], "little")

    def save(self) -> dict[str, Any]:
        """All state, in avmm's order."""
        ffi = self.ffi
        return {
            "cpus": [
                {
                    "startup": self.startup(cpu),
                    "base": self.msr(0x1B, cpu=cpu),
                    "lapic": self.registers(cpu),
                    "deadline": self.msr(0x6E0, cpu=cpu, host=True),
                    "clock": self.msr(0x4B56_4D01, cpu=cpu),
                    "nmis": self.lib.soft_chips_nmi_pending(self.c, cpu),
                }
                for cpu in range(self.cpus)
            ],
            "chips": [
                bytes(ffi.buffer(self.vm("GET_IRQCHIP", "struct kvm_irqchip *", {"chip_id": i})))
                for i in range(3)
            ],
            "pit": bytes(ffi.buffer(self.vm("GET_PIT2", "struct kvm_pit_state2 *"))),
            "time": self.vm("GET_CLOCK", "struct kvm_clock_data *").clock,
        }

    def restore(self, state: dict[str, Any]) -> None:
        ffi = self.ffi
        for chip in state["chips"]:
            self.vm(
                "SET_IRQCHIP", "struct kvm_irqchip *", _from(ffi, "struct kvm_irqchip *", chip)
            )
        pit = _from(ffi, "struct kvm_pit_state2 *", state["pit"])
        self.vm("SET_PIT2", "struct kvm_pit_state2 *", pit)
        self.vm("SET_CLOCK", "struct kvm_clock_data *", {"clock": state["time"]})
        for cpu, saved in enumerate(state["cpus"]):
            assert self.lib.soft_chips_set_apic_base(self.c, cpu, saved["base"]) == 0
            lapic = _from(ffi, "struct kvm_lapic_state *", saved["lapic"])
            self.cpu(cpu, "SET_LAPIC", "struct kvm_lapic_state *", lapic)
            self.msr(0x4B56_4D01, saved["clock"], cpu, host=True)
            self.lib.soft_chips_set_nmi_pending(self.c, cpu, saved["nmis"])
        for cpu, saved in enumerate(state["cpus"]):
            self.msr(0x6E0, saved["deadline"], cpu, host=True)


def _from(ffi: Any, kind: str, data: bytes) -> Any:
    value = ffi.new(kind)
    ffi.memmove(value, data, len(data))
    return value
