/* The hand-over of bridge.h, with chance.h. Prints "ok", or what went wrong. */

#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "chance.h"

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
        avmm_bridge_call(&bridge, 0);
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
