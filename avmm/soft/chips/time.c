/* The chips' time: one reading has nanoseconds and the reference TSC of the same moment. */

#include "inside.h"

#include <time.h>
#include <x86intrin.h>

struct soft_chips_time chips_now(struct soft_chips *c)
{
    struct soft_chips_time now;
    if (c->host.clock) {
        c->host.clock(c->host.owner, &now);
    } else {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        now.tsc = __rdtsc();
        now.ns = t.tv_sec * 1000000000LL + t.tv_nsec;
    }
    return now;
}

uint64_t chips_tsc_at(struct soft_chips *c, struct cpu *v, uint64_t reference)
{
    if (v->tsc_khz != c->host.tsc_khz)
        reference = (unsigned __int128)reference * v->tsc_khz / c->host.tsc_khz;
    return reference + v->tsc_offset;
}

/* Rounded up, at most NEVER. */
int64_t chips_ns_of_tsc(struct soft_chips *c, struct cpu *v, uint64_t ticks)
{
    (void)c;
    unsigned __int128 ns = ((unsigned __int128)ticks * 1000000 + v->tsc_khz - 1) / v->tsc_khz;
    return ns > NEVER ? NEVER : ns;
}

void chips_run(struct soft_chips *c)
{
    if (!c->irqchip)
        return;
    struct soft_chips_time now = chips_now(c);
    c->dirty |= chips_next(c, -1) <= now.ns;
    chips_pit_run(c, now.ns);
    for (int i = 0; i < c->count; i++)
        if (c->cpus[i].exists)
            chips_timer_run(c, i, &now);
}

int64_t chips_next(struct soft_chips *c, int cpu)
{
    int64_t next = c->pit.exists ? c->pit.next : NEVER;
    for (int i = 0; i < c->count; i++)
        if ((cpu < 0 || cpu == i) && c->cpus[i].exists && c->cpus[i].lapic.target < next)
            next = c->cpus[i].lapic.target;
    return next;
}
