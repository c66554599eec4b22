/* The guest's accesses to what is not memory: served here, or by an exit.
 *
 * An instruction that makes one runs in a block of its own. An exit leaves the guest in the middle
 * of an instruction, and its C stack is lost. So the instruction is begun anew at the next KVM_RUN,
 * and the accesses that it had made already are answered from the list of those. Then it comes to
 * its next access, which exits in turn, or to its end. So each access reaches its device once, in
 * order, and between two exits all state is in registers, memory and this list. Stores that the
 * instruction makes to memory are made again with the same values. */

#include "engine.h"
#include "chips_glue.h"

#include <string.h>
#include <unistd.h>

static uint64_t masked(uint64_t value, uint32_t size)
{
    return size < 8 ? value & ((1ULL << 8 * size) - 1) : value;
}

static int rings_doorbell(struct vcpu *v, int port, uint64_t at, uint32_t size, uint64_t value)
{
    struct vm *vm = v->vm;
    for (int i = 0; i < vm->doorbell_count; i++) {
        struct doorbell *d = &vm->doorbells[i];
        if (d->at != at || !(d->flags & KVM_IOEVENTFD_FLAG_PIO) != !port
            || (d->length && d->length != size)
            || (d->flags & KVM_IOEVENTFD_FLAG_DATAMATCH
                && masked(d->match, size) != masked(value, size)))
            continue;
        uint64_t one = 1;
        ssize_t ignored = write(d->fd, &one, sizeof one);
        (void)ignored;
        soft_order_record(v, RECORD_DOORBELL, size, at, value);
        soft_order_outside(vm);
        return 1;
    }
    return 0;
}

/* The ring of coalesced writes is one for the VM. It is behind the first vCPU's kvm_run. */
static int goes_to_ring(struct vm *vm, int port, uint64_t at, uint32_t size, uint64_t value)
{
    enum { PLACES = (PAGE - sizeof(struct kvm_coalesced_mmio_ring))
                    / sizeof(struct kvm_coalesced_mmio) };
    int found = 0;
    for (int i = 0; i < vm->zone_count && !found; i++)
        found = vm->zones[i].port == (uint32_t)port && at >= vm->zones[i].at
                && at + size <= vm->zones[i].at + vm->zones[i].size;
    if (!found)
        return 0;
    struct kvm_coalesced_mmio_ring *ring = (void *)((char *)vm->vcpus[0]->run + 2 * PAGE);
    uint32_t last = ring->last, first = __atomic_load_n(&ring->first, __ATOMIC_ACQUIRE);
    if (last >= PLACES || (first - last - 1) % PLACES == 0 || (last + 1) % PLACES == first)
        return 0;                       /* full, or broken by user space */
    struct kvm_coalesced_mmio *w = &ring->coalesced_mmio[last];
    w->phys_addr = at;
    w->len = size;
    w->pio = port;
    memcpy(w->data, &value, 8);
    __atomic_store_n(&ring->last, (last + 1) % PLACES, __ATOMIC_RELEASE);
    return 1;
}

static int served_here(struct vcpu *v, enum access_kind kind, uint64_t at, uint32_t size,
                       uint64_t *value)
{
    int port = kind == PORT_IN || kind == PORT_OUT;
    if (kind >= MSR_READ)
        return 0;
    int write = kind == MMIO_WRITE || kind == PORT_OUT;
    if (v->vm->has_chips && soft_glue_access(v, port, write, at, size, value)) {
        soft_attend(v->vm);             /* it may have changed which interrupts are due */
        return 1;
    }
    return write && (rings_doorbell(v, port, at, size, *value)
                     || goes_to_ring(v->vm, port, at, size, *value));
}

static void fill(struct kvm_run *run, const struct access *a)
{
    run->flags = 0;
    switch (a->kind) {
    case MMIO_READ:
    case MMIO_WRITE:
        run->mmio.phys_addr = a->at;
        run->mmio.len = a->size;
        run->mmio.is_write = a->kind == MMIO_WRITE;
        memset(run->mmio.data, 0, 8);
        if (a->kind == MMIO_WRITE)
            memcpy(run->mmio.data, &a->value, 8);
        break;
    case PORT_IN:
    case PORT_OUT:
        run->io.direction = a->kind == PORT_OUT ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN;
        run->io.size = a->size;
        run->io.port = a->at;
        run->io.count = 1;
        run->io.data_offset = PAGE;
        memcpy((char *)run + PAGE, &a->value, 8);
        break;
    default:
        run->msr.error = 0;
        run->msr.reason = KVM_MSR_EXIT_REASON_FILTER;
        run->msr.index = a->at;
        run->msr.data = a->value;
    }
}

static const int reasons[] = { KVM_EXIT_MMIO, KVM_EXIT_MMIO, KVM_EXIT_IO, KVM_EXIT_IO,
                               KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR };

/* The instruction in hand, in the middle of a block, turns out to access a device. Begin it anew in
 * a block of its own, so that the list has all that it accesses and nothing else. */
static void __attribute__((noreturn)) alone(struct vcpu *v, uintptr_t from)
{
    v->replay = REPLAY_WANTED;
    v->count = v->position = 0;
    AT(v->vm->uc, UC_SIZE_RECUR, int) = 0;
    AT(v->vm->cpu, CPU_EXCEPTION_INDEX, int) = -1;
    if (from)
        lib.cpu_loop_exit_restore(v->vm->cpu, from);
    lib.cpu_loop_exit(v->vm->cpu);
}

/* Make the access. Does not return if it needs an exit, or if the exit's answer was an error.
 * `from` is the helper's return address into the translated block. */
void soft_access(struct vcpu *v, enum access_kind kind, uint64_t at, uint32_t size,
                 uint64_t *value, uintptr_t from)
{
    if (v->replay != NOT_REPLAYING && v->position < v->count) {
        struct access *a = &v->accesses[v->position];
        if (a->kind == kind && a->at == at && a->size == size) {
            v->position++;
            if (a->error)
                lib.raise(v->vm->env, 13, 0, from);
            *value = a->value;
            return;
        }
        v->count = v->position;         /* another vCPU has changed what the instruction does */
    }
    if (v->replay == NOT_REPLAYING)
        alone(v, from);
    if (v->count == MOST_ACCESSES)
        soft_leave(v, KVM_EXIT_INTERNAL_ERROR, from);
    struct access *a = &v->accesses[v->count++];
    *a = (struct access){ kind, 0, size, at, *value };
    v->position = v->count;
    if (served_here(v, kind, at, size, value)) {
        a->value = *value;
        return;
    }
    fill(v->run, a);
    v->pending = ACCESS_PENDING;
    soft_leave(v, reasons[kind], from);
}

/* KVM_RUN is entered again: take the answer to the newest access. */
void soft_access_answered(struct vcpu *v)
{
    struct access *a = &v->accesses[v->count - 1];
    uint64_t value = 0;
    switch (a->kind) {
    case MMIO_READ:
        memcpy(&value, v->run->mmio.data, 8);
        a->value = masked(value, a->size);
        break;
    case PORT_IN:
        memcpy(&value, (char *)v->run + PAGE, 8);
        a->value = masked(value, a->size);
        break;
    case MSR_READ:
        a->value = v->run->msr.data;
        a->error = v->run->msr.error;
        break;
    case MSR_WRITE:
        a->error = v->run->msr.error;
        break;
    default:
        break;
    }
    v->pending = NOTHING;
    v->position = 0;
    v->replay = REPLAY_WANTED;
}
