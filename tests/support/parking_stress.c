/* The parking lot of parking.h, with chance.h and a KVM_RUN that is made of ppoll(). Prints
 * "ok", or what went wrong. */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "chance.h"
#include "bridge.h"

enum { VCPUS = 3 };

static struct kvm_run pages[VCPUS];
static int pending[VCPUS];              /* exits that are not completed */
static _Atomic int in_guest[VCPUS];
static _Atomic int still;               /* the asker looks: nobody may run or be unfinished */
static volatile int rounds_done;
static int always;                      /* as the lot's: even INTR may leave something pending */

static void die(const char *why)
{
    printf("%s in round %d\n", why, rounds_done);
    fflush(stdout);
    _exit(1);
}

static int send_kick(int pid, int tid)
{
    return syscall(SYS_tgkill, pid, tid, SIGUSR1) < 0 ? -errno : 0;
}

#define KVM_RUN_NEEDS_COMPLETION (1 << 15)      /* parking.h has the same */

/* As the kernel: finish what is pending, sample immediate_exit once, then run until a signal
 * comes, which is delivered on the way out. */
static int fake_run(int fd, unsigned long request, void *unused)
{
    (void)request, (void)unused;
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    if (atomic_load(&still))
        die("a vCPU runs");
    int answer = -1;
    pages[fd].flags = 0;
    pause_perhaps();
    if (pending[fd] && --pending[fd]) {
        answer = 0;
    } else {
        int wanted = *(volatile __u8 *)&pages[fd].immediate_exit;
        pause_perhaps();
        if (wanted) {
            errno = EINTR;
        } else {
            atomic_store(&in_guest[fd], 1);
            struct timespec soon = { .tv_nsec = chance() >> 12 & 0xfffff };
            int interrupted = ppoll(NULL, 0, chance() >> 30 ? NULL : &soon, &old) < 0;
            atomic_store(&in_guest[fd], 0);
            if (interrupted) {
                /* Alone, and with the flag clear, this reason says that nothing is pending. */
                int flagged = !(chance() >> 30), unsaid = !(chance() >> 30);
                if (flagged)
                    pages[fd].flags = KVM_RUN_NEEDS_COMPLETION;
                if (!unsaid)
                    pages[fd].exit_reason = KVM_EXIT_INTR;
                if (flagged || unsaid || always)
                    pending[fd] = 1;
                errno = EINTR;
            } else {
                pending[fd] = 1 + (chance() >> 30);
                answer = 0;
            }
        }
    }
    if (answer == 0)
        pages[fd].exit_reason = KVM_EXIT_IO;
    int error = errno;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return answer < 0 ? -error : answer;
}

#define avmm_ioctl fake_run
#include "parking.h"
#undef avmm_ioctl

static void *vcpu(void *argument)
{
    struct avmm_spot *s = argument;
    noise = s->fd + rounds_done;
    avmm_spot_enter(s);
    for (;;) {
        int status = avmm_spot_run(s);
        if (status < 0 && status != -EINTR && status != -ECANCELED)
            die("KVM_RUN failed");
        set_immediate_exit(s->run, 0);
        if (is_wanted(s)) {             /* completion.py's drain() */
            do
                set_immediate_exit(s->run, 1);
            while (fake_run(s->fd, KVM_RUN, 0) == 0);
            set_immediate_exit(s->run, 0);
            avmm_spot_park(s);
        }
        if (atomic_load(&s->stopping))
            break;
    }
    avmm_spot_leave(s);
    return NULL;
}

static void kicked(int signal)
{
    (void)signal;
}

static void wait_for_all(struct avmm_lot *lot)
{
    struct pollfd bell = { .fd = lot->bell, .events = POLLIN };
    int parked = avmm_lot_poll(lot, chance() >> 31);
    while (!parked) {
        int rang = poll(&bell, 1, 3000);
        avmm_lot_woken(lot);
        if (rang != 1)
            die("a vCPU did not park");
        parked = avmm_lot_poll(lot, 0);
    }
    atomic_store(&still, 1);
    for (int i = 0; i < lot->count; i++) {
        if (!avmm_spot_is_parked(&lot->spots[i]))
            die("a vCPU is counted that has not parked");
        if (atomic_load(&in_guest[i]))
            die("a vCPU is in the guest");
        if (pending[i] && !lot->spots[i].stopping)
            die("a vCPU is not drained");
    }
    pause_perhaps();
    atomic_store(&still, 0);
}

/* A machine's life: paused so often, then stopped. */
static void live(int rounds)
{
    struct avmm_spot spots[VCPUS];
    struct avmm_lot lot = { .bell = eventfd(0, EFD_NONBLOCK), .count = VCPUS, .spots = spots };
    memset(spots, 0, sizeof spots);
    memset(pages, 0, sizeof pages);
    memset(pending, 0, sizeof pending);
    always = lot.always = !(chance() >> 30);
    avmm_lot_init(&lot);
    pthread_t threads[VCPUS];
    for (int i = 0; i < VCPUS; i++) {
        spots[i].fd = i;
        spots[i].run = &pages[i];
        pthread_create(&threads[i], NULL, vcpu, &spots[i]);
    }
    for (int left = rounds; left; left--, rounds_done++) {
        if (avmm_lot_ask(&lot))
            die("a kick failed");
        if (left == 2)
            avmm_spot_stop(&spots[0]);  /* parked already, or not */
        if (left <= 2 || chance() >> 30)        /* else the pause is given up, wherever it is */
            wait_for_all(&lot);
        else
            pause_perhaps();
        if (left == 1)
            for (int i = 0; i < VCPUS; i++)
                avmm_spot_stop(&spots[i]);
        else
            avmm_lot_release(&lot);
        pause_perhaps();
    }
    for (int i = 0; i < VCPUS; i++)
        pthread_join(threads[i], NULL);
    close(lot.bell);
}

int main(int argc, char **argv)
{
    int lives = argc > 1 ? atoi(argv[1]) : 10;
    int rounds = argc > 2 ? atoi(argv[2]) : 100;
    struct sigaction action = { .sa_handler = kicked };
    sigaction(SIGUSR1, &action, NULL);
    noise = 99;
    for (int i = 0; i < lives; i++)
        live(rounds);
    puts("ok");
    return 0;
}
