/* A random pause before each atomic operation, so that threads meet in all the orders that a
 * lost wake-up would need, which in the real thing are a few nanoseconds wide. Included before
 * the header under test. */

#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

static __thread uint32_t noise;

static uint32_t chance(void)
{
    noise = noise * 1664525 + 1013904223;
    return noise;
}

static void pause_perhaps(void)
{
    if (chance() >> 29)
        return;
    struct timespec t = { .tv_nsec = noise >> 20 & 0xff };
    nanosleep(&t, NULL);        /* some 60 us more, for the timer's slack */
}

#undef atomic_load
#undef atomic_store
#undef atomic_exchange
#undef atomic_compare_exchange_weak
#define atomic_load(p) (pause_perhaps(), atomic_load_explicit(p, memory_order_seq_cst))
#define atomic_store(p, v) (pause_perhaps(), atomic_store_explicit(p, v, memory_order_seq_cst))
#define atomic_exchange(p, v) \
    (pause_perhaps(), atomic_exchange_explicit(p, v, memory_order_seq_cst))
#define atomic_compare_exchange_weak(p, e, v) \
    (pause_perhaps(), atomic_compare_exchange_weak_explicit( \
        p, e, v, memory_order_seq_cst, memory_order_seq_cst))
