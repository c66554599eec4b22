/* The turn: one holder at a time, in the order of asking.
 *
 * A vCPU that waits lets the holder run for a slice, and then asks it to give up the turn at the
 * next block. Whoever is not a vCPU (an ioctl that reads or changes state) asks at once. */

#include "engine.h"

#include <time.h>

int64_t soft_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static __thread struct vm *ours;

int soft_turn_is_ours(struct vm *vm)
{
    return ours == vm;
}

void soft_turn_take(struct vm *vm, int at_once)
{
    pthread_mutex_lock(&vm->lock);
    uint64_t ticket = vm->next_ticket++;
    atomic_fetch_add(&vm->waiting, 1);
    while (vm->serving != ticket) {
        int64_t until = vm->since + SLICE_NS;
        if (at_once || soft_now_ns() >= until) {
            atomic_store(&vm->preempt, 1);
            soft_attend(vm);
            until = soft_now_ns() + SLICE_NS;
        }
        struct timespec t = { until / 1000000000, until % 1000000000 };
        pthread_cond_timedwait(&vm->changed, &vm->lock, &t);
    }
    atomic_fetch_sub(&vm->waiting, 1);
    atomic_store(&vm->preempt, 0);
    vm->since = soft_now_ns();
    ours = vm;
    pthread_mutex_unlock(&vm->lock);
}

void soft_turn_give(struct vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    ours = NULL;
    vm->serving++;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}
