/* Between the CPUs and the chips. The chips know a vCPU by its APIC id, which is its number. */

#include "chips_glue.h"
#include "chips.h"

#include <errno.h>
#include <string.h>

static void kick(void *owner, int cpu)
{
    struct vm *vm = owner;
    struct vcpu *v = cpu >= 0 && cpu < SOFT_CHIPS_CPUS ? vm->by_id[cpu] : NULL;
    if (v)
        soft_wake(v);
}

/* Called by any thread, also by one that has the turn. */
static int write_guest(void *owner, uint64_t gpa, const void *data, size_t size)
{
    struct vm *vm = owner;
    int had_turn = soft_turn_is_ours(vm);
    volatile int answer = -EFAULT;
    if (!had_turn)
        soft_turn_take(vm, 1);
    struct slot *s = soft_slot_at(vm, gpa);
    if (s && gpa - s->gpa + size <= s->size) {
        sigjmp_buf guard;
        if (!sigsetjmp(guard, 1)) {
            soft_guard = &guard;
            memcpy(s->host + (gpa - s->gpa), data, size);
            soft_memory_mark(s, gpa - s->gpa, size);
            answer = 0;
        }
        soft_guard = NULL;
    }
    if (!had_turn)
        soft_turn_give(vm);
    return answer;
}

static void rang(void *owner)
{
    soft_order_outside(owner);
}

int soft_glue_new(struct vm *vm)
{
    struct soft_chips_host host = { .owner = vm, .tsc_khz = vm->tsc_khz, .kick = kick,
                                    .write_guest = write_guest, .runs_timers = 1 };
    if (vm->order.on) {
        host.runs_timers = 0;
        host.threadless = 1;
        host.clock = soft_order_clock;
        host.wall = soft_order_wall;
        host.rang = rang;
    }
    vm->chips = soft_chips_create(&host);
    return vm->chips ? 0 : -ENOMEM;
}

void soft_glue_free(struct vm *vm)
{
    if (vm->chips)
        soft_chips_destroy(vm->chips);
}

void soft_glue_let_go(struct vm *vm)
{
    soft_chips_let_go(vm->chips);
}

int soft_glue_vcpu_new(struct vcpu *v)
{
    if (v->id >= SOFT_CHIPS_CPUS)
        return -EINVAL;
    v->vm->by_id[v->id] = v;
    return soft_chips_add_cpu(v->vm->chips, v->id);
}

int soft_glue_access(struct vcpu *v, int port, int write, uint64_t at, uint32_t size,
                     uint64_t *value)
{
    if (size & (size - 1))
        return 0;
    return port ? soft_chips_pio(v->vm->chips, v->id, write, at, size, value)
                : soft_chips_mmio(v->vm->chips, v->id, write, at, size, value);
}

int soft_glue_due(struct vcpu *v)
{
    return soft_chips_attention(v->vm->chips, v->id) & SOFT_CHIPS_INTERRUPT;
}

/* Whoever runs, runs the timers; while a machine stands still, nothing of it changes. */
void soft_glue_timers(struct vcpu *v, int at_entry)
{
    if (at_entry || soft_chips_attention(v->vm->chips, v->id) & SOFT_CHIPS_TIMER)
        soft_chips_run_timers(v->vm->chips);
}

int64_t soft_glue_deadline(struct vm *vm)
{
    return soft_chips_next_deadline(vm->chips, -1);
}

void soft_glue_run_timers(struct vm *vm)
{
    soft_chips_run_timers(vm->chips);
}

void soft_glue_sweep(struct vm *vm)
{
    soft_chips_sweep(vm->chips);
}

int soft_glue_take(struct vcpu *v)
{
    int vector = soft_chips_take_interrupt(v->vm->chips, v->id);
    soft_order_record(v, RECORD_INTERRUPT, vector, 0, 0);
    return vector;
}

int soft_glue_take_nmi(struct vcpu *v)
{
    return soft_glue_has_nmi(v) && soft_chips_take_nmi(v->vm->chips, v->id);
}

int soft_glue_has_nmi(struct vcpu *v)
{
    return (soft_chips_attention(v->vm->chips, v->id) & SOFT_CHIPS_NMI) != 0;
}

int soft_glue_nmis(struct vcpu *v)
{
    return soft_chips_nmi_pending(v->vm->chips, v->id);
}

void soft_glue_set_nmis(struct vcpu *v, int count)
{
    soft_chips_set_nmi_pending(v->vm->chips, v->id, count);
}

uint8_t soft_glue_sipi_vector(struct vcpu *v)
{
    return soft_chips_sipi_vector(v->vm->chips, v->id);
}

void soft_glue_set_sipi_vector(struct vcpu *v, uint8_t vector)
{
    soft_chips_set_sipi_vector(v->vm->chips, v->id, vector);
}

int soft_glue_startup_due(struct vcpu *v)
{
    return soft_chips_attention(v->vm->chips, v->id)
           & (SOFT_CHIPS_INIT | SOFT_CHIPS_SIPI | SOFT_CHIPS_UNHALT);
}

/* Intel SDM 3A, 9.4: INIT makes a processor wait for SIPI, and SIPI means nothing to another. */
void soft_glue_startup(struct vcpu *v)
{
    uint8_t vector = 0;
    if (!soft_glue_startup_due(v))
        return;
    uint32_t what = soft_chips_take_startup(v->vm->chips, v->id,
                                            SOFT_CHIPS_INIT | SOFT_CHIPS_UNHALT, &vector);
    if (what & SOFT_CHIPS_UNHALT && v->mp_state == KVM_MP_STATE_HALTED)
        v->mp_state = KVM_MP_STATE_RUNNABLE;
    if (what & SOFT_CHIPS_INIT) {
        soft_reset(v);
        v->mp_state = v->id ? KVM_MP_STATE_INIT_RECEIVED : KVM_MP_STATE_RUNNABLE;
    }
    what = soft_chips_take_startup(v->vm->chips, v->id, SOFT_CHIPS_SIPI, &vector);
    if (what & SOFT_CHIPS_SIPI && v->mp_state == KVM_MP_STATE_INIT_RECEIVED) {
        soft_set_cs_ip(v, vector);
        v->mp_state = KVM_MP_STATE_RUNNABLE;
    }
}

uint64_t soft_glue_base(struct vcpu *v)
{
    return v->vm->has_chips ? soft_chips_apic_base(v->vm->chips, v->id) : v->apic_base;
}

int soft_glue_base_set(struct vcpu *v, uint64_t value, int host)
{
    if (!v->vm->has_chips) {
        v->apic_base = value;
        return 0;
    }
    return host ? soft_chips_set_apic_base(v->vm->chips, v->id, value)
                : soft_chips_msr_set(v->vm->chips, v->id, 0x1b, value, 0);
}

int soft_glue_msr_get(struct vcpu *v, uint32_t index, uint64_t *value, int host)
{
    return soft_chips_msr_get(v->vm->chips, v->id, index, value, host) ? -EINVAL : 0;
}

int soft_glue_msr_set(struct vcpu *v, uint32_t index, uint64_t value, int host)
{
    return soft_chips_msr_set(v->vm->chips, v->id, index, value, host) ? -EINVAL : 0;
}

uint32_t soft_glue_msrs(uint32_t *indices, uint32_t room)
{
    return soft_chips_msr_list(indices, room);
}

uint32_t soft_glue_cpuid_features(void)
{
    return soft_chips_kvm_features();
}

void soft_glue_tsc_changed(struct vcpu *v)
{
    soft_chips_set_tsc(v->vm->chips, v->id, v->tsc_khz, v->tsc_offset);
}

int soft_glue_check_extension(long capability)
{
    return soft_chips_check_extension(capability);
}

int soft_glue_vm_ioctl(struct vm *vm, unsigned long request, void *argument)
{
    int answer = soft_chips_vm_ioctl(vm->chips, request, argument);
    if (answer >= 0)
        vm->has_chips = soft_chips_has_irqchip(vm->chips);
    return answer;
}

int soft_glue_vcpu_ioctl(struct vcpu *v, unsigned long request, void *argument)
{
    return soft_chips_cpu_ioctl(v->vm->chips, v->id, request, argument);
}

uint64_t soft_get_cr8(struct vcpu *v)
{
    return v->vm->has_chips ? soft_chips_cr8(v->vm->chips, v->id) : v->cr8;
}

void soft_set_cr8(struct vcpu *v, uint64_t value)
{
    v->cr8 = value & 15;
    if (v->vm->has_chips)
        soft_chips_set_cr8(v->vm->chips, v->id, value);
}
