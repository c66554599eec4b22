/* The order of a deterministic run: see order.c. */

#ifndef AVMM_SOFT_ORDER_H
#define AVMM_SOFT_ORDER_H

#include <stdint.h>

struct vcpu;
struct vm;

enum { BLOCK_NS = 4, ORDER_TSC_KHZ = 1000000, TLB_DATES = 3 };    /* a TLB for each mode */
#define ORDER_NEVER INT64_MAX

/* All of it belongs to whoever has the turn. */
struct order {
    int on;
    uint64_t choices, entropy;  /* the states of the two generators */
    int64_t ns;                 /* the guest's time: what it has executed, and what was skipped */
    int64_t look;               /* something is due then: the next block does not begin */
    int64_t slice_end, period_end, host_deadline;
    struct vcpu *current;       /* the one vCPU that may run; NULL: none was chosen yet */
    enum { NO_TAIL, TAIL_ARMED, TAIL_RAN } tail;   /* the last instructions of the slice */
    int inside;                 /* how many vCPUs are in KVM_RUN */
    int settled;                /* the host has nothing left to do */
    int idle;                   /* no vCPU can run, nothing is due, and the host knows it */
    int64_t *dates[TLB_DATES];  /* when the library last looked at its TLB's size: see order.c */
    int date_count;
    int log;                    /* a descriptor that gets the records; -1: none */
    uint64_t records, digest;
};

/* What one vCPU that is in KVM_RUN is to do now. */
enum step { STEP_RUN, STEP_WAIT, STEP_WAIT_FOR_HOST, STEP_SETTLE };

/* What happens in a run, in the order in which it happens. */
enum record_kind { RECORD_EXIT = 1, RECORD_DOORBELL, RECORD_SLICE, RECORD_INTERRUPT, RECORD_SKIP };
struct record {
    int64_t ns;
    uint32_t kind, cpu;
    uint64_t what, at, value;
};

int soft_order_seed(struct vm *vm, uint64_t seed);
void soft_order_enter(struct vcpu *v);
void soft_order_leave(struct vcpu *v);
enum step soft_order_step(struct vcpu *v);
int soft_order_stops(struct vcpu *v);
int soft_order_tail(struct vcpu *v);
void soft_order_outside(struct vm *vm);
void soft_order_pin_tlb(struct vm *vm);
uint64_t soft_order_entropy(struct vm *vm);
void soft_order_record(struct vcpu *v, enum record_kind kind, uint64_t what, uint64_t at,
                       uint64_t value);

#endif
