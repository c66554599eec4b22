/* What the CPUs need of the interrupt chips, and the hypercalls. */

#ifndef AVMM_SOFT_CHIPS_GLUE_H
#define AVMM_SOFT_CHIPS_GLUE_H

#include "chips.h"
#include "engine.h"

/* An access to a chip's registers. Returns 0 if no chip is there. */
int soft_glue_access(struct vcpu *v, int port, int write, uint64_t at, uint32_t size,
                      uint64_t *value);
int soft_glue_due(struct vcpu *v);      /* is an interrupt due, if the vCPU takes interrupts? */
void soft_glue_timers(struct vcpu *v, int at_entry);    /* run what is due */
int64_t soft_glue_deadline(struct vm *vm);      /* when the next timer is due */
void soft_glue_run_timers(struct vm *vm);
void soft_glue_sweep(struct vm *vm);    /* look for irqfds that were written */
void soft_order_clock(void *owner, struct soft_chips_time *now);       /* order.c */
int64_t soft_order_wall(void *owner);
int soft_glue_take(struct vcpu *v);    /* its vector, or -1 */
int soft_glue_startup_due(struct vcpu *v);
void soft_glue_startup(struct vcpu *v); /* INIT and SIPI that have come */
int soft_glue_take_nmi(struct vcpu *v);
int soft_glue_has_nmi(struct vcpu *v);
int soft_glue_nmis(struct vcpu *v);     /* how many wait */
void soft_glue_set_nmis(struct vcpu *v, int count);
uint8_t soft_glue_sipi_vector(struct vcpu *v);
void soft_glue_set_sipi_vector(struct vcpu *v, uint8_t vector);
uint64_t soft_glue_base(struct vcpu *v);
int soft_glue_new(struct vm *vm);
int soft_glue_base_set(struct vcpu *v, uint64_t value, int host);
int soft_glue_msr_get(struct vcpu *v, uint32_t index, uint64_t *value, int host);
int soft_glue_msr_set(struct vcpu *v, uint32_t index, uint64_t value, int host);
uint32_t soft_glue_msrs(uint32_t *indices, uint32_t room);
uint32_t soft_glue_cpuid_features(void);       /* KVM's CPUID leaf 0x40000001, EAX */
void soft_glue_tsc_changed(struct vcpu *v);
int soft_glue_check_extension(long capability);        /* or -ENOTTY */
int soft_glue_vm_ioctl(struct vm *vm, unsigned long request, void *argument);  /* or -ENOTTY */
int soft_glue_vcpu_ioctl(struct vcpu *v, unsigned long request, void *argument);
int soft_glue_vcpu_new(struct vcpu *v);
void soft_glue_free(struct vm *vm);
void soft_glue_let_go(struct vm *vm);

int soft_hypercall(struct vcpu *v);     /* returns 0 if the instruction is none */
void soft_hypercall_answered(struct vcpu *v);

#endif
