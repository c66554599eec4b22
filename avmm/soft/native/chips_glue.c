/* Between the CPUs and the interrupt chips. */

#include "chips_glue.h"

#include <errno.h>

int soft_chips_access(struct vcpu *v, int port, int write, uint64_t at, uint32_t size,
                      uint64_t *value)
{
    return 0;
}
int soft_chips_due(struct vcpu *v) { return 0; }
int soft_chips_take(struct vcpu *v) { return -1; }
void soft_chips_startup(struct vcpu *v) { }
int soft_chips_base_set(struct vcpu *v, uint64_t value, int host) { v->apic_base = value; return 0; }
int soft_chips_msr_get(struct vcpu *v, uint32_t index, uint64_t *value) { return -EINVAL; }
int soft_chips_msr_set(struct vcpu *v, uint32_t index, uint64_t value, int host) { return -EINVAL; }
uint32_t soft_chips_msrs(uint32_t *indices, uint32_t room) { return 0; }
uint32_t soft_chips_cpuid_features(void) { return 0; }
void soft_chips_tsc_changed(struct vcpu *v) { }
int soft_chips_vm_ioctl(struct vm *vm, unsigned long request, void *argument) { return -ENOTTY; }
int soft_chips_vcpu_ioctl(struct vcpu *v, unsigned long request, void *argument) { return -ENOTTY; }
int soft_chips_vcpu_new(struct vcpu *v) { return 0; }
void soft_chips_vcpu_free(struct vcpu *v) { }
void soft_chips_free(struct vm *vm) { }
uint64_t soft_get_cr8(struct vcpu *v) { return 0; }
void soft_set_cr8(struct vcpu *v, uint64_t value) { }
