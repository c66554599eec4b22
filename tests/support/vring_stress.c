/* vring.h against a driver in another thread, both of which sleep whenever they may: a barrier
 * that is missing on either side shows as a wake-up that never comes. Prints "ok", or what went
 * wrong. The driver is written from VIRTIO 1.2, 2.7, and shares no code with vring.h.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "chance.h"
#include "pages.h"
#include "vring.h"

enum { SIZE = 4, DESC = 0, AVAIL = 0x1000, USED = 0x2000, RAM = 0x4000 };

static uint8_t ram[RAM] __attribute__((aligned(4096)));
static int chains, event_idx, kick, interrupt, kicks, interrupts;

/* So short that what the other side does falls between a store and the load after it, as long as
 * the store is only in this CPU's buffer: that is what the barriers are for. */
static void spin(void)
{
    for (uint32_t n = chance() >> 25; n; n--)
        __asm__ __volatile__("" ::: "memory");
}

static void die(const char *why)
{
    printf("%s (%d kicks, %d interrupts)\n", why, kicks, interrupts);
    fflush(stdout);
    _exit(1);
}

static void ring_bell(int fd, int *count)
{
    uint64_t one = 1;
    ++*count;
    if (write(fd, &one, 8) != 8)
        die("no bell");
}

static void sleep_until(int fd, const char *why)
{
    struct pollfd bell = { .fd = fd, .events = POLLIN };
    uint64_t value;
    if (poll(&bell, 1, 10000) != 1)
        die(why);
    if (read(fd, &value, 8) != 8)
        die("no bell");
}

static uint16_t *at(int offset)
{
    return (uint16_t *)(ram + offset);
}

static int wanted(uint16_t event, uint16_t now, uint16_t before)
{
    return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

static void *driver(void *unused)
{
    (void)unused;
    noise = 1;
    uint16_t added = 0, seen = 0;
    for (int done = 0; done < chains;) {
        uint16_t before = added;
        int batch = 1 + (chance() >> 30);
        for (; batch; batch--) {
            uint16_t flying = added - seen;
            if (flying == SIZE || done + flying >= chains)
                break;
            uint8_t *descriptor = ram + DESC + 16 * (added % SIZE);
            uint32_t length = 1 + added % 100;
            memcpy(descriptor + 8, &length, 4);
            at(AVAIL)[2 + added % SIZE] = added % SIZE;
            added++;
        }
        spin();
        __atomic_store_n(at(AVAIL + 2), added, __ATOMIC_RELEASE);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (added != before
            && (event_idx ? wanted(*(volatile uint16_t *)at(USED + 4 + 8 * SIZE), added, before)
                          : !(*(volatile uint16_t *)at(USED) & 1)))
            ring_bell(kick, &kicks);
        for (;;) {
            /* Who sleeps at once meets the other side only when that is long done. */
            uint16_t used = seen;
            for (uint32_t n = chance() >> 20; n && used == seen; n--)
                used = __atomic_load_n(at(USED + 2), __ATOMIC_ACQUIRE);
            if (used == seen) {
                spin();
                *(volatile uint16_t *)at(event_idx ? AVAIL + 4 + 2 * SIZE : AVAIL) =
                    event_idx ? seen : 0;
                __atomic_thread_fence(__ATOMIC_SEQ_CST);
                if (__atomic_load_n(at(USED + 2), __ATOMIC_ACQUIRE) != seen)
                    continue;
                sleep_until(interrupt, "an interrupt was lost");
                continue;
            }
            if (!event_idx)
                *(volatile uint16_t *)at(AVAIL) = 1;
            while (seen != used) {
                uint32_t element[2];
                memcpy(element, ram + USED + 4 + 8 * (seen % SIZE), 8);
                if (element[0] != seen % SIZE || element[1] != 1 + seen % 100u)
                    die("a used element is not what was given");
                seen++;
                done++;
            }
            break;
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    chains = argc > 1 ? atoi(argv[1]) : 1000;
    event_idx = argc > 2 ? atoi(argv[2]) : 1;
    kick = eventfd(0, 0);
    interrupt = eventfd(0, 0);
    noise = 2;
    struct avmm_ram table = { .count = 1, .regions = { { .size = RAM, .host = ram } } };
    static struct avmm_vring ring;
    ring.ram = &table;
    ring.desc = DESC, ring.avail = AVAIL, ring.used = USED;
    ring.size = SIZE, ring.event_idx = event_idx;
    if (avmm_vring_check(&ring))
        die("the ring was refused");
    pthread_t thread;
    pthread_create(&thread, NULL, driver, NULL);
    for (int done = 0; done < chains;) {
        int found = 0;
        for (uint32_t n = chance() >> 21; n && !found; n--)
            found = avmm_vring_pop(&ring);
        if (found < 0)
            die("a chain was refused");
        if (!found) {
            spin();
            if (!avmm_vring_listen(&ring, 1))
                sleep_until(kick, "a notification was lost");
            if (!event_idx)
                avmm_vring_listen(&ring, 0);
            continue;
        }
        spin();
        avmm_vring_push(&ring, ring.head, (uint32_t)ring.parts[0].length, 0);
        done++;
        if (avmm_vring_wants_interrupt(&ring))
            ring_bell(interrupt, &interrupts);
    }
    pthread_join(thread, NULL);
    if (avmm_vring_walk(&ring, 0) != 1)
        die("the ring is not what it was");
    puts("ok");
    return 0;
}
