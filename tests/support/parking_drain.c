/* parking.h's way of a vCPU that was asked to park, as a library for one vCPU in one thread: what
 * KVM_RUN answers is the caller's, and whoever stands in the lot is stopped there. */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bridge.h"

static int (*answer)(void);     /* the exit reason, or -errno */
static long stand_still(void);

static int fake_run(int fd, unsigned long request, void *unused)
{
    (void)fd, (void)request, (void)unused;
    int status = answer();
    return status < 0 ? status : 0;
}

static int send_kick(int pid, int tid)
{
    (void)pid, (void)tid;
    return 0;
}

#define avmm_ioctl fake_run
#define syscall(...) stand_still()      /* futexes */
#include "parking.h"

static struct avmm_lot lot;
static struct avmm_spot spot;

static long stand_still(void)
{
    atomic_store(&spot.stopping, 1);
    atomic_store(&spot.stands, 0);
    return 0;
}

/* A vCPU with this kvm_run, which is asked to park. */
void begin(struct kvm_run *run, int (*kvm_run)(void), int always)
{
    memset(&lot, 0, sizeof lot);
    memset(&spot, 0, sizeof spot);
    answer = kvm_run;
    spot.run = run;
    lot.count = 1;
    lot.spots = &spot;
    lot.always = always;
    avmm_lot_init(&lot);
    atomic_store(&lot.missing, (uint64_t)1 << 32 | 1);
    atomic_store(&lot.round, 1);
}

int spot_run(void)
{
    return avmm_spot_run(&spot);
}
