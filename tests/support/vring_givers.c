/* vring.h where chains are given back by several threads, in any order, while another takes them
 * and the log of dirty pages comes and goes: each must come back once, as it was, and no interrupt
 * be lost. Prints "ok", or what went wrong. The driver is written from VIRTIO 1.2, 2.7.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "chance.h"
#include "pages.h"
#include "vring.h"

enum { SIZE = 64, GIVERS = 3, SLOTS = 16 };
enum { DESC = 0, AVAIL = 0x1000, USED = 0x2000, DATA = 0x3000, RAM = 0x5000 };

static uint8_t ram[RAM] __attribute__((aligned(4096)));
static uint64_t dirty[1];
static int chains, interrupt;
static struct avmm_vring ring;
/* What each giver has in hand: 1 + head | length << 32, or 0. */
static uint64_t in_hand[GIVERS][SLOTS];
static int over;

static void die(const char *why)
{
    puts(why);
    fflush(stdout);
    _exit(1);
}

static uint16_t *at(int offset)
{
    return (uint16_t *)(ram + offset);
}

static uint32_t length_of(uint32_t number)
{
    return 1 + number % 4000;
}

static void *driver(void *unused)
{
    (void)unused;
    noise = 1;
    uint32_t lengths[SIZE] = { 0 };     /* of what the device has; 0: it has it not */
    uint16_t added = 0, seen = 0;
    int offered = 0;
    for (int done = 0; done < chains;) {
        for (uint16_t head = 0; head < SIZE && offered < chains; head++) {
            if (lengths[head])
                continue;
            uint8_t *descriptor = ram + DESC + 16 * head;
            uint64_t address = DATA;
            uint16_t flags = 2;         /* for the device to write: what the log is about */
            lengths[head] = length_of(offered++);
            memcpy(descriptor, &address, 8);
            memcpy(descriptor + 8, &lengths[head], 4);
            memcpy(descriptor + 12, &flags, 2);
            at(AVAIL)[2 + added++ % SIZE] = head;
        }
        __atomic_store_n(at(AVAIL + 2), added, __ATOMIC_RELEASE);
        uint16_t used;
        while ((used = __atomic_load_n(at(USED + 2), __ATOMIC_ACQUIRE)) == seen) {
            *(volatile uint16_t *)at(AVAIL + 4 + 2 * SIZE) = seen;
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            if (__atomic_load_n(at(USED + 2), __ATOMIC_ACQUIRE) != seen)
                continue;
            struct pollfd bell = { .fd = interrupt, .events = POLLIN };
            uint64_t value;
            if (poll(&bell, 1, 10000) != 1)
                die("an interrupt was lost");
            if (read(interrupt, &value, 8) != 8)
                die("no bell");
        }
        for (; seen != used; seen++, done++) {
            uint32_t element[2];
            memcpy(element, ram + USED + 4 + 8 * (seen % SIZE), 8);
            if (element[0] >= SIZE || !element[1] || lengths[element[0]] != element[1])
                die("a used element is not what was given");
            lengths[element[0]] = 0;
        }
    }
    __atomic_store_n(&over, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

/* Lets several chains gather and gives them back at once: then it meets the others at it. */
static void *giver(void *argument)
{
    uint64_t *mine = argument, one = 1;
    while (!__atomic_load_n(&over, __ATOMIC_SEQ_CST)) {
        for (int slot = 0; slot < SLOTS; slot++) {
            uint64_t chain = __atomic_exchange_n(&mine[slot], 0, __ATOMIC_SEQ_CST);
            if (!chain)
                continue;
            if (avmm_vring_push(&ring, (uint16_t)(chain - 1), chain >> 32, 0) < 0)
                die("a chain could not be given back");
            if (avmm_vring_wants_interrupt(&ring) && write(interrupt, &one, 8) != 8)
                die("no bell");
        }
        sched_yield();
    }
    return NULL;
}

static void hand_over(uint64_t chain)
{
    for (;;) {
        uint64_t none = 0, *slot = &in_hand[chance() % GIVERS][(chance() >> 8) % SLOTS];
        if (__atomic_compare_exchange_n(slot, &none, chain, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return;
        sched_yield();
    }
}

int main(int argc, char **argv)
{
    chains = argc > 1 ? atoi(argv[1]) : 1000;
    interrupt = eventfd(0, 0);
    noise = 9;
    static struct avmm_ram table = { .count = 1, .regions = { { .size = RAM, .host = ram } } };
    ring.ram = &table;
    ring.desc = DESC, ring.avail = AVAIL, ring.used = USED;
    ring.size = SIZE, ring.event_idx = 1;
    if (avmm_vring_check(&ring))
        die("the ring was refused");
    pthread_t threads[1 + GIVERS];
    pthread_create(&threads[0], NULL, driver, NULL);
    for (int i = 0; i < GIVERS; i++)
        pthread_create(&threads[1 + i], NULL, giver, in_hand[i]);
    for (int taken = 0; taken < chains;) {
        int found = avmm_vring_pop(&ring);
        if (found < 0)
            die("a chain was refused");
        __atomic_store_n(&table.dirty, chance() >> 31 ? dirty : NULL, __ATOMIC_SEQ_CST);
        if (!found) {
            sched_yield();
            continue;
        }
        uint64_t length = ring.parts[0].length, chain = 1 + ring.head + (length << 32);
        if (length != length_of(taken++) || ring.readable || ring.writable != 1)
            die("a chain is not what was offered");
        hand_over(chain);
    }
    for (int i = 0; i <= GIVERS; i++)
        pthread_join(threads[i], NULL);
    puts(dirty[0] ? "ok" : "nothing was logged");
    return 0;
}
