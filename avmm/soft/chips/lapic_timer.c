/* The LAPIC's timer: a count that runs down once or again and again (the bus has 1 GHz, as KVM's,
 * before the divider), or a deadline on the guest's TSC.
 *
 * The current count is computed from the time of the next interrupt, and rounded up: it is 0 only
 * when nothing is to come. So a saved timer with a current count of 0 has fired or was never
 * started, and is not armed when it is loaded (KVM arms it). Interrupts that the guest was too slow
 * to see are one interrupt. */

#include "inside.h"

static uint32_t divisor(struct lapic *l)
{
    uint32_t v = *reg(l, R_DIVIDE);
    return 1u << ((((v & 3) | (v >> 1 & 4)) + 1) & 7);
}

static void set_period(struct lapic *l)
{
    l->period = (int64_t)*reg(l, R_INITIAL) * divisor(l);
    if (l->period && l->mode == MODE_PERIODIC && l->period < LEAST_PERIOD)
        l->period = LEAST_PERIOD;
}

void chips_timer_stop(struct lapic *l)
{
    l->target = NEVER;
    l->period = 0;
    l->deadline = 0;
}

void chips_timer_mode(struct soft_chips *c, struct lapic *l)
{
    int mode = *reg(l, R_TIMER) >> 17 & 3;
    if (mode == l->mode)
        return;
    if ((mode == MODE_DEADLINE) != (l->mode == MODE_DEADLINE)) {
        chips_timer_stop(l);
        *reg(l, R_INITIAL) = 0;
    }
    l->mode = mode;
    if (l->period && mode != MODE_DEADLINE) {
        int64_t now = chips_now(c).ns;
        set_period(l);
        if (l->target != NEVER && l->target - now > l->period)
            l->target = now + l->period;
    }
}

/* Start with `count` still to go. */
void chips_timer_start(struct soft_chips *c, struct lapic *l, uint32_t count)
{
    set_period(l);
    l->target = NEVER;
    if (l->period && count)
        l->target = chips_now(c).ns + (count == *reg(l, R_INITIAL) ? l->period
                                       : (int64_t)count * divisor(l));
}

/* What is left is left in counts: it lasts longer or shorter now. */
void chips_timer_divide(struct soft_chips *c, struct lapic *l, uint32_t value)
{
    int64_t now = chips_now(c).ns, was = divisor(l), left = l->target - now;
    *reg(l, R_DIVIDE) = value;
    if (!l->period || divisor(l) == was)
        return;
    set_period(l);
    if (l->target != NEVER)
        l->target = now + (left > 0 ? (int64_t)((__int128)left * divisor(l) / was) : 0);
}

uint32_t chips_timer_current(struct soft_chips *c, struct lapic *l)
{
    if (!l->period || l->target == NEVER || l->mode == MODE_DEADLINE)
        return 0;
    int64_t left = l->target - chips_now(c).ns, d = divisor(l);
    uint32_t count = left <= 0 ? 1 : (left + d - 1) / d;
    return count > *reg(l, R_INITIAL) ? *reg(l, R_INITIAL) : count;
}

/* When the TSC reaches the deadline. The numbers are unsigned: a deadline that a guest sets to
 * "never" is far ahead, not behind. */
static void aim(struct soft_chips *c, struct cpu *v, const struct soft_chips_time *now)
{
    uint64_t tsc = chips_tsc_at(c, v, now->tsc), deadline = v->lapic.deadline;
    int64_t ns = deadline <= tsc ? 0 : chips_ns_of_tsc(c, v, deadline - tsc);
    v->lapic.target = ns >= NEVER - now->ns ? NEVER - 1 : now->ns + ns;
    if (!ns)
        v->timer_due = c->dirty = 1;    /* the thread's timer is for what is to come */
}

static void set_deadline(struct soft_chips *c, struct cpu *v, uint64_t deadline)
{
    struct soft_chips_time now = chips_now(c);
    v->lapic.deadline = deadline;
    v->lapic.target = NEVER;
    if (deadline)
        aim(c, v, &now);
}

void chips_timer_run(struct soft_chips *c, int cpu, const struct soft_chips_time *now)
{
    struct cpu *v = &c->cpus[cpu];
    struct lapic *l = &v->lapic;
    if (now->ns < l->target)
        return;
    if (l->mode == MODE_DEADLINE) {
        if (l->deadline > chips_tsc_at(c, v, now->tsc)) {       /* the clocks differ a little */
            aim(c, v, now);
            if (l->target <= now->ns)
                l->target = now->ns + 1;
            return;
        }
        l->deadline = 0;
        l->target = NEVER;
    } else if (l->mode == MODE_PERIODIC && l->period) {
        l->target += ((now->ns - l->target) / l->period + 1) * l->period;
    } else {
        l->target = NEVER;
    }
    chips_lapic_local(c, l, R_TIMER);
}

/* IA32_TSC_DEADLINE was written. */
void chips_timer_deadline(struct soft_chips *c, int cpu, uint64_t deadline)
{
    struct cpu *v = &c->cpus[cpu];
    if (!chips_lapic_is_on(&v->lapic) || v->lapic.mode != MODE_DEADLINE)
        return;
    set_deadline(c, v, deadline);
    struct soft_chips_time now = chips_now(c);
    chips_timer_run(c, cpu, &now);
}

/* The page has been loaded, with the current count in it. */
void chips_timer_load(struct soft_chips *c, int cpu)
{
    struct lapic *l = &c->cpus[cpu].lapic;
    uint32_t current = *reg(l, R_CURRENT);
    uint64_t deadline = l->deadline;
    int was = l->mode;
    *reg(l, R_CURRENT) = 0;
    l->mode = *reg(l, R_TIMER) >> 17 & 3;
    chips_timer_stop(l);
    if (l->mode == MODE_DEADLINE) {
        *reg(l, R_INITIAL) = 0;
        if (was == MODE_DEADLINE)
            set_deadline(c, &c->cpus[cpu], deadline);
        return;
    }
    if (current > *reg(l, R_INITIAL))
        current = *reg(l, R_INITIAL);
    chips_timer_start(c, l, current);
}

void chips_timer_tsc_changed(struct soft_chips *c, int cpu)
{
    struct cpu *v = &c->cpus[cpu];
    if (v->lapic.mode == MODE_DEADLINE && v->lapic.deadline)
        set_deadline(c, v, v->lapic.deadline);
}
