/* A deterministic run: the same inputs give the same run, bit for bit.
 *
 * Time is what the guest has executed: each block that begins counts BLOCK_NS. The TSC, the chips'
 * timers, kvmclock and the wall clock are all made of it. A timer that is due stops the guest at a
 * block's start, so at the same block in each run.
 *
 * Only one vCPU runs, for a slice whose length is drawn, like the vCPU itself, from the seed. Short
 * slices are as frequent as long ones, so that a race of a few instructions is met. A slice does not
 * end while an instruction waits for its device.
 *
 * The guest runs only while the host has nothing to do: all vCPUs must be in KVM_RUN, and the host
 * must have settled. Whatever may make the host act (a vCPU that leaves, a doorbell, an interrupt
 * that a device wants to hear the end of, or just a period of time) takes that back. Then, when all
 * vCPUs are inside, one of them leaves with KVM_EXIT_INTR (and 0, not -EINTR). When it comes back
 * the host has settled. So the host acts only at moments that are the same in each run.
 *
 * A vCPU that is kicked leaves between two blocks and changes nothing of all that: the vCPU that was
 * chosen and the rest of its slice stay. What was not done when it left is done when it comes back.
 *
 * If no vCPU can run, time jumps to the next timer, the chips' or the host's. If there is none, the
 * host is told so and may do what it likes; here it is looked for interrupts once in a while. */

#include "engine.h"
#include "chips_glue.h"
#include "soft.h"

#include <errno.h>
#include <sys/time.h>
#include <unistd.h>

enum { PERIOD_NS = 1000000, LONGEST_SLICE_BITS = 14, LONGEST_TAIL = 8 };
#define EPOCH_NS 1735689600000000000LL      /* 2025-01-01, the wall clock's start */

/* splitmix64 */
static uint64_t draw(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15ULL;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
    return z ^ z >> 31;
}

uint64_t soft_order_entropy(struct vm *vm)
{
    return draw(&vm->order.entropy);
}

/* ---- the clocks ---- */

int64_t soft_epoch(void)
{
    return EPOCH_NS;
}

int64_t soft_order_wall(void *owner)
{
    return EPOCH_NS + ((struct vm *)owner)->order.ns;
}

void soft_order_clock(void *owner, struct soft_chips_time *now)
{
    now->ns = ((struct vm *)owner)->order.ns;
    now->tsc = now->ns * (ORDER_TSC_KHZ / 1000000);
}

/* The library makes its TLB smaller if it was used little in a while of real time. What the TLB
 * holds shows: a guest that clears the accessed bit of a page and does not flush gets it back only
 * when the page is walked to again. So these dates are set to the far future, and no while is ever
 * over. They are found by their value, which is the time at which the instance was made. */
static int find_dates(struct vm *vm)
{
    struct order *o = &vm->order;
    struct timeval t;
    gettimeofday(&t, NULL);
    int64_t now = t.tv_sec * 1000000000LL + t.tv_usec * 1000;
    for (char *at = vm->cpu; at < (char *)vm->env; at += 8)
        if (*(int64_t *)at <= now && *(int64_t *)at > now - 60000000000LL) {
            if (o->date_count == TLB_DATES)
                return -ENOSYS;
            o->dates[o->date_count++] = (int64_t *)at;
        }
    return o->date_count == TLB_DATES ? 0 : -ENOSYS;
}

void soft_order_pin_tlb(struct vm *vm)
{
    for (int i = 0; i < vm->order.date_count; i++)
        *vm->order.dates[i] = INT64_MAX / 2;
}

/* ---- what has happened ---- */

void soft_order_record(struct vcpu *v, enum record_kind kind, uint64_t what, uint64_t at,
                       uint64_t value)
{
    struct order *o = &v->vm->order;
    if (!o->on)
        return;
    struct record r = { o->ns, kind, v->id, what, at, value };
    o->records++;
    for (size_t i = 0; i < sizeof r; i += 8)
        o->digest = (o->digest ^ *(uint64_t *)((char *)&r + i)) * 0x9e3779b97f4a7c15ULL
                    ^ o->digest >> 29;
    if (o->log >= 0) {
        ssize_t ignored = write(o->log, &r, sizeof r);
        (void)ignored;
    }
}

/* ---- who runs ---- */

/* The host has to settle before the guest runs on. */
void soft_order_outside(struct vm *vm)
{
    if (vm->order.on) {
        vm->order.settled = 0;
        soft_attend(vm);
    }
}

void soft_order_enter(struct vcpu *v)
{
    struct order *o = &v->vm->order;
    o->inside++;
    if (v->settles && !v->run->immediate_exit) {
        o->settled = 1;
        o->period_end = (o->ns / PERIOD_NS + 1) * PERIOD_NS;
        /* What an exit has raised comes right after its instruction, which may be in hand. */
        soft_glue_sweep(v->vm);
    }
    v->settles = 0;
}

void soft_order_leave(struct vcpu *v)
{
    v->vm->order.inside--;
    soft_order_outside(v->vm);
}

static void run_timers(struct vm *vm)
{
    if (soft_glue_deadline(vm) <= vm->order.ns)
        soft_glue_run_timers(vm);
}

static void look_again(struct vm *vm)
{
    struct order *o = &vm->order;
    int64_t look = soft_glue_deadline(vm);
    if (o->slice_end < look)
        look = o->slice_end;
    if (o->period_end < look)
        look = o->period_end;
    if (o->host_deadline < look)
        look = o->host_deadline;
    o->look = look;
}

static int host_is_due(struct order *o)
{
    return o->ns >= o->period_end || o->ns >= o->host_deadline;
}

/* Between two blocks: is this slice over but for some instructions? They are a block of their own,
 * which is to run whatever asks for attention. Without them no slice would end within a block, and
 * a race of two instructions of one block would never be met. */
int soft_order_tail(struct vcpu *v)
{
    struct order *o = &v->vm->order;
    if (!o->on || o->ns < o->slice_end || o->tail != NO_TAIL || o->current != v)
        return 0;
    uint32_t length = draw(&o->choices) % LONGEST_TAIL;
    o->tail = length ? TAIL_ARMED : TAIL_RAN;
    if (length)
        AT(v->vm->cpu, CPU_CFLAGS_NEXT, uint32_t) = length;
    return length;
}

/* Between two blocks: does the vCPU leave the guest here? */
int soft_order_stops(struct vcpu *v)
{
    struct order *o = &v->vm->order;
    if (!o->on)
        return 0;
    run_timers(v->vm);
    look_again(v->vm);
    return !o->settled || o->inside != v->vm->vcpu_count || o->ns >= o->slice_end
           || host_is_due(o);
}

/* Among those that can run. NULL: none can. */
static struct vcpu *choose(struct vm *vm)
{
    struct order *o = &vm->order;
    struct vcpu *able[MOST_VCPUS];
    int count = 0;
    for (int i = 0; i < vm->vcpu_count; i++)
        if (soft_is_runnable(vm->vcpus[i]))
            able[count++] = vm->vcpus[i];
    if (!count)
        return NULL;
    struct vcpu *v = able[count > 1 ? draw(&o->choices) % count : 0];
    uint64_t bits = draw(&o->choices);
    int64_t blocks = 1LL << (bits >> 32) % LONGEST_SLICE_BITS;
    blocks += bits % blocks;
    o->slice_end = o->ns + blocks * BLOCK_NS;
    o->tail = NO_TAIL;
    soft_order_record(v, RECORD_SLICE, blocks, 0, 0);
    return v;
}

/* The one vCPU that is to leave, so that the host settles. */
static enum step settle(struct vcpu *v)
{
    struct order *o = &v->vm->order;
    struct vcpu *speaker = o->current ? o->current : v->vm->vcpus[0];
    o->settled = 0;
    if (v == speaker) {
        v->settles = 1;
        return STEP_SETTLE;
    }
    soft_wake(speaker);
    return STEP_WAIT;
}

/* No vCPU can run now. Returns 0 if time has jumped to a moment at which one may. */
static int waits(struct vm *vm)
{
    struct order *o = &vm->order;
    int64_t next = soft_glue_deadline(vm);
    if (o->host_deadline < next)
        next = o->host_deadline;
    if (next == ORDER_NEVER)
        return 1;
    if (next > o->ns) {
        o->ns = next;
        soft_order_record(vm->vcpus[0], RECORD_SKIP, 0, 0, 0);
    }
    return 0;
}

/* With the turn. */
enum step soft_order_step(struct vcpu *v)
{
    struct vm *vm = v->vm;
    struct order *o = &vm->order;
    if (o->current && o->current->replay != NOT_REPLAYING)
        return v == o->current ? STEP_RUN : STEP_WAIT;
    if (o->inside != vm->vcpu_count)
        return STEP_WAIT;
    if (!o->settled)
        return settle(v);
    soft_glue_sweep(vm);
    for (;;) {
        run_timers(vm);
        if (host_is_due(o) && !o->idle)
            return settle(v);
        if (!o->current || o->ns >= o->slice_end || !soft_is_runnable(o->current))
            o->current = choose(vm);
        if (o->current)
            break;
        if (waits(vm)) {
            if (!o->idle) {
                o->idle = 1;
                return settle(v);
            }
            return v == vm->vcpus[0] ? STEP_WAIT_FOR_HOST : STEP_WAIT;
        }
        o->idle = 0;
    }
    if (o->idle) {              /* the host has woken it, in its own time: let it finish */
        o->idle = 0;
        return settle(v);
    }
    look_again(vm);
    if (v == o->current)
        return STEP_RUN;
    soft_wake(o->current);
    return STEP_WAIT;
}

/* Before it has chips. */
int soft_order_seed(struct vm *vm, uint64_t seed)
{
    struct order *o = &vm->order;
    int answer = find_dates(vm);
    if (answer)
        return answer;
    vm->tsc_khz = ORDER_TSC_KHZ;
    o->on = 1;
    o->log = -1;
    o->choices = seed;
    o->entropy = draw(&o->choices);
    o->look = o->host_deadline = ORDER_NEVER;
    o->period_end = PERIOD_NS;
    return 0;
}
