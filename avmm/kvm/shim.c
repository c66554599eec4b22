/* The C that cffi compiles into avmm.kvm._kvm: ioctls, the kick, the bridge, the parking
 * lot. */

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bridge.h"
#include "newer.h"

/* Names for the nameless parts of the kernel's structures, for cdef.h. */
#define PART(structure, part) __typeof__(((struct structure *)0)->part)
typedef PART(kvm_run, hw) avmm_exit_hw;
typedef PART(kvm_run, fail_entry) avmm_exit_fail_entry;
typedef PART(kvm_run, ex) avmm_exit_ex;
typedef PART(kvm_run, io) avmm_exit_io;
typedef PART(kvm_run, mmio) avmm_exit_mmio;
typedef PART(kvm_run, internal) avmm_exit_internal;
typedef PART(kvm_run, emulation_failure) avmm_exit_emulation;
typedef PART(kvm_run, system_event) avmm_exit_system_event;
typedef PART(kvm_run, msr) avmm_exit_msr;
typedef PART(kvm_run, hypercall) avmm_exit_hypercall;
typedef PART(kvm_run, osi) avmm_exit_osi;
typedef PART(kvm_run, papr_hcall) avmm_exit_papr_hcall;
typedef PART(kvm_run, epr) avmm_exit_epr;
typedef PART(kvm_xen_exit, u) avmm_xen_union;
typedef PART(kvm_xen_exit, u.hcall) avmm_xen_hcall;
typedef PART(kvm_irq_routing_entry, u) avmm_irq_target;

/* ---- the other engine ----
 *
 * Another engine than Linux's KVM (avmm/soft) answers the same requests, for descriptors of its
 * own. Its functions are set once, before it opens the first of them, and stay. */

struct engine {
    int (*is)(int fd);
    int (*call)(int fd, unsigned long request, void *argument);
    int (*close)(int fd);
    void (*kicked)(void); /* in a signal's handler */
};
static struct engine other;

static void avmm_engine_set(uint64_t is, uint64_t call, uint64_t close_, uint64_t kicked)
{
    other.call = (int (*)(int, unsigned long, void *))call;
    other.close = (int (*)(int))close_;
    other.kicked = (void (*)(void))kicked;
    other.is = (int (*)(int))is;
}

static inline int is_others(int fd)
{
    return other.is && other.is(fd);
}

/* ---- ioctls: the answer, or -errno ---- */

static int avmm_ioctl(int fd, unsigned long request, void *argument)
{
    if (is_others(fd))
        return other.call(fd, request, argument);
    int answer = ioctl(fd, request, argument);
    return answer < 0 ? -errno : answer;
}

static int avmm_ioctl_value(int fd, unsigned long request, unsigned long argument)
{
    return avmm_ioctl(fd, request, (void *)argument);
}

static int avmm_close(int fd)
{
    if (is_others(fd))
        return other.close(fd);
    return close(fd) < 0 ? -errno : 0;
}

/* Map a vCPU's kvm_run, or new memory if `fd` is -1. Returns where it is, or -errno. */
static int64_t avmm_map(int fd, size_t size)
{
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    return address == MAP_FAILED ? -errno : (int64_t)(uintptr_t)address;
}

static void avmm_unmap(struct kvm_run *run, size_t size)
{
    munmap(run, size);
}

/* The exit reason, or -errno. */
static int avmm_run(int fd, struct kvm_run *run)
{
    int had_passed = passed != 0;
    gate_open();
    int answer = avmm_ioctl(fd, KVM_RUN, NULL);
    if (had_passed)
        gate_pass();
    return answer < 0 ? answer : (int)run->exit_reason;
}

/* The baseline of `avmm bench exits`: nothing but KVM_RUN. Reads are answered with zeros,
 * writes are dropped, serial output is kept, and a write to the exit-status port ends it.
 * Returns the number of bytes of output, or -1 on any other exit. */
static int avmm_run_raw(int fd, struct kvm_run *run, char *output, int size)
{
    enum { SERIAL = 0x3f8, SERIAL_LSR = 0x3fd, LSR_IDLE = 0x60, EXIT_STATUS = 0xf8 };
    int length = 0;
    for (;;) {
        if (avmm_ioctl(fd, KVM_RUN, NULL) < 0)
            return -1;
        if (run->exit_reason == KVM_EXIT_MMIO) {
            if (!run->mmio.is_write)
                memset(run->mmio.data, 0, sizeof run->mmio.data);
            continue;
        }
        if (run->exit_reason != KVM_EXIT_IO)
            return -1;
        char *data = (char *)run + run->io.data_offset;
        if (run->io.direction == KVM_EXIT_IO_IN)
            memset(data, run->io.port == SERIAL_LSR ? LSR_IDLE : 0, run->io.size * run->io.count);
        else if (run->io.port == SERIAL && length < size)
            output[length++] = *data;
        else if (run->io.port == EXIT_STATUS)
            return length;
    }
}

/* Copy the oldest coalesced write. Returns 0 if there is none. */
static int avmm_ring_peek(struct kvm_coalesced_mmio_ring *ring, struct kvm_coalesced_mmio *write)
{
    unsigned first = ring->first;
    if (first == __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE))
        return 0;
    *write = ring->coalesced_mmio[first];
    return 1;
}

/* Give its place back to KVM. */
static void avmm_ring_drop(struct kvm_coalesced_mmio_ring *ring)
{
    unsigned places = (sysconf(_SC_PAGESIZE) - sizeof *ring) / sizeof ring->coalesced_mmio[0];
    __atomic_store_n(&ring->first, (ring->first + 1) % places, __ATOMIC_RELEASE);
}

/* ---- the kick ----
 *
 * A signal makes KVM_RUN return only if it is delivered. So there must be a handler. It tells the
 * other engine, if there is one. It is written in C, because Python's handlers run only in the main
 * thread, and it must not restart the call. Not a real-time signal: those are queued, and if their
 * user's queue is full, sending one fails. Nothing sends the first choice, and Linux uses it for
 * nothing else. The others are used only if nobody in this process handles them.
 */

static int kick_signal;

static void kicked(int signal)
{
    (void)signal;
    if (other.kicked)
        other.kicked();
}

/* Once per process. Returns the signal's number, or -1 if none is free. */
static int avmm_kick_install(void)
{
    if (kick_signal)
        return kick_signal;
    static const int candidates[] = { SIGSTKFLT, SIGPWR, SIGUSR2, SIGUSR1 };
    for (size_t i = 0; i < sizeof candidates / sizeof *candidates; i++) {
        int number = candidates[i];
        struct sigaction old, new = { .sa_handler = kicked };
        sigemptyset(&new.sa_mask);
        if (sigaction(number, NULL, &old) || old.sa_handler != SIG_DFL)
            continue;
        if (!sigaction(number, &new, NULL)) {
            pthread_atfork(NULL, NULL, gate_reset);
            return kick_signal = number;
        }
    }
    return -1;
}

/* A thread inherits its creator's signal mask, so unblock the kick in this one. */
static int avmm_kick_accept(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, kick_signal);
    return -pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

static int send_kick(int pid, int tid)
{
    return syscall(SYS_tgkill, pid, tid, kick_signal) < 0 ? -errno : 0;
}

static int avmm_kick(int tid)
{
    return send_kick(getpid(), tid);
}

#include "parking.h"

/* The baseline of `avmm bench pause`: a vCPU in a C thread is kicked, and that is all. `times`
 * gets, for each of `rounds` kicks, the ns from the request (the flag and the signal) to the
 * return of KVM_RUN. Returns 0, or -errno if KVM_RUN fails in another way. */

struct raw_kick {
    int fd;
    struct kvm_run *run;
    _Atomic int tid, entered, returned, go_on, error;
};

static void *raw_kick_thread(void *argument)
{
    struct raw_kick *k = argument;
    avmm_kick_accept();
    atomic_store(&k->tid, (int)syscall(SYS_gettid));
    for (int round = 1;; round++) {
        atomic_store(&k->entered, round);
        int answer = avmm_ioctl(k->fd, KVM_RUN, NULL);
        if (answer != -EINTR) {
            atomic_store(&k->error, answer < 0 ? -answer : EIO);
            atomic_store(&k->returned, round);
            return NULL;
        }
        k->run->immediate_exit = 0;
        atomic_store(&k->returned, round);
        int go;
        while ((go = atomic_load(&k->go_on)) == round - 1)
            sched_yield();
        if (go < 0)
            return NULL;
    }
}

static int avmm_kick_raw(int fd, struct kvm_run *run, int rounds, int64_t *times)
{
    struct raw_kick k = { .fd = fd, .run = run };
    pthread_t thread;
    int error = pthread_create(&thread, NULL, raw_kick_thread, &k);
    if (error)
        return -error;
    for (int round = 1; round <= rounds && !atomic_load(&k.error); round++) {
        while (atomic_load(&k.entered) != round)
            sched_yield();
        struct timespec into_the_guest = { .tv_nsec = 200000 };
        nanosleep(&into_the_guest, NULL);
        int64_t start = now_ns();
        run->immediate_exit = 1;
        avmm_kick(atomic_load(&k.tid));
        while (atomic_load(&k.returned) != round)
            sched_yield();
        times[round - 1] = now_ns() - start;
        atomic_store(&k.go_on, round == rounds ? -1 : round);
    }
    pthread_join(thread, NULL);
    return -atomic_load(&k.error);
}
