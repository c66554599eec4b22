/* The hand-over between a vCPU's thread and the task that serves its exits.
 *
 * It is a single word, `turn`: the vCPU's thread gives the turn to the task when an exit must be
 * served there, the task gives it back with the answer. Exactly one side has the turn, so the
 * things that they exchange (Python objects, the kvm_run page) need no lock.
 *
 * Sleeping and waking costs five times what an exit costs, so each side first polls for a moment,
 * without the GIL, yielding to whatever else wants the core (the other side, if the scheduler has
 * put both on one). Like the kernel's halt_poll_ns, a side does so only while its waits are short
 * on average. It measures every wait, polled or slept, from its beginning to the moment when the
 * other side gave the turn. If a handler waits for something, or if the host has more to run than
 * it has cores, waits are long, and both sides go to sleep at once. A poll that fails costs no
 * more than the sleep that follows it.
 *
 * No wake-up is lost: the sleeper first says that it sleeps, then looks at `turn` once more;
 * the waker first writes `turn`, then looks whether somebody sleeps (all sequentially
 * consistent). The task sleeps in its event loop, on the eventfd `bell`; the vCPU's thread on
 * the futex `turn`.
 */

#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define POLL_NS 120000         /* longest poll, and longest average wait at which to poll */
#define SAMPLE_MAX (8 * POLL_NS)   /* one long wait must not count forever */

enum { TURN_VCPU = 0, TURN_TASK = 1 };

struct poller {
    int64_t since;      /* when this wait began */
    int64_t average;    /* of the last waits, in ns */
};

/* How many turns have been given to tasks and not taken yet, in the whole process. While a task
 * polls, its event loop stands still, so the task stops polling when another vCPU wants to be
 * served. */
static _Atomic int tasks_wanted;

struct avmm_bridge {
    _Atomic uint32_t turn;
    _Atomic uint32_t task_sleeps, vcpu_sleeps;
    _Atomic uint32_t wanted;    /* counted in tasks_wanted */
    _Atomic int64_t turned;     /* when the turn last changed hands */
    struct poller task, vcpu;
    int bell;
    int handed;         /* the task is to serve the exit, and not only to await an answer */
};

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

#include "gate.h"

/* The side whose waits `p` measures has its turn. */
static void took_turn(struct avmm_bridge *b, struct poller *p)
{
    int64_t sample = atomic_load(&b->turned) - p->since;
    if (sample < 0)
        sample = 0;             /* the turn came before we began to wait for it */
    if (sample > SAMPLE_MAX)
        sample = SAMPLE_MAX;
    p->average += (sample - p->average) / 4;
    if (p == &b->task && atomic_exchange(&b->wanted, 0))
        atomic_fetch_sub(&tasks_wanted, 1);
}

/* Does another vCPU wait for its task? The order of the loads makes sure that our own turn is not
 * taken for another's. */
static int others_wanted(struct avmm_bridge *b)
{
    int all = atomic_load(&tasks_wanted);
    return all > (int)atomic_load(&b->wanted);
}

static int poll_turn(struct avmm_bridge *b, struct poller *p, uint32_t mine, int may_spin)
{
    int64_t end = p->since = now_ns();
    if (may_spin && p->average < POLL_NS)
        end += POLL_NS;
    while (atomic_load(&b->turn) != mine) {
        if (now_ns() >= end || (mine == TURN_TASK && others_wanted(b)))
            return 0;
        sched_yield();
    }
    took_turn(b, p);
    return 1;
}

static void give_turn(struct avmm_bridge *b)
{
    atomic_store(&b->turned, now_ns());
    if (!atomic_exchange(&b->wanted, 1))
        atomic_fetch_add(&tasks_wanted, 1);
    atomic_store(&b->turn, TURN_TASK);
    if (atomic_load(&b->task_sleeps)) {
        uint64_t one = 1;
        /* cannot fail: the counter is far from full, and the bell is closed only after us */
        ssize_t ignored = write(b->bell, &one, sizeof one);
        (void)ignored;
    }
}

/* vCPU's thread: give the task the turn. A thread that ends calls only this, because it never gets
 * the turn back. */
static void avmm_bridge_leave(struct avmm_bridge *b)
{
    gate_open();
    b->handed = 0;
    give_turn(b);
}

static void call_task(struct avmm_bridge *b, int handed)
{
    b->handed = handed;
    give_turn(b);
    if (poll_turn(b, &b->vcpu, TURN_VCPU, 1))
        return;
    atomic_store(&b->vcpu_sleeps, 1);
    while (atomic_load(&b->turn) != TURN_VCPU)      /* EINTR (a kick) and EAGAIN: look again */
        syscall(SYS_futex, &b->turn, FUTEX_WAIT_PRIVATE, TURN_TASK, NULL, NULL, 0);
    atomic_store(&b->vcpu_sleeps, 0);
    took_turn(b, &b->vcpu);
}

/* vCPU's thread: give the task the turn and wait for the answer. */
static void avmm_bridge_call(struct avmm_bridge *b, int handed)
{
    gate_open();
    call_task(b, handed);
    gate_pass();
}

/* Task: we no longer wait for the bell, whether it rang or not. Is it our turn? */
static int avmm_bridge_woken(struct avmm_bridge *b)
{
    uint64_t count;
    atomic_store(&b->task_sleeps, 0);
    ssize_t ignored = read(b->bell, &count, sizeof count);      /* EAGAIN: it did not ring */
    (void)ignored;
    if (atomic_load(&b->turn) != TURN_TASK)
        return 0;
    took_turn(b, &b->task);
    return 1;
}

/* Task: is it our turn? Polls first if that pays off. After 0 the task must wait for the bell and
 * then call avmm_bridge_woken(). */
static int avmm_bridge_poll(struct avmm_bridge *b, int may_spin)
{
    if (poll_turn(b, &b->task, TURN_TASK, may_spin))
        return 1;
    atomic_store(&b->task_sleeps, 1);
    return atomic_load(&b->turn) == TURN_TASK ? avmm_bridge_woken(b) : 0;
}

/* Task: give the turn back. */
static void avmm_bridge_answer(struct avmm_bridge *b)
{
    atomic_store(&b->turned, now_ns());
    atomic_store(&b->turn, TURN_VCPU);
    if (atomic_load(&b->vcpu_sleeps))
        syscall(SYS_futex, &b->turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Both in one call, so that the GIL is not taken in between: the vCPU's thread needs it now. */
static int avmm_bridge_answer_and_poll(struct avmm_bridge *b, int may_spin)
{
    avmm_bridge_answer(b);
    return avmm_bridge_poll(b, may_spin);
}
