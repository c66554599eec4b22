/* kvmclock: a page for each vCPU says what time it was at which TSC, and how to go on from there.
 *
 * The VM's clock is a function of the reference TSC alone, so guests that compute it from their
 * TSCs and hosts that ask for it (KVM_GET_CLOCK) agree, and two vCPUs' pages never differ. A page
 * changes only when the clock is set, or a TSC. It is written by a vCPU that runs, as the guest's
 * own store would be, and not by whoever changed the clock: a machine that stands still to be saved
 * has memory that stands still, and nobody has to wait for a vCPU to stop. */

#include "inside.h"

#include <time.h>

enum { WALL = 0x11, SYSTEM = 0x12, WALL_NEW = 0x4b564d00, SYSTEM_NEW = 0x4b564d01 };
enum { ON = 1, FLAG_STABLE = 1, FLAG_STOPPED = 2 };

struct time_page {
    uint32_t version, pad;
    uint64_t tsc, ns;
    uint32_t multiplier;
    int8_t shift;
    uint8_t flags, pads[2];
};

struct wall_page {
    uint32_t version, seconds, nanoseconds;
};

/* ns = (ticks << shift) * multiplier >> 32, with a multiplier of at least half. */
static void scale_of(uint64_t khz, uint32_t *multiplier, int8_t *shift)
{
    unsigned __int128 m = ((unsigned __int128)1000000 << 64) / khz;     /* << 64 in all */
    int s = 32;
    while (m >> 64) {
        m >>= 1;
        s++;
    }
    while (!(m >> 63)) {
        m <<= 1;
        s--;
    }
    *multiplier = m >> 32;
    *shift = s - 32;
}

static uint64_t scaled(uint64_t ticks, uint64_t khz)
{
    uint32_t multiplier;
    int8_t shift;
    scale_of(khz, &multiplier, &shift);
    ticks = shift < 0 ? ticks >> -shift : ticks << shift;
    return (unsigned __int128)ticks * multiplier >> 32;
}

static uint64_t clock_at(struct soft_chips *c, uint64_t reference)
{
    return c->clock_base + scaled(reference - c->clock_tsc, c->host.tsc_khz);
}

static int64_t wall_now(struct soft_chips *c)
{
    if (c->host.wall)
        return c->host.wall(c->host.owner);
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void chips_clock_init(struct soft_chips *c)
{
    c->clock_base = 0;
    c->clock_tsc = chips_now(c).tsc;
}

/* The version begins where no earlier page's is likely to be: a guest that was saved while it read
 * its page must see that it has changed. */
void chips_clock_add(struct soft_chips *c, struct cpu *v)
{
    v->clock_version = (uint32_t)(chips_now(c).ns >> 10) & ~1u;
}

void chips_clock_all_stale(struct soft_chips *c)
{
    for (int i = 0; i < c->count; i++)
        if (c->cpus[i].exists && c->cpus[i].clock_msr & ON)
            c->cpus[i].clock_stale = 1;
}

int chips_clock_is_stale(struct soft_chips *c)
{
    int stale = c->wall_stale;
    for (int i = 0; i < c->count; i++)
        stale |= c->cpus[i].clock_stale;
    return stale;
}

/* Do all TSCs show the same? */
static int is_stable(struct soft_chips *c)
{
    const struct cpu *first = NULL;
    for (int i = 0; i < c->count; i++) {
        const struct cpu *v = &c->cpus[i];
        if (!v->exists)
            continue;
        if (!first)
            first = v;
        if (v->tsc_offset != first->tsc_offset || v->tsc_khz != first->tsc_khz)
            return 0;
    }
    return 1;
}

static struct time_page page_of(struct soft_chips *c, struct cpu *v)
{
    struct time_page p = {
        .version = v->clock_version += 2, .ns = c->clock_base,
        .tsc = chips_tsc_at(c, v, c->clock_tsc),
        .flags = (is_stable(c) ? FLAG_STABLE : 0) | (v->clock_stopped ? FLAG_STOPPED : 0),
    };
    scale_of(v->tsc_khz, &p.multiplier, &p.shift);
    v->clock_stopped = 0;
    v->clock_stale = 0;
    return p;
}

static struct wall_page wall_of(struct soft_chips *c)
{
    uint64_t at_boot = wall_now(c) - clock_at(c, chips_now(c).tsc);
    c->wall_stale = 0;
    return (struct wall_page) { c->wall_version += 2, at_boot / 1000000000, at_boot % 1000000000 };
}

/* An odd version says that the rest is being written. */
static void put(struct soft_chips *c, uint64_t gpa, const void *page, size_t size)
{
    uint32_t version, odd;
    if (!c->host.write_guest)
        return;
    memcpy(&version, page, sizeof version);
    odd = version - 1;
    if (c->host.write_guest(c->host.owner, gpa, &odd, sizeof odd))
        return;
    atomic_thread_fence(memory_order_seq_cst);
    c->host.write_guest(c->host.owner, gpa + 4, (const char *)page + 4, size - 4);
    atomic_thread_fence(memory_order_seq_cst);
    c->host.write_guest(c->host.owner, gpa, &version, sizeof version);
}

void chips_clock_write(struct soft_chips *c)
{
    pthread_mutex_lock(&c->lock);
    int any = chips_clock_is_stale(c);
    pthread_mutex_unlock(&c->lock);
    if (!any)
        return;
    pthread_mutex_lock(&c->pages);
    pthread_mutex_lock(&c->lock);
    for (int i = 0; i < c->count; i++) {
        struct cpu *v = &c->cpus[i];
        if (!v->clock_stale)
            continue;
        uint64_t gpa = v->clock_msr & ~(uint64_t)ON;
        struct time_page page = page_of(c, v);
        pthread_mutex_unlock(&c->lock);
        put(c, gpa, &page, sizeof page);
        pthread_mutex_lock(&c->lock);
    }
    if (c->wall_stale) {
        uint64_t gpa = c->wall_msr;
        struct wall_page page = wall_of(c);
        pthread_mutex_unlock(&c->lock);
        put(c, gpa, &page, sizeof page);
        pthread_mutex_lock(&c->lock);
    }
    c->dirty = 1;
    chips_unlock(c);
    pthread_mutex_unlock(&c->pages);
}

int chips_clock_get(struct soft_chips *c, struct kvm_clock_data *data)
{
    uint64_t reference = chips_now(c).tsc;
    memset(data, 0, sizeof *data);
    data->clock = clock_at(c, reference);
    data->flags = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC | (is_stable(c) ? KVM_CLOCK_TSC_STABLE
                                                                          : 0);
    data->realtime = wall_now(c);
    data->host_tsc = reference;
    return 0;
}

int chips_clock_set(struct soft_chips *c, const struct kvm_clock_data *data)
{
    if (data->flags & ~(KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC | KVM_CLOCK_TSC_STABLE))
        return -EINVAL;
    uint64_t wall = data->flags & KVM_CLOCK_REALTIME ? wall_now(c) : 0;
    c->clock_tsc = chips_now(c).tsc;
    c->clock_base = data->clock + (wall > data->realtime && wall ? wall - data->realtime : 0);
    chips_clock_all_stale(c);
    return 0;
}

/* Tell the guest that it stood still. */
int chips_clock_ctrl(struct soft_chips *c, struct cpu *v)
{
    (void)c;
    if (!(v->clock_msr & ON))
        return -EINVAL;
    v->clock_stopped = v->clock_stale = 1;
    return 0;
}

int chips_clock_msr_get(struct soft_chips *c, struct cpu *v, uint32_t index, uint64_t *value)
{
    if (index == SYSTEM || index == SYSTEM_NEW)
        *value = v->clock_msr;
    else if (index == WALL || index == WALL_NEW)
        *value = c->wall_msr;
    else
        return -ENOENT;
    return 0;
}

int chips_clock_msr_set(struct soft_chips *c, struct cpu *v, uint32_t index, uint64_t value)
{
    if (index == SYSTEM || index == SYSTEM_NEW) {
        v->clock_msr = value;
        v->clock_stale = value & ON;
    } else if (index == WALL || index == WALL_NEW) {
        c->wall_msr = value;
        c->wall_stale = value != 0;
    } else {
        return -ENOENT;
    }
    return 0;
}
