/* The chips' insides, for their own files only.
 *
 * All of it is protected by `lock`. A function that changes what a vCPU could see sets `dirty`;
 * when the lock is released, chips_unlock() looks at every vCPU anew, and kicks those for whom
 * something new has come. So no chip has to know whom its change concerns. */

#ifndef AVMM_SOFT_CHIPS_INSIDE_H
#define AVMM_SOFT_CHIPS_INSIDE_H

#include "chips.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define NEVER SOFT_CHIPS_NEVER

enum { PIC_PINS = 16, PINS = KVM_IOAPIC_NUM_PINS, ROUTES = 4096, GSIS = 4096 };

/* Who can hold a line high: the level of a pin is the OR of them. */
enum { BY_USER = 0, BY_RESAMPLE = 1, BY_PIT = 2 };

/* A periodic timer is not shorter: as KVM's min_timer_period_us. */
enum { LEAST_PERIOD = 200000 };

/* An interrupt on its way to LAPICs. The modes are the fields' values, not shifted. */
struct message {
    uint32_t dest;
    uint8_t vector, mode, logical, level, trigger, shorthand, lowest_hint;
};

enum { FIXED = 0, LOWEST = 1, SMI = 2, REMOTE_READ = 3, NMI = 4, INIT = 5, SIPI = 6, EXTINT = 7 };
enum { NO_SHORTHAND = 0, SELF = 1, ALL = 2, OTHERS = 3 };

/* Offsets in the LAPIC's page. */
enum { R_ID = 0x20, R_VERSION = 0x30, R_TPR = 0x80, R_ARBITRATION = 0x90, R_PPR = 0xa0,
       R_EOI = 0xb0, R_LDR = 0xd0, R_DFR = 0xe0, R_SPIV = 0xf0, R_ISR = 0x100, R_TMR = 0x180,
       R_IRR = 0x200, R_ESR = 0x280, R_ICR = 0x300, R_ICR2 = 0x310, R_TIMER = 0x320,
       R_THERMAL = 0x330, R_COUNTERS = 0x340, R_LINT0 = 0x350, R_LINT1 = 0x360, R_ERROR = 0x370,
       R_INITIAL = 0x380, R_CURRENT = 0x390, R_DIVIDE = 0x3e0, R_SELF_IPI = 0x3f0 };

enum { MASKED = 1 << 16, MODE_ONESHOT = 0, MODE_PERIODIC = 1, MODE_DEADLINE = 2 };

struct lapic {
    uint32_t regs[KVM_APIC_REG_SIZE / 4];       /* as kvm_lapic_state has them */
    uint64_t base;              /* IA32_APIC_BASE */
    int mode;                   /* the timer's, as R_TIMER says */
    int64_t target;             /* when the timer fires next, or NEVER */
    int64_t period;             /* of the whole count, in ns; 0: no count */
    uint64_t deadline;          /* TSC; 0: none */
    int nmis;
    uint32_t events;            /* SOFT_CHIPS_INIT, _SIPI, _UNHALT */
    uint8_t sipi_vector;
};

static inline uint32_t *reg(struct lapic *l, uint32_t offset)
{
    return &l->regs[offset / 4];
}

struct cpu {
    int exists;
    struct lapic lapic;
    uint64_t tsc_khz, tsc_offset;
    uint64_t clock_msr;         /* KVM_SYSTEM_TIME */
    uint32_t clock_version;
    int clock_stopped;          /* KVMCLOCK_CTRL came: the next page tells the guest */
    int clock_stale;            /* the page is to be written */
    int timer_due;              /* somebody runs the timers when this vCPU runs */
    _Atomic uint32_t attention;
};

struct channel {
    struct kvm_pit_channel_state s;     /* count_load_time is not kept here */
    int64_t from;               /* its clock ran from here ... */
    int64_t held;               /* ... or stands, and has run this long */
    int runs;
};

struct pit {
    int exists, has_speaker;
    struct channel channels[3];
    uint32_t flags;
    int64_t next;               /* channel 0's next edge */
};

struct route {
    uint32_t gsi, type, chip, pin;      /* a slave's pins are 8 to 15 here */
    uint64_t address;
    uint32_t data;
};

struct irqfd {
    struct irqfd *next;
    int fd, resample;           /* our own duplicates; resample: -1 if it has none */
    int number;                 /* what the user called it */
    uint32_t gsi;
    uint64_t id;
};

struct soft_chips {
    pthread_mutex_t lock;
    struct soft_chips_host host;
    struct cpu cpus[SOFT_CHIPS_CPUS];
    int count;                  /* vCPU numbers are below this */
    int irqchip;
    int dirty;

    struct kvm_pic_state pics[2];
    uint8_t pic_sources[PIC_PINS];
    struct kvm_ioapic_state ioapic;
    uint32_t ioapic_delivered;  /* edges that are in `irr` only because the line is still high */
    uint8_t ioapic_sources[PINS];
    struct pit pit;

    struct route *routes;
    uint32_t route_count;

    uint64_t clock_base;        /* kvmclock at `clock_tsc` of the reference TSC */
    uint64_t clock_tsc;
    uint64_t wall_msr;
    int wall_stale;
    uint32_t wall_version;
    pthread_mutex_t pages;      /* taken before `lock`, by whoever writes kvmclock's pages */

    struct irqfd *irqfds;
    uint64_t next_id;
    int epoll, timer, stop;     /* descriptors, -1 while there are none */
    int64_t armed;              /* what `timer` is set to */
    int64_t told;               /* vCPUs know of timers that were due then */
    int threaded;
    pthread_t thread;
};

void chips_lock(struct soft_chips *c);
void chips_unlock(struct soft_chips *c);

/* time.c */
struct soft_chips_time chips_now(struct soft_chips *c);
uint64_t chips_tsc_at(struct soft_chips *c, struct cpu *v, uint64_t reference);
int64_t chips_ns_of_tsc(struct soft_chips *c, struct cpu *v, uint64_t ticks);
void chips_run(struct soft_chips *c);           /* all timers up to now */
int64_t chips_next(struct soft_chips *c, int cpu);

/* kvmclock.c */
void chips_clock_init(struct soft_chips *c);
void chips_clock_add(struct soft_chips *c, struct cpu *v);
void chips_clock_all_stale(struct soft_chips *c);
int chips_clock_is_stale(struct soft_chips *c);
void chips_clock_write(struct soft_chips *c);   /* without the lock */
int chips_clock_get(struct soft_chips *c, struct kvm_clock_data *data);
int chips_clock_set(struct soft_chips *c, const struct kvm_clock_data *data);
int chips_clock_ctrl(struct soft_chips *c, struct cpu *v);
int chips_clock_msr_get(struct soft_chips *c, struct cpu *v, uint32_t index, uint64_t *value);
int chips_clock_msr_set(struct soft_chips *c, struct cpu *v, uint32_t index, uint64_t value);

/* pic.c */
void chips_pic_init(struct soft_chips *c);
int chips_pic_set(struct soft_chips *c, int pin, int source, int level);
void chips_pic_update(struct soft_chips *c);      /* the slave's request goes to the master */
int chips_pic_pends(struct soft_chips *c);
int chips_pic_take(struct soft_chips *c);
void chips_pic_io(struct soft_chips *c, int write, uint16_t port, uint8_t *value);
void chips_pic_load(struct soft_chips *c, int chip, const struct kvm_pic_state *state);

/* ioapic.c */
void chips_ioapic_init(struct soft_chips *c);
int chips_ioapic_set(struct soft_chips *c, int pin, int source, int level);
void chips_ioapic_eoi(struct soft_chips *c, int vector, int level, int directed);
void chips_ioapic_again(struct soft_chips *c);  /* offer waiting levels to the LAPICs once more */
void chips_ioapic_mmio(struct soft_chips *c, int write, uint32_t offset, uint32_t *value);
void chips_ioapic_save(struct soft_chips *c, struct kvm_ioapic_state *state);
void chips_ioapic_load(struct soft_chips *c, const struct kvm_ioapic_state *state);

/* pit.c */
void chips_pit_init(struct soft_chips *c);
void chips_pit_io(struct soft_chips *c, int write, uint16_t port, uint8_t *value);
void chips_pit_run(struct soft_chips *c, int64_t now);
void chips_pit_save(struct soft_chips *c, struct kvm_pit_state2 *state);
int chips_pit_load(struct soft_chips *c, const struct kvm_pit_state2 *state);

/* lapic.c */
void chips_lapic_reset(struct soft_chips *c, int cpu, int by_init);
int chips_lapic_is_on(const struct lapic *l);           /* by IA32_APIC_BASE */
int chips_lapic_is_x2(const struct lapic *l);
int chips_lapic_accepts_pic(const struct lapic *l);
int chips_lapic_pends(struct lapic *l);                 /* its deliverable vector, or -1 */
void chips_lapic_take(struct soft_chips *c, struct lapic *l, int vector);
int chips_lapic_accept(struct soft_chips *c, struct lapic *l, int mode, int vector, int level,
                       int trigger);
int chips_lapic_local(struct soft_chips *c, struct lapic *l, uint32_t entry);
uint32_t chips_lapic_read(struct soft_chips *c, int cpu, uint32_t offset, int *known);
int chips_lapic_write(struct soft_chips *c, int cpu, uint32_t offset, uint32_t value);
int chips_lapic_icr(struct soft_chips *c, int cpu, uint64_t value);
int chips_lapic_set_base(struct soft_chips *c, int cpu, uint64_t value, int host);
void chips_lapic_set_tpr(struct soft_chips *c, int cpu, uint8_t value);
void chips_lapic_save(struct soft_chips *c, int cpu, struct kvm_lapic_state *state);
void chips_lapic_load(struct soft_chips *c, int cpu, const struct kvm_lapic_state *state);

/* lapic_timer.c */
void chips_timer_run(struct soft_chips *c, int cpu, const struct soft_chips_time *now);
void chips_timer_mode(struct soft_chips *c, struct lapic *l);   /* R_TIMER was written */
void chips_timer_start(struct soft_chips *c, struct lapic *l, uint32_t count);
void chips_timer_stop(struct lapic *l);
void chips_timer_divide(struct soft_chips *c, struct lapic *l, uint32_t value);
uint32_t chips_timer_current(struct soft_chips *c, struct lapic *l);
void chips_timer_deadline(struct soft_chips *c, int cpu, uint64_t deadline);
void chips_timer_load(struct soft_chips *c, int cpu);
void chips_timer_tsc_changed(struct soft_chips *c, int cpu);

/* route.c */
int chips_deliver(struct soft_chips *c, int from, const struct message *m);
int chips_msi(struct soft_chips *c, uint64_t address, uint32_t data);
int chips_gsi(struct soft_chips *c, uint32_t gsi, int source, int level);
int chips_gsi_of(struct soft_chips *c, uint32_t chip, uint32_t pin);    /* or -1 */
int chips_routes_default(struct soft_chips *c);
int chips_routes_set(struct soft_chips *c, const struct kvm_irq_routing *table);

/* irqfd.c */
int chips_irqfd(struct soft_chips *c, const struct kvm_irqfd *args);
void chips_acked(struct soft_chips *c, uint32_t chip, uint32_t pin);
void chips_sweep(struct soft_chips *c);
int chips_thread_start(struct soft_chips *c);
void chips_thread_arm(struct soft_chips *c);
void chips_thread_end(struct soft_chips *c);

#endif
