/* irqfds, and the thread that waits for them and for the timers.
 *
 * An irqfd is read, and its interrupt delivered, in one go under the lock. So whoever wants to see
 * all that was written so far (the ioctls that read state) sweeps: it finds it in the eventfd and
 * delivers it itself, or finds it delivered. Nothing is ever in the thread's hands only.
 *
 * The eventfds are duplicated: what the user does with the numbers later does not matter, and an
 * irqfd that is not taken back lasts as long as the VM.
 *
 * The thread does not run timers. It tells vCPUs that theirs are due, and they run them when they
 * run (SOFT_CHIPS_TIMER). So no timer changes a machine that stands still while its state is
 * read. */

#define _GNU_SOURCE
#include "inside.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <unistd.h>
#include <linux/kcmp.h>

enum { BATCH = 32 };
#define STOP UINT64_MAX
#define TIMER (UINT64_MAX - 1)

/* Empty an eventfd, whether it is a blocking one or not. 0: it was empty. */
static int take(int fd)
{
    uint64_t count;
    struct iovec v = { &count, sizeof count };
    ssize_t n = preadv2(fd, &v, 1, -1, RWF_NOWAIT);
    if (n < 0 && (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL)) {
        struct pollfd p = { .fd = fd, .events = POLLIN };
        n = poll(&p, 1, 0) == 1 ? read(fd, &count, sizeof count) : -1;
    }
    return n == sizeof count;
}

static void ring(int fd)
{
    uint64_t one = 1;
    struct pollfd p = { .fd = fd, .events = POLLOUT };
    if (poll(&p, 1, 0) == 1) {          /* else it is full, and rings anyhow */
        ssize_t ignored = write(fd, &one, sizeof one);
        (void)ignored;
    }
}

static int is_eventfd(int fd)
{
    char path[40], target[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(path, target, sizeof target - 1);
    if (n < 0)
        return 1;                       /* no /proc to ask */
    target[n] = 0;
    return !strcmp(target, "anon_inode:[eventfd]");
}

static int is_same(const struct irqfd *f, int fd)
{
    long answer = syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, f->fd, fd);
    return answer < 0 ? f->number == fd : answer == 0;
}

/* ---- what comes, and what goes back ---- */

static void deliver(struct soft_chips *c, uint64_t id)
{
    struct irqfd *f = c->irqfds;
    while (f && f->id != id)
        f = f->next;
    if (!f || !take(f->fd))
        return;
    if (f->resample >= 0) {
        chips_gsi(c, f->gsi, BY_RESAMPLE, 1);
    } else {
        chips_gsi(c, f->gsi, BY_USER, 1);
        chips_gsi(c, f->gsi, BY_USER, 0);
    }
}

void chips_sweep(struct soft_chips *c)
{
    struct epoll_event events[BATCH];
    int n = c->irqfds ? epoll_wait(c->epoll, events, BATCH, 0) : 0;
    for (int i = 0; i < n; i++)
        if (events[i].data.u64 != STOP && events[i].data.u64 != TIMER)
            deliver(c, events[i].data.u64);
    if (n == BATCH)
        for (struct irqfd *f = c->irqfds; f; f = f->next)
            deliver(c, f->id);
}

/* The guest has ended the interrupt of a pin: lines that are held for it fall, and those who hold
 * them are asked whether they want them up again. */
void chips_acked(struct soft_chips *c, uint32_t chip, uint32_t pin)
{
    int gsi = -1;
    for (struct irqfd *f = c->irqfds; f; f = f->next) {
        if (f->resample < 0)
            continue;
        if (gsi < 0 && (gsi = chips_gsi_of(c, chip, pin)) < 0)
            return;
        if (f->gsi == (uint32_t)gsi) {
            chips_gsi(c, gsi, BY_RESAMPLE, 0);
            ring(f->resample);
            if (c->host.rang)
                c->host.rang(c->host.owner);
        }
    }
}

/* ---- the ioctl ---- */

static int watch(struct soft_chips *c, int fd, uint64_t id)
{
    struct epoll_event e = { .events = EPOLLIN, .data.u64 = id };
    return epoll_ctl(c->epoll, EPOLL_CTL_ADD, fd, &e) ? -errno : 0;
}

static int prepare(struct soft_chips *c)
{
    if (c->epoll < 0 && (c->epoll = epoll_create1(EPOLL_CLOEXEC)) < 0)
        return -errno;
    return 0;
}

static void forget(struct irqfd *f)
{
    if (f->fd >= 0)
        close(f->fd);
    if (f->resample >= 0)
        close(f->resample);
    free(f);
}

static int assign(struct soft_chips *c, const struct kvm_irqfd *args)
{
    int resamples = args->flags & KVM_IRQFD_FLAG_RESAMPLE, fd = args->fd;
    if (args->gsi >= GSIS)
        return -EINVAL;
    if (fcntl(fd, F_GETFD) < 0 || (resamples && fcntl(args->resamplefd, F_GETFD) < 0))
        return -EBADF;
    if (!is_eventfd(fd) || (resamples && !is_eventfd(args->resamplefd)))
        return -EINVAL;
    for (struct irqfd *f = c->irqfds; f; f = f->next)
        if (is_same(f, fd))
            return -EBUSY;
    struct irqfd *f = calloc(1, sizeof *f);
    if (!f)
        return -ENOMEM;
    f->number = fd;
    f->gsi = args->gsi;
    f->id = c->next_id++;
    f->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    f->resample = resamples ? fcntl(args->resamplefd, F_DUPFD_CLOEXEC, 3) : -1;
    int answer = f->fd < 0 || (resamples && f->resample < 0) ? -EMFILE : prepare(c);
    if (!answer)
        answer = watch(c, f->fd, f->id);
    if (!answer && (answer = chips_thread_start(c)))
        epoll_ctl(c->epoll, EPOLL_CTL_DEL, f->fd, NULL);
    if (answer) {
        forget(f);
        return answer;
    }
    f->next = c->irqfds;
    c->irqfds = f;
    return 0;
}

/* What was written before is delivered before this returns; what is written later is not. */
static int deassign(struct soft_chips *c, const struct kvm_irqfd *args)
{
    if (fcntl(args->fd, F_GETFD) < 0)
        return -EBADF;
    for (struct irqfd **at = &c->irqfds; *at;) {
        struct irqfd *f = *at;
        if (f->gsi != args->gsi || !is_same(f, args->fd)) {
            at = &f->next;
            continue;
        }
        deliver(c, f->id);
        epoll_ctl(c->epoll, EPOLL_CTL_DEL, f->fd, NULL);
        *at = f->next;
        int last = f->resample >= 0;
        for (struct irqfd *o = c->irqfds; o; o = o->next)
            last &= o->resample < 0 || o->gsi != f->gsi;
        if (last)
            chips_gsi(c, f->gsi, BY_RESAMPLE, 0);
        forget(f);
    }
    return 0;
}

int chips_irqfd(struct soft_chips *c, const struct kvm_irqfd *args)
{
    if (args->flags & ~(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE))
        return -EINVAL;
    return args->flags & KVM_IRQFD_FLAG_DEASSIGN ? deassign(c, args) : assign(c, args);
}

/* ---- the thread ---- */

static void timers_due(struct soft_chips *c)
{
    int64_t now = chips_now(c).ns;
    int pit = c->pit.exists && c->pit.next <= now;
    take(c->timer);
    c->armed = NEVER;
    c->told = now;
    for (int i = 0; i < c->count; i++)
        if (c->cpus[i].exists && (pit || c->cpus[i].lapic.target <= now))
            c->cpus[i].timer_due = 1;
    c->dirty = 1;
}

static void *run(void *argument)
{
    struct soft_chips *c = argument;
    struct epoll_event events[BATCH];
    for (;;) {
        int n = epoll_wait(c->epoll, events, BATCH, -1), stops = 0;
        chips_lock(c);
        for (int i = 0; i < n; i++)
            if (events[i].data.u64 == STOP)
                stops = 1;
            else if (events[i].data.u64 == TIMER)
                timers_due(c);
            else
                deliver(c, events[i].data.u64);
        chips_unlock(c);
        if (stops)
            return NULL;
    }
}

/* With every signal blocked: they are for the threads of the program. */
int chips_thread_start(struct soft_chips *c)
{
    sigset_t all, before;
    if (c->threaded || c->host.threadless)
        return 0;
    int answer = prepare(c);
    if (answer)
        return answer;
    c->stop = eventfd(0, EFD_CLOEXEC);
    c->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (c->stop < 0 || c->timer < 0 || watch(c, c->stop, STOP) || watch(c, c->timer, TIMER)) {
        answer = -EMFILE;
    } else {
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        answer = -pthread_create(&c->thread, NULL, run, c);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (answer) {
        close(c->stop);
        close(c->timer);
        c->stop = c->timer = -1;
        return answer;
    }
    c->threaded = 1;
    return 0;
}

/* The timer may fire earlier than needed, never later. What vCPUs were told of is theirs. */
void chips_thread_arm(struct soft_chips *c)
{
    if (!c->threaded || !c->host.runs_timers)
        return;
    int64_t next = c->pit.exists && c->pit.next > c->told ? c->pit.next : NEVER;
    for (int i = 0; i < c->count; i++) {
        int64_t target = c->cpus[i].lapic.target;
        if (c->cpus[i].exists && target > c->told && target < next)
            next = target;
    }
    if (next >= c->armed)
        return;
    c->armed = next;
    struct itimerspec t = { .it_value = { next / 1000000000, next % 1000000000 } };
    if (next <= 0)
        t.it_value.tv_nsec = 1;
    timerfd_settime(c->timer, TFD_TIMER_ABSTIME, &t, NULL);
}

void soft_chips_let_go(struct soft_chips *c)
{
    if (c->threaded) {
        close(c->stop);
        close(c->timer);
    }
    for (struct irqfd *f = c->irqfds; f; f = f->next) {
        close(f->fd);
        if (f->resample >= 0)
            close(f->resample);
    }
    if (c->epoll >= 0)
        close(c->epoll);
}

void chips_thread_end(struct soft_chips *c)
{
    if (c->threaded) {
        ring(c->stop);
        pthread_join(c->thread, NULL);
        close(c->stop);
        close(c->timer);
    }
    while (c->irqfds) {
        struct irqfd *f = c->irqfds;
        c->irqfds = f->next;
        forget(f);
    }
    if (c->epoll >= 0)
        close(c->epoll);
}
