/* The hand-over between a vCPU's thread and the task that serves its exits.
 *
 * It is a single word, `turn`: the vCPU's thread gives the turn to the task when an exit must
 * be served there, the task gives it back with the answer. Exactly one side has it, so what
 * they exchange (Python objects, the kvm_run page) needs no lock.
 *
 * Sleeping and waking costs five times what an exit costs, so each side first polls for a
 * moment, without the GIL. It polls only where that has paid off lately, as the kernel's
 * halt_poll_ns does: a poll that ended in sleep switches polling off, and it stays off for as
 * many further waits as polls have failed in a row, doubling. On a machine whose cores are
 * busy, polls fail, so both sides go to sleep at once.
 *
 * No wake-up is lost: the sleeper first says that it sleeps, then looks at `turn` once more;
 * the waker first writes `turn`, then looks whether somebody sleeps (all sequentially
 * consistent). The task sleeps in its event loop, on the eventfd `bell`; the vCPU's thread on
 * the futex `turn`.
 */

#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define POLL_NS 60000      /* longest poll; a ring-3 exit takes 30 to 60 us on a nested KVM */
#define SHORT_NS 500000    /* a wait after which polling is tried again: the other side's waking
                              up is part of it, and goes away when neither side sleeps */
#define MAX_PENALTY 1023   /* waits without polling after polls kept failing */

enum { TURN_VCPU = 0, TURN_TASK = 1 };

struct poller {
    uint32_t active;    /* poll at the next wait */
    uint32_t rest;      /* short waits to sit out before polling again */
    uint32_t penalty;   /* grows with each failed poll, cleared by one that paid off */
    int64_t since;      /* when this wait began */
};

struct avmm_bridge {
    _Atomic uint32_t turn;
    _Atomic uint32_t task_sleeps, vcpu_sleeps;
    _Atomic int64_t turned;     /* when the turn last changed hands */
    struct poller task, vcpu;
    int bell;
};

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int poll_turn(struct avmm_bridge *b, struct poller *p, uint32_t mine, int may_spin)
{
    if (atomic_load(&b->turn) == mine)
        return 1;
    p->since = now_ns();
    if (!p->active || !may_spin)
        return 0;
    for (int64_t end = p->since + POLL_NS; now_ns() < end;)
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&b->turn, memory_order_acquire) == mine) {
                p->penalty = 0;
                return 1;
            }
            __builtin_ia32_pause();
        }
    p->active = 0;
    p->penalty = p->penalty < MAX_PENALTY ? p->penalty * 2 + 1 : MAX_PENALTY;
    p->rest = p->penalty;
    return 0;
}

/* After a sleep: polling may pay off if the turn came soon after the wait began. */
static void slept(struct avmm_bridge *b, struct poller *p)
{
    if (p->active || atomic_load(&b->turned) - p->since > SHORT_NS)
        return;
    if (p->rest)
        p->rest--;
    else
        p->active = 1;
}

/* vCPU's thread: give the task its turn, for good: the thread ends. */
static void avmm_bridge_leave(struct avmm_bridge *b)
{
    atomic_store(&b->turned, now_ns());
    atomic_store(&b->turn, TURN_TASK);
    if (atomic_load(&b->task_sleeps)) {
        uint64_t one = 1;
        /* cannot fail: the counter is far from full, and the bell is closed only after us */
        ssize_t ignored = write(b->bell, &one, sizeof one);
        (void)ignored;
    }
}

/* vCPU's thread: give the task its turn and wait for the answer. */
static void avmm_bridge_call(struct avmm_bridge *b)
{
    avmm_bridge_leave(b);
    if (poll_turn(b, &b->vcpu, TURN_VCPU, 1))
        return;
    atomic_store(&b->vcpu_sleeps, 1);
    while (atomic_load(&b->turn) != TURN_VCPU)      /* EINTR (a kick) and EAGAIN: look again */
        syscall(SYS_futex, &b->turn, FUTEX_WAIT_PRIVATE, TURN_TASK, NULL, NULL, 0);
    atomic_store(&b->vcpu_sleeps, 0);
    slept(b, &b->vcpu);
}

/* Task: is it our turn? Polls first where that pays off. After 0 the task must wait for the
 * bell and then call avmm_bridge_woken(). */
static int avmm_bridge_poll(struct avmm_bridge *b, int may_spin)
{
    if (poll_turn(b, &b->task, TURN_TASK, may_spin))
        return 1;
    atomic_store(&b->task_sleeps, 1);
    if (atomic_load(&b->turn) != TURN_TASK)
        return 0;
    atomic_store(&b->task_sleeps, 0);
    return 1;
}

static void avmm_bridge_woken(struct avmm_bridge *b)
{
    uint64_t count;
    atomic_store(&b->task_sleeps, 0);
    ssize_t ignored = read(b->bell, &count, sizeof count);      /* EAGAIN: it did not ring */
    (void)ignored;
    slept(b, &b->task);
}

/* Task: give the turn back. */
static void avmm_bridge_answer(struct avmm_bridge *b)
{
    atomic_store(&b->turned, now_ns());
    atomic_store(&b->turn, TURN_VCPU);
    if (atomic_load(&b->vcpu_sleeps))
        syscall(SYS_futex, &b->turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Both in one: between them the GIL must not be taken, for the vCPU's thread needs it now. */
static int avmm_bridge_answer_and_poll(struct avmm_bridge *b, int may_spin)
{
    avmm_bridge_answer(b);
    return avmm_bridge_poll(b, may_spin);
}
