/* The gate: one vCPU's thread at a time asks for the GIL.
 *
 * A thread that finds the GIL taken sleeps until it is free. On a host with several guests in one
 * program most exits would find it taken, for the few microseconds that another exit takes, and
 * each sleep and wake-up costs more than the exit. So a vCPU's thread that comes back from its
 * guest first passes the gate, where it spins for that moment, and yields the core to whoever has
 * something to do. It opens the gate when it lets go of the GIL to run its guest, to wait for its
 * task, or to park.
 *
 * The gate is advice and no lock. After GATE_NS it counts as open again, and whoever has waited
 * that long goes on to the GIL, where the interpreter's own order decides. So a handler that
 * blocks, or a thread that does not come back, delays the others by no more than that, nothing can
 * hang here, and no vCPU starves.
 */

#define GATE_NS 60000           /* a dozen exits */
#define GATE_SPINS 200           /* how many times it looks before it yields the core */

static _Atomic int64_t gate;    /* until when somebody has passed it; 0: nobody has */
static _Thread_local int64_t passed;    /* what this thread has written there; 0: nothing */

static int try_gate(int64_t now)
{
    int64_t until = atomic_load_explicit(&gate, memory_order_relaxed);
    if (until > now || !atomic_compare_exchange_strong(&gate, &until, now + GATE_NS))
        return 0;
    passed = now + GATE_NS;
    return 1;
}

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The thread is about to ask for the GIL. */
static void gate_pass(void)
{
    int64_t now = now_ns(), end = now + GATE_NS;
    for (int spins = 0; !try_gate(now) && now < end; spins++, now = now_ns()) {
        if (spins < GATE_SPINS)
            relax();
        else
            sched_yield();
    }
}

/* The thread has let go of the GIL. */
static void gate_open(void)
{
    if (passed)
        atomic_compare_exchange_strong(&gate, &passed, 0);
    passed = 0;
}

/* In the child of a fork: whoever had passed is not there. */
static void gate_reset(void)
{
    passed = 0;
    atomic_store(&gate, 0);
}
