/* The parking lot: where the vCPUs of one machine stand while it is paused.
 *
 * Whoever pauses asks all vCPUs at once: each gets `immediate_exit`, and a kick if it is in
 * KVM_RUN or on its way there. A vCPU's thread parks when it has finished what it had in hand, and
 * the last one to park rings the bell of the task that waits for them. None of this needs the GIL.
 * If it did, sixteen threads would wait for the GIL one after the other, with a context switch
 * each.
 *
 * `round` is odd while vCPUs are to be parked; each pause and each end of one is a round of its
 * own. `missing` holds the number of vCPUs that have not parked yet, together with the round for
 * which it counts. So a vCPU that parks late, for a pause that was given up, is not counted for
 * the next pause.
 *
 * No request is lost. A thread clears `immediate_exit` before it looks at `round`, and sets `runs`
 * before it enters KVM_RUN. The asking side writes `round`, then `immediate_exit`, and only then
 * looks at `runs` and kicks the thread. All of this is sequentially consistent, with a fence
 * before KVM_RUN, because the kernel loads the flag with an ordinary load. So the thread sees the
 * round, or its next KVM_RUN sees the flag, or the signal interrupts the KVM_RUN that it is in. A
 * KVM_RUN of a drain (completion.py) does not set `runs` and is not kicked, because it is entered
 * with the flag set.
 *
 * avmm/vcpu/completion.py, "The drain", says when a vCPU is drained. Here is the part of it for a
 * vCPU that is in the guest when it is asked to park. tests/kvm/test_drain.py checks that both
 * agree.
 */

#include <pthread.h>

#include "claims.h"

#define AVMM_SERVED 0x10000     /* instead of an exit reason: the exit is served, by C or by its task */
#define KVM_RUN_NEEDS_COMPLETION (1 << 15)      /* as it was proposed; see completion.py */

/* On these KVM decides by `exit_reason` whether there is an exit to complete. */
#ifndef COMPLETES_BY_REASON
#if defined(__aarch64__) || defined(__riscv)
#define COMPLETES_BY_REASON 1
#else
#define COMPLETES_BY_REASON 0
#endif
#endif

#define LINGER_NS 200000        /* a machine stands still this soon if nothing delays it ... */
#define LINGER_EACH_NS 25000    /* ... and this much later for each vCPU */

struct avmm_spot {
    struct avmm_lot *lot;
    struct kvm_run *run;
    int fd;
    struct avmm_bridge *bridge; /* to the task that serves what only a task can; NULL: Python serves
                                 * all exits */
    struct avmm_claims *claims;
    int pid, tid;               /* under the lot's mutex; tid 0: it has no thread now */
    int gone;                   /* under the lot's mutex: it never runs again */
    _Atomic uint32_t parked;    /* the round for which it has parked */
    _Atomic uint32_t stands;    /* a futex: 1 while it is to stay parked */
    _Atomic uint32_t stopping;
    _Atomic uint32_t runs;      /* it is in KVM_RUN, or about to be */
};

struct avmm_lot {
    pthread_mutex_t mutex;      /* protects the set of members, and makes each request atomic */
    _Atomic uint32_t round;
    _Atomic uint64_t missing;   /* round << 32 | count */
    _Atomic uint32_t sleeps;    /* the task waits for the bell */
    int bell;
    int always;                 /* CompletionMode.ALWAYS: complete whatever the exit was */
    int count;
    struct avmm_spot *spots;
};

static void set_immediate_exit(struct kvm_run *run, uint8_t value)
{
    __atomic_store_n(&run->immediate_exit, value, __ATOMIC_SEQ_CST);
}

static void avmm_lot_init(struct avmm_lot *lot)
{
    pthread_mutex_init(&lot->mutex, NULL);
    for (int i = 0; i < lot->count; i++)
        lot->spots[i].lot = lot;
}

/* ---- the side that asks ---- */

static int ask(struct avmm_spot *s)
{
    set_immediate_exit(s->run, 1);
    return s->tid && atomic_load(&s->runs) ? send_kick(s->pid, s->tid) : 0;
}

static void let_on(struct avmm_spot *s)
{
    atomic_store(&s->stands, 0);
    syscall(SYS_futex, &s->stands, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Ask all vCPUs to park. Returns 0, or -errno if a kick fails. */
static int avmm_lot_ask(struct avmm_lot *lot)
{
    int answer = 0;
    pthread_mutex_lock(&lot->mutex);
    uint32_t round = atomic_load(&lot->round) | 1;
    uint64_t missing = 0;
    for (int i = 0; i < lot->count; i++)
        missing += !lot->spots[i].gone;
    if (round != atomic_load(&lot->round)) {
        atomic_store(&lot->missing, (uint64_t)round << 32 | missing);
        atomic_store(&lot->round, round);
    }
    for (int i = 0; i < lot->count; i++)
        if (!lot->spots[i].gone && answer == 0)
            answer = ask(&lot->spots[i]);
    pthread_mutex_unlock(&lot->mutex);
    return answer;
}

/* Let all vCPUs run on, parked or not. */
static void avmm_lot_release(struct avmm_lot *lot)
{
    pthread_mutex_lock(&lot->mutex);
    uint32_t round = atomic_load(&lot->round);
    atomic_store(&lot->round, round + (round & 1));
    for (int i = 0; i < lot->count; i++)
        let_on(&lot->spots[i]);
    pthread_mutex_unlock(&lot->mutex);
}

static int all_parked(struct avmm_lot *lot)
{
    return (uint32_t)atomic_load(&lot->missing) == 0;
}

/* The task no longer waits for the bell, whether it rang or not. */
static void avmm_lot_woken(struct avmm_lot *lot)
{
    uint64_t count;
    atomic_store(&lot->sleeps, 0);
    ssize_t ignored = read(lot->bell, &count, sizeof count);    /* EAGAIN: it did not ring */
    (void)ignored;
}

/* Do all vCPUs stand still? Polls for a little while, unless a vCPU wants to be served, because
 * the event loop stands still while it polls. After 0 the task must wait for the bell and then
 * call avmm_lot_woken(). */
static int avmm_lot_poll(struct avmm_lot *lot, int linger)
{
    int64_t end = linger ? now_ns() + LINGER_NS + lot->count * LINGER_EACH_NS : 0;
    while (!all_parked(lot)) {
        if (!linger || atomic_load(&tasks_wanted) || now_ns() >= end) {
            atomic_store(&lot->sleeps, 1);
            if (!all_parked(lot))
                return 0;
            avmm_lot_woken(lot);
            return 1;
        }
        sched_yield();
    }
    return 1;
}

static int avmm_spot_is_parked(struct avmm_spot *s)
{
    return s->gone || atomic_load(&s->parked) == atomic_load(&s->lot->round);
}

/* Ask one vCPU to end, parked or not. Returns 0, or -errno if the kick fails. */
static int avmm_spot_stop(struct avmm_spot *s)
{
    atomic_store(&s->stopping, 1);
    pthread_mutex_lock(&s->lot->mutex);
    int answer = s->gone ? 0 : ask(s);
    let_on(s);
    pthread_mutex_unlock(&s->lot->mutex);
    return answer;
}

/* ---- the vCPU's thread ---- */

static void count_parked(struct avmm_spot *s, uint32_t round)
{
    struct avmm_lot *lot = s->lot;
    atomic_store(&s->parked, round);
    uint64_t missing = atomic_load(&lot->missing);
    while (missing >> 32 == round)
        if (atomic_compare_exchange_weak(&lot->missing, &missing, missing - 1)) {
            if ((uint32_t)(missing - 1) == 0 && atomic_load(&lot->sleeps)) {
                uint64_t one = 1;
                ssize_t ignored = write(lot->bell, &one, sizeof one);   /* cannot fill up */
                (void)ignored;
            }
            return;
        }
}

/* The calling thread is the vCPU's from now on. */
static void avmm_spot_enter(struct avmm_spot *s)
{
    pthread_mutex_lock(&s->lot->mutex);
    s->pid = getpid();
    s->tid = (int)syscall(SYS_gettid);
    pthread_mutex_unlock(&s->lot->mutex);
}

/* The vCPU never runs again: nobody waits for it or kicks its thread. Idempotent. */
static void avmm_spot_leave(struct avmm_spot *s)
{
    pthread_mutex_lock(&s->lot->mutex);
    uint32_t round = atomic_load(&s->lot->round);
    if (!s->gone && (round & 1) && atomic_load(&s->parked) != round)
        count_parked(s, round);
    s->tid = 0;
    s->gone = 1;
    pthread_mutex_unlock(&s->lot->mutex);
}

/* Should the vCPU park, rather than end? */
static int is_wanted(struct avmm_spot *s)
{
    return (atomic_load(&s->lot->round) & 1) && !atomic_load(&s->stopping);
}

/* Stand still until the round ends, if it is one to park in. The vCPU must be drained. */
static void stand(struct avmm_spot *s)
{
    struct avmm_lot *lot = s->lot;
    uint32_t round = atomic_load(&lot->round);
    if (!(round & 1))
        return;
    atomic_store(&s->stands, 1);
    count_parked(s, round);
    if (atomic_load(&lot->round) != round || atomic_load(&s->stopping))
        return;
    while (atomic_load(&s->stands))             /* EINTR (a kick) and EAGAIN: look again */
        syscall(SYS_futex, &s->stands, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
}

static void avmm_spot_park(struct avmm_spot *s)
{
    gate_open();
    stand(s);
    gate_pass();
}

/* 0, or -errno. */
static int run_once(struct avmm_spot *s)
{
    atomic_store(&s->runs, 1);
    atomic_thread_fence(memory_order_seq_cst);
    int answer = avmm_ioctl(s->fd, KVM_RUN, NULL);
    atomic_store_explicit(&s->runs, 0, memory_order_release);
    return answer;
}

/* Serve the exit in `run`, if that needs no GIL: in C, or by the vCPU's task. Returns what the
 * thread has to go back to Python with, or -EAGAIN if it can enter the guest again. */
static int serve_without_gil(struct avmm_spot *s)
{
    struct kvm_run *run = s->run;
    const struct avmm_claim *claim = s->bridge ? claim_of_exit(s->claims, run) : NULL;
    if (!claim)
        return run->exit_reason;
    if (!serve_register(claim, run)) {
        if (!is_tasks(claim, run))
            return run->exit_reason;
        call_task(s->bridge, 1);
    }
    return run->immediate_exit || atomic_load(&s->stopping) ? AVMM_SERVED : -EAGAIN;
}

/* Nearly always the vCPU is in the guest when it is asked to park. Then there is no exit to serve,
 * and it is drained and parks in here, by the rule of completion.py: `drained` is the answer of
 * CompletionPolicy.settles(), and the second KVM_RUN is drain()'s first. If that one exits, the
 * exit is returned, and is served and drained in Python. */
static int run_or_park(struct avmm_spot *s)
{
    struct kvm_run *run = s->run;
    for (;;) {
        int drained = run->immediate_exit;      /* nobody else clears it */
        /* Older kernels do not change `exit_reason` then. A stale reason would be taken for this
         * run's reason, and for an exit that is being served (loop.py). */
        if (!COMPLETES_BY_REASON || run->exit_reason == KVM_EXIT_INTR)
            run->exit_reason = KVM_EXIT_UNKNOWN;
        int answer = run_once(s);
        if (answer >= 0) {
            answer = serve_without_gil(s);
            if (answer == -EAGAIN)
                continue;
            return answer;
        }
        if (answer != -EINTR)
            return answer;
        drained |= run->exit_reason == KVM_EXIT_INTR && !s->lot->always
            && !(run->flags & KVM_RUN_NEEDS_COMPLETION);
        set_immediate_exit(run, 0);
        if (!is_wanted(s))
            return -EINTR;
        if (!drained) {
            set_immediate_exit(run, 1);
            answer = run_once(s);
            if (answer >= 0)
                return run->exit_reason;
            if (answer != -EINTR)
                return answer;
            set_immediate_exit(run, 0);
        }
        while (is_wanted(s)) {
            stand(s);
            /* Whoever asked while the vCPU stood here has set the flag again, for another round or
             * a second time. */
            set_immediate_exit(run, 0);
        }
        if (atomic_load(&s->stopping))
            return -ECANCELED;
    }
}

/* KVM_RUN. Returns the exit reason, or -errno: -EINTR if it was interrupted for another reason
 * than to park, -ECANCELED if it was stopped while it was parked, with nothing pending. AVMM_SERVED:
 * the exit is served, and the vCPU has been asked to park or to end. */
static int avmm_spot_run(struct avmm_spot *s)
{
    gate_open();
    int answer = run_or_park(s);
    gate_pass();
    return answer;
}
