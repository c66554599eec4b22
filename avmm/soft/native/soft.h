/* The software engine's border: KVM's own ABI, without KVM.
 *
 * All of avmm above avmm/kvm speaks KVM's ioctls and structures. So the engine speaks them too, and
 * nothing above has to ask which engine it runs on. The descriptors are real ones (memfds), so that
 * a number names one thing in the process, and so that a vCPU's struct kvm_run is mapped by mmap as
 * it is with KVM. Only these functions know what is behind them.
 *
 * soft_load must have succeeded before anything else is called. */

#ifndef AVMM_SOFT_H
#define AVMM_SOFT_H

#include <stddef.h>
#include <stdint.h>

/* Load the library (the path of libunicorn.so.2) and check that it is the one that this engine
 * knows. Returns 0, or -1 with the reason in `why`. Idempotent; thread-safe. */
int soft_load(const char *library, char *why, size_t size);

/* What open("/dev/kvm"), ioctl and close are to KVM. soft_open returns a descriptor, or -errno;
 * soft_ioctl returns ioctl's answer, or -errno. */
int soft_open(void);
int soft_ioctl(int fd, unsigned long request, void *argument);
int soft_close(int fd);

/* Is this descriptor one of the engine's? */
int soft_is(int fd);

/* For the C handler of the kick's signal: the KVM_RUN that this thread is in, or enters next,
 * returns -EINTR. Async-signal-safe. */
void soft_kicked(void);

/* The host or a device has stored to guest memory by its own pointer: code that the guest runs from
 * there is translated anew, before the guest runs any more. `vm` is a VM's descriptor. Any thread;
 * it does not wait. */
void soft_wrote(int vm, const void *host, uint64_t length);

/* Make the runs of this system's VMs deterministic (order.c). 0 or -errno. */
int soft_seed(int system, uint64_t seed);
/* Such a guest's time in nanoseconds, and its wall clock when that is 0, in ns since 1970. */
int64_t soft_now(int vm);
int64_t soft_epoch(void);
/* The host has settled, and wants to be asked again at `host_deadline` (INT64_MAX: never). `idle`:
 * does the guest wait for the host alone? */
void soft_settled(int vm, int64_t host_deadline, int *idle);
/* This vCPU has left with an exit, and serving it has given the host nothing to do: it need not
 * settle. Called by the vCPU's thread before KVM_RUN. */
void soft_unchanged(int vcpu);
/* A digest of all that has happened so far, and of how many records it is made. */
uint64_t soft_trail(int vm, uint64_t *records);
/* Write each record (order.h) to this descriptor from now on; -1: no longer. 0 or -errno. */
int soft_log(int vm, int log);

/* For tests: which cures of the library's traps are taken away (engine.h). */
void soft_take_away(unsigned cures);

#endif
