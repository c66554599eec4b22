/* The chips of a PC as KVM has them in the kernel: two PICs, IOAPIC, PIT, a LAPIC for each vCPU,
 * kvmclock, and KVM's ways to interrupt (lines, messages, irqfds).
 *
 * They know nothing of the CPU core. Whoever owns them (the core, or a test) gives them a clock, a
 * way to wake a vCPU, and a way to write guest memory. State goes in and out as KVM's structures.
 *
 * Every function may be called by any thread. One mutex for each VM is held for short; the
 * callbacks `kick` and `write_guest` are made when it is not held, `clock` and `wall` are made
 * while it is. Answers are 0 or -errno where nothing else is said. */

#ifndef AVMM_SOFT_CHIPS_H
#define AVMM_SOFT_CHIPS_H

#include <stdint.h>
#include <stddef.h>
#include <linux/kvm.h>

enum { SOFT_CHIPS_CPUS = 64 };                  /* vCPU numbers (and APIC ids) are below this */
#define SOFT_CHIPS_NEVER INT64_MAX

struct soft_chips;

/* One moment on both clocks: nanoseconds that never go back, and the reference TSC. A guest's TSC
 * is the reference TSC, scaled if its frequency is another, plus an offset. */
struct soft_chips_time {
    int64_t ns;
    uint64_t tsc;
};

struct soft_chips_host {
    void *owner;                                /* the callbacks' first argument */
    uint64_t tsc_khz;                           /* of the reference TSC */
    /* Both clocks. Called with the mutex held: it must not call back in here. NULL: the host's
     * CLOCK_MONOTONIC and TSC. */
    void (*clock)(void *owner, struct soft_chips_time *now);
    int64_t (*wall)(void *owner);               /* ns since 1970; NULL: CLOCK_REALTIME */
    /* The vCPU has something new: look at soft_chips_attention() again, whether it runs or is
     * halted. It may come for nothing. */
    void (*kick)(void *owner, int cpu);
    /* Store to guest memory (kvmclock's pages). -errno if no RAM is there. Called only from
     * soft_chips_run_timers() and a guest's own soft_chips_msr_set(). */
    int (*write_guest)(void *owner, uint64_t gpa, const void *data, size_t size);
    /* Is the VM's thread to watch the timers? Then `clock` must count CLOCK_MONOTONIC's
     * nanoseconds, and vCPUs whose timers are due get SOFT_CHIPS_TIMER and a kick. If not, the
     * owner looks at soft_chips_next_deadline(). Either way only a vCPU that runs calls
     * soft_chips_run_timers(): nothing changes while a machine stands still to be saved. */
    int runs_timers;
    /* Is there to be no thread? Then the owner calls soft_chips_sweep() to hear of its irqfds. */
    int threadless;
    /* An eventfd of a resampling irqfd was rung, with the mutex held: it must not call back in
     * here. May be NULL. */
    void (*rang)(void *owner);
};

/* ---- life ---- */

/* One for each VM, made with it: kvmclock is there from the start, the chips when the ioctls
 * KVM_CREATE_IRQCHIP and KVM_CREATE_PIT2 ask for them. NULL: no memory. */
struct soft_chips *soft_chips_create(const struct soft_chips_host *host);
/* Ends its thread. Nobody may be in here any more, and no callback comes later. */
void soft_chips_destroy(struct soft_chips *c);
/* In a forked child, which has no thread of them: close the descriptors that it has inherited. The
 * parent does not notice. Nothing else may be called afterwards. */
void soft_chips_let_go(struct soft_chips *c);
/* vCPU `cpu` exists from now on. It has a LAPIC (APIC id `cpu`, number 0 is the BSP) if there is an
 * irqchip. Its TSC runs with the reference TSC. */
int soft_chips_add_cpu(struct soft_chips *c, int cpu);
int soft_chips_has_irqchip(struct soft_chips *c);

/* ---- ioctls: -ENOTTY for one that is not the chips' ---- */

/* CREATE_IRQCHIP, CREATE_PIT2, GET/SET_IRQCHIP, GET/SET_PIT2, GET/SET_CLOCK, IRQ_LINE,
 * IRQ_LINE_STATUS, SIGNAL_MSI (the answer is KVM's: how many took it), SET_GSI_ROUTING, IRQFD,
 * REINJECT_CONTROL. */
int soft_chips_vm_ioctl(struct soft_chips *c, unsigned long request, void *argument);
/* What KVM_CHECK_EXTENSION says of the chips; -ENOTTY if the capability is none of theirs. */
int soft_chips_check_extension(long capability);
/* GET/SET_LAPIC, KVMCLOCK_CTRL, NMI. */
int soft_chips_cpu_ioctl(struct soft_chips *c, int cpu, unsigned long request, void *argument);

/* ---- what a guest does ---- */

/* Port and MMIO accesses of 1, 2, 4 or 8 bytes. Return 1 if a chip has answered, 0 if none is
 * there. A read fills `value` (the bytes above `size` are 0). An access to a chip's page of a size
 * or place that the chip does not know reads 0 and changes nothing, and is answered. */
int soft_chips_pio(struct soft_chips *c, int cpu, int write, uint16_t port, uint32_t size,
                   uint64_t *value);
int soft_chips_mmio(struct soft_chips *c, int cpu, int write, uint64_t gpa, uint32_t size,
                    uint64_t *value);

/* IA32_APIC_BASE (0x1b), IA32_TSC_DEADLINE (0x6e0), x2APIC (0x800-0x8ff), kvmclock (0x11, 0x12,
 * 0x4b564d00, 0x4b564d01). Return 0, -ENOENT if the MSR is not the chips', or -EINVAL (#GP).
 * `host`: it is KVM_SET_MSRS/KVM_GET_MSRS that asks, not the guest. */
int soft_chips_msr_get(struct soft_chips *c, int cpu, uint32_t index, uint64_t *value, int host);
int soft_chips_msr_set(struct soft_chips *c, int cpu, uint32_t index, uint64_t value, int host);
/* For KVM_GET_MSR_INDEX_LIST: fills up to `room`, returns how many there are. */
uint32_t soft_chips_msr_list(uint32_t *indices, uint32_t room);
/* KVM's CPUID leaf 0x40000001, EAX: what of it the chips do (kvmclock, its stable bit). */
uint32_t soft_chips_kvm_features(void);
/* kvm_sregs.apic_base; the setter is the host's, and takes what KVM takes. */
uint64_t soft_chips_apic_base(struct soft_chips *c, int cpu);
int soft_chips_set_apic_base(struct soft_chips *c, int cpu, uint64_t value);

/* CR8 is bits 7:4 of the TPR. */
uint8_t soft_chips_cr8(struct soft_chips *c, int cpu);
void soft_chips_set_cr8(struct soft_chips *c, int cpu, uint8_t value);

/* ---- what a vCPU has to do ---- */

enum {
    SOFT_CHIPS_INTERRUPT = 1,   /* an interrupt could be taken, if IF allows it */
    SOFT_CHIPS_NMI = 2,
    SOFT_CHIPS_INIT = 4,
    SOFT_CHIPS_SIPI = 8,
    SOFT_CHIPS_UNHALT = 16,
    SOFT_CHIPS_TIMER = 32,      /* call soft_chips_run_timers(), then look again */
};
/* What waits for the vCPU now: a set of the above. It costs one atomic load. */
uint32_t soft_chips_attention(struct soft_chips *c, int cpu);
/* Acknowledge the interrupt, as the CPU's INTA cycle does. Its vector, or -1 if there is none any
 * more (TPR, or another vCPU has taken the PIC's). */
int soft_chips_take_interrupt(struct soft_chips *c, int cpu);
/* Take one NMI: 1, or 0 if there is none. */
int soft_chips_take_nmi(struct soft_chips *c, int cpu);
/* NMIs that wait, for kvm_vcpu_events.nmi.pending, in and out. */
int soft_chips_nmi_pending(struct soft_chips *c, int cpu);
void soft_chips_set_nmi_pending(struct soft_chips *c, int cpu, int count);
/* Take what is in `mask` of SOFT_CHIPS_INIT, _SIPI and _UNHALT, and return what there was of it.
 * With INIT the LAPIC has been reset as INIT does (the core resets its CPU); an INIT that comes
 * forgets a SIPI from before. With SIPI `vector` is set; a CPU that does not wait for it drops
 * it. A CPU that was just given INIT should be asked again for SIPI at once. */
uint32_t soft_chips_take_startup(struct soft_chips *c, int cpu, uint32_t mask, uint8_t *vector);
/* kvm_vcpu_events.sipi_vector. */
uint8_t soft_chips_sipi_vector(struct soft_chips *c, int cpu);
void soft_chips_set_sipi_vector(struct soft_chips *c, int cpu, uint8_t vector);

/* ---- time ---- */

/* The frequency and offset of a vCPU's TSC: tsc = reference * khz / host.tsc_khz + offset. */
void soft_chips_set_tsc(struct soft_chips *c, int cpu, uint64_t khz, uint64_t offset);
uint64_t soft_chips_tsc(struct soft_chips *c, int cpu);
/* When the next timer is due, on the clock's ns: this vCPU's LAPIC or the VM's PIT; -1 for `cpu`:
 * of all vCPUs. SOFT_CHIPS_NEVER: none. */
int64_t soft_chips_next_deadline(struct soft_chips *c, int cpu);
/* Do all that is due now, of all vCPUs and the VM, and write kvmclock's pages. For a vCPU that runs
 * (one that is halted in KVM_RUN as well): when it has SOFT_CHIPS_TIMER, and when it is entered. It
 * makes the callbacks `kick` and `write_guest`. */
void soft_chips_run_timers(struct soft_chips *c);
/* Deliver what is written to irqfds but has not been seen by the thread yet. The ioctls that read
 * state do it by themselves. */
void soft_chips_sweep(struct soft_chips *c);

#endif
