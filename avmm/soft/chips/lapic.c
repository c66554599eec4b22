/* The local APIC of a vCPU: what may interrupt it, in which order, and what it sends to others.
 *
 * Its registers are the page that guests see and KVM_GET_LAPIC returns, so what is pending is in
 * what is read: IRR, ISR, the timer's current count. Not in the page, as in KVM: NMIs (they are in
 * kvm_vcpu_events), and INIT and SIPI until the vCPU looks (KVM_GET_MP_STATE makes it look). */

#include "inside.h"

enum { ENABLED = 1 << 11, X2APIC = 1 << 10, BSP = 1 << 8, SOFTWARE_ON = 1 << 8,
       NO_EOI_BROADCAST = 1 << 12, BUSY = 1 << 12, ENTRIES = 6 };
#define DEFAULT_BASE 0xfee00000ULL
#define BASE_RESERVED 0xfff00000000002ffULL     /* 52 bits of address */
#define ICR_RESERVED 0xfff32000ULL              /* of the lower half, in x2APIC mode */

static int is_software_on(struct lapic *l)
{
    return chips_lapic_is_on(l) && *reg(l, R_SPIV) & SOFTWARE_ON;
}

int chips_lapic_is_on(const struct lapic *l)
{
    return !!(l->base & ENABLED);
}

int chips_lapic_is_x2(const struct lapic *l)
{
    return (l->base & (ENABLED | X2APIC)) == (ENABLED | X2APIC);
}

/* ---- vectors: 256 bits in eight registers ---- */

static uint32_t *word(struct lapic *l, uint32_t base, int vector)
{
    return reg(l, base + (vector >> 5) * 0x10);
}

static void set_vector(struct lapic *l, uint32_t base, int vector, int on)
{
    uint32_t bit = 1u << (vector & 31), *w = word(l, base, vector);
    *w = on ? *w | bit : *w & ~bit;
}

static int has_vector(struct lapic *l, uint32_t base, int vector)
{
    return *word(l, base, vector) >> (vector & 31) & 1;
}

static int highest(struct lapic *l, uint32_t base)
{
    for (int i = 7; i >= 0; i--) {
        uint32_t w = *reg(l, base + i * 0x10);
        if (w)
            return i * 32 + 31 - __builtin_clz(w);
    }
    return -1;
}

static uint8_t update_ppr(struct lapic *l)
{
    int serving = highest(l, R_ISR);
    uint8_t tpr = *reg(l, R_TPR), class = serving < 0 ? 0 : serving & 0xf0;
    return *reg(l, R_PPR) = (tpr & 0xf0) >= class ? tpr : class;
}

/* ---- interrupts in ---- */

int chips_lapic_pends(struct lapic *l)
{
    if (!chips_lapic_is_on(l))
        return -1;
    int vector = highest(l, R_IRR);
    return vector >= 0 && (vector & 0xf0) > (update_ppr(l) & 0xf0) ? vector : -1;
}

void chips_lapic_take(struct soft_chips *c, struct lapic *l, int vector)
{
    set_vector(l, R_IRR, vector, 0);
    set_vector(l, R_ISR, vector, 1);
    update_ppr(l);
    c->dirty = 1;
}

int chips_lapic_accepts_pic(const struct lapic *l)
{
    uint32_t entry = l->regs[R_LINT0 / 4];
    return !chips_lapic_is_on(l) || (!(entry & MASKED) && (entry >> 8 & 7) == EXTINT);
}

/* 1: taken. 0: not. */
int chips_lapic_accept(struct soft_chips *c, struct lapic *l, int mode, int vector, int level,
                       int trigger)
{
    switch (mode) {
    case LOWEST: case FIXED:
        if ((trigger && !level) || !is_software_on(l))
            return 0;
        set_vector(l, R_TMR, vector, trigger);
        set_vector(l, R_IRR, vector, 1);
        break;
    case NMI:
        if (l->nmis < 2)                /* one in service, one more that waits */
            l->nmis++;
        break;
    case INIT:
        if (trigger && !level)          /* "INIT level de-assert" was for an older bus */
            return 0;
        l->events = (l->events & SOFT_CHIPS_UNHALT) | SOFT_CHIPS_INIT;
        break;
    case SIPI:
        l->sipi_vector = vector;
        l->events |= SOFT_CHIPS_SIPI;
        break;
    case REMOTE_READ:
        l->events |= SOFT_CHIPS_UNHALT;
        break;
    default:                            /* there is no SMM; ExtINT is the PIC's own way */
        return 0;
    }
    c->dirty = 1;
    return 1;
}

/* One of the LAPIC's own sources: its entry of the local vector table says what it does. */
int chips_lapic_local(struct soft_chips *c, struct lapic *l, uint32_t entry)
{
    uint32_t e = *reg(l, entry);
    if (!chips_lapic_is_on(l) || e & MASKED)
        return 0;
    return chips_lapic_accept(c, l, e >> 8 & 7, e & 0xff, 1, e >> 15 & 1);
}

static void end_of_interrupt(struct soft_chips *c, struct lapic *l)
{
    int vector = highest(l, R_ISR);
    if (vector < 0)
        return;
    set_vector(l, R_ISR, vector, 0);
    update_ppr(l);
    chips_ioapic_eoi(c, vector, has_vector(l, R_TMR, vector),
                     !!(*reg(l, R_SPIV) & NO_EOI_BROADCAST));
    c->dirty = 1;
}

/* ---- interrupts out ---- */

static void send(struct soft_chips *c, int cpu, uint32_t low, uint32_t dest)
{
    struct message m = {
        .dest = dest, .vector = low, .mode = low >> 8 & 7, .logical = low >> 11 & 1,
        .level = low >> 14 & 1, .trigger = low >> 15 & 1, .shorthand = low >> 18 & 3,
    };
    chips_deliver(c, cpu, &m);
}

/* x2APIC's ICR, 64 bits. */
int chips_lapic_icr(struct soft_chips *c, int cpu, uint64_t value)
{
    struct lapic *l = &c->cpus[cpu].lapic;
    if (value & ICR_RESERVED)
        return -EINVAL;
    value &= ~(uint64_t)BUSY;
    *reg(l, R_ICR) = value;
    *reg(l, R_ICR2) = value >> 32;
    send(c, cpu, value, value >> 32);
    return 0;
}

/* ---- registers ---- */

static uint32_t x2_logical_id(int cpu)
{
    return (uint32_t)cpu >> 4 << 16 | 1u << (cpu & 15);
}

/* `known`: is there such a register to read? */
uint32_t chips_lapic_read(struct soft_chips *c, int cpu, uint32_t offset, int *known)
{
    struct lapic *l = &c->cpus[cpu].lapic;
    *known = 1;
    switch (offset) {
    case R_PPR: return update_ppr(l);
    case R_CURRENT: return chips_timer_current(c, l);
    case R_ARBITRATION: *known = !chips_lapic_is_x2(l); return 0;
    case R_DFR: case R_ICR2: *known = !chips_lapic_is_x2(l); break;
    case R_ID: case R_VERSION: case R_TPR: case R_LDR: case R_SPIV: case R_ESR: case R_ICR:
    case R_TIMER: case R_THERMAL: case R_COUNTERS: case R_LINT0: case R_LINT1: case R_ERROR:
    case R_INITIAL: case R_DIVIDE:
        break;
    default: *known = offset >= R_ISR && offset < R_ESR && !(offset & 0xf);
    }
    return *known ? *reg(l, offset) : 0;
}

static void set_spiv(struct soft_chips *c, struct lapic *l, uint32_t value)
{
    *reg(l, R_SPIV) = value & 0x3ff;
    if (value & SOFTWARE_ON)
        return;
    for (int i = 0; i < ENTRIES; i++)
        *reg(l, R_TIMER + i * 0x10) |= MASKED;
    chips_timer_mode(c, l);
}

static int set_entry(struct soft_chips *c, struct lapic *l, uint32_t offset, uint32_t value)
{
    static const uint32_t masks[ENTRIES] = { 0x710ff, 0x117ff, 0x117ff, 0x1f7ff,
                                             0x1f7ff, 0x110ff };
    value &= masks[(offset - R_TIMER) >> 4];
    if (!(*reg(l, R_SPIV) & SOFTWARE_ON))
        value |= MASKED;
    *reg(l, offset) = value;
    if (offset == R_TIMER)
        chips_timer_mode(c, l);
    return 0;
}

/* 0, or -EINVAL where x2APIC mode gives #GP. */
int chips_lapic_write(struct soft_chips *c, int cpu, uint32_t offset, uint32_t value)
{
    struct lapic *l = &c->cpus[cpu].lapic;
    int x2 = chips_lapic_is_x2(l);
    c->dirty = 1;
    switch (offset) {
    case R_ID: case R_LDR: case R_DFR: case R_ICR2:
        if (x2)
            return -EINVAL;
        *reg(l, offset) = offset == R_DFR ? value | 0x0fffffff : value & 0xff000000;
        return 0;
    case R_TPR: *reg(l, R_TPR) = value & 0xff; update_ppr(l); return 0;
    case R_EOI: end_of_interrupt(c, l); return 0;
    case R_SPIV: set_spiv(c, l, value); return 0;
    case R_ICR:
        *reg(l, R_ICR) = value & ~BUSY;
        send(c, cpu, value & ~BUSY, *reg(l, R_ICR2) >> 24);
        return 0;
    case R_TIMER: case R_THERMAL: case R_COUNTERS: case R_LINT0: case R_LINT1: case R_ERROR:
        return set_entry(c, l, offset, value);
    case R_INITIAL:
        if (l->mode != MODE_DEADLINE) {
            *reg(l, R_INITIAL) = value;
            chips_timer_start(c, l, value);
        }
        return 0;
    case R_DIVIDE: chips_timer_divide(c, l, value & 0xb); return 0;
    case R_ESR: return x2 && value ? -EINVAL : 0;
    case R_SELF_IPI:
        if (!x2 || value & ~0xffu)
            return -EINVAL;
        send(c, cpu, SELF << 18 | value, 0);
        return 0;
    }
    return -EINVAL;
}

void chips_lapic_set_tpr(struct soft_chips *c, int cpu, uint8_t value)
{
    struct lapic *l = &c->cpus[cpu].lapic;
    *reg(l, R_TPR) = value;
    update_ppr(l);
    c->dirty = 1;
}

/* Off, xAPIC and x2APIC: a guest may not go from off to x2APIC, nor back to xAPIC but by off. */
int chips_lapic_set_base(struct soft_chips *c, int cpu, uint64_t value, int host)
{
    struct lapic *l = &c->cpus[cpu].lapic;
    uint64_t old = l->base;
    int was_x2 = chips_lapic_is_x2(l), on = !!(value & ENABLED), x2 = !!(value & X2APIC);
    if (value == old)
        return 0;
    if (value & BASE_RESERVED || (x2 && !on))
        return -EINVAL;
    if (!host && ((was_x2 && on && !x2) || (!chips_lapic_is_on(l) && x2)))
        return -EINVAL;
    l->base = value;
    if (x2 && !was_x2) {
        *reg(l, R_ID) = cpu;
        *reg(l, R_LDR) = x2_logical_id(cpu);
    } else if (on && !x2 && (was_x2 || !(old & ENABLED))) {
        *reg(l, R_ID) = (uint32_t)cpu << 24;
    }
    c->dirty = 1;
    return 0;
}

/* ---- state ---- */

void chips_lapic_reset(struct soft_chips *c, int cpu, int by_init)
{
    struct lapic *l = &c->cpus[cpu].lapic;
    if (!by_init) {
        uint64_t base = DEFAULT_BASE | ENABLED | (cpu == 0 ? BSP : 0);
        memset(l, 0, sizeof *l);
        l->base = base;
        *reg(l, R_ID) = (uint32_t)cpu << 24;
    }
    uint32_t id = *reg(l, R_ID);
    memset(l->regs, 0, sizeof l->regs);
    *reg(l, R_ID) = id;
    *reg(l, R_VERSION) = (ENTRIES - 1) << 16 | 0x14;
    *reg(l, R_DFR) = 0xffffffff;
    *reg(l, R_SPIV) = 0xff;
    if (chips_lapic_is_x2(l))
        *reg(l, R_LDR) = x2_logical_id(cpu);
    for (int i = 0; i < ENTRIES; i++)
        *reg(l, R_TIMER + i * 0x10) = MASKED;
    if (cpu == 0)
        *reg(l, R_LINT0) = EXTINT << 8; /* no firmware has to do it: as KVM */
    l->mode = MODE_ONESHOT;
    chips_timer_stop(l);
    c->dirty = 1;
}

void chips_lapic_save(struct soft_chips *c, int cpu, struct kvm_lapic_state *state)
{
    struct lapic *l = &c->cpus[cpu].lapic;
    update_ppr(l);
    memcpy(state, l->regs, sizeof *state);
    uint32_t current = chips_timer_current(c, l), id = (uint32_t)cpu << 24;
    memcpy(state->regs + R_CURRENT, &current, sizeof current);
    if (chips_lapic_is_x2(l))           /* KVM's older format, until KVM_CAP_X2APIC_API */
        memcpy(state->regs + R_ID, &id, sizeof id);
}

void chips_lapic_load(struct soft_chips *c, int cpu, const struct kvm_lapic_state *state)
{
    struct lapic *l = &c->cpus[cpu].lapic;
    memcpy(l->regs, state, sizeof *state);
    *reg(l, R_VERSION) = (ENTRIES - 1) << 16 | 0x14;
    if (chips_lapic_is_x2(l)) {
        *reg(l, R_ID) = cpu;
        *reg(l, R_LDR) = x2_logical_id(cpu);
    }
    update_ppr(l);
    chips_timer_load(c, cpu);
    c->dirty = 1;
}
