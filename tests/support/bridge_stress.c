/* The hand-over of bridge.h with a random pause before each of its atomic operations, so that
 * two threads meet in all the orders that a lost wake-up would need, which in the real thing
 * are a few nanoseconds wide. Prints "ok", or what went wrong. */

#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static __thread uint32_t noise;

static void pause_perhaps(void)
{
    noise = noise * 1664525 + 1013904223;
    if (noise >> 29)
        return;
    struct timespec t = { .tv_nsec = noise >> 20 & 0xff };
    nanosleep(&t, NULL);        /* some 60 us more, for the timer's slack */
}

#undef atomic_load
#undef atomic_store
#undef atomic_exchange
#define atomic_load(p) (pause_perhaps(), atomic_load_explicit(p, memory_order_seq_cst))
#define atomic_store(p, v) (pause_perhaps(), atomic_store_explicit(p, v, memory_order_seq_cst))
#define atomic_exchange(p, v) \
    (pause_perhaps(), atomic_exchange_explicit(p, v, memory_order_seq_cst))

#include "bridge.h"

static struct avmm_bridge bridge;
static int trips;
static volatile int turns;

static void die(const char *why)
{
    printf("%s after %d turns\n", why, turns);
    fflush(stdout);
    _exit(1);
}

static void take(int whose)
{
    if (turns++ % 2 != whose)
        die("a turn was taken twice");
}

static void *vcpu(void *unused)
{
    (void)unused;
    noise = 1;
    for (int i = 0; i < trips; i++) {
        take(0);
        avmm_bridge_call(&bridge);
    }
    avmm_bridge_leave(&bridge);
    return NULL;
}

static void wait_for_turn(int mine, int spin)
{
    struct pollfd bell = { .fd = bridge.bell, .events = POLLIN };
    while (!mine) {
        if (poll(&bell, 1, 10000) != 1)
            die("a wake-up was lost");
        mine = avmm_bridge_woken(&bridge) || avmm_bridge_poll(&bridge, spin);
    }
}

int main(int argc, char **argv)
{
    trips = argc > 1 ? atoi(argv[1]) : 1000;
    int spin = argc > 2 ? atoi(argv[2]) : 0;
    pthread_t thread;
    bridge.bell = eventfd(0, EFD_NONBLOCK);
    noise = 2;
    pthread_create(&thread, NULL, vcpu, NULL);
    int mine = avmm_bridge_poll(&bridge, spin);
    for (int i = 0; i < trips; i++) {
        wait_for_turn(mine, spin);
        take(1);
        mine = avmm_bridge_answer_and_poll(&bridge, spin);
    }
    wait_for_turn(mine, spin);
    pthread_join(thread, NULL);
    if (turns != 2 * trips)
        die("turns were lost");
    puts("ok");
    return 0;
}
