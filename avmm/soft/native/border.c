/* The border: descriptors, and KVM's ioctls on them. */

#define _GNU_SOURCE
#include "soft.h"
#include "newer.h"
#include "chips_glue.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- the table of descriptors ----
 *
 * A VM's object lives until its own descriptor and those of its vCPUs are closed. */

enum kind { SYSTEM = 1, VM, VCPU };
enum { MOST_FDS = 1 << 16 };
struct entry { enum kind kind; void *object; };

static struct entry *table[MOST_FDS / 256];
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;

static struct entry *entry_of(int fd)
{
    if (fd < 0 || fd >= MOST_FDS)
        return NULL;
    struct entry *page = __atomic_load_n(&table[fd / 256], __ATOMIC_ACQUIRE);
    return page && page[fd % 256].kind ? &page[fd % 256] : NULL;
}

static int add(enum kind kind, void *object, size_t size)
{
    static const char *names[] = { "", "soft-system", "soft-vm", "soft-vcpu" };
    int fd = memfd_create(names[kind], MFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    if (fd >= MOST_FDS || (size && ftruncate(fd, size))) {
        close(fd);
        return -EMFILE;
    }
    pthread_mutex_lock(&table_lock);
    if (!table[fd / 256])
        __atomic_store_n(&table[fd / 256], calloc(256, sizeof(struct entry)), __ATOMIC_RELEASE);
    if (!table[fd / 256]) {
        pthread_mutex_unlock(&table_lock);
        close(fd);
        return -ENOMEM;
    }
    table[fd / 256][fd % 256] = (struct entry){ kind, object };
    pthread_mutex_unlock(&table_lock);
    return fd;
}

int soft_is(int fd)
{
    return entry_of(fd) != NULL;
}

int soft_open(void)
{
    return soft_library_ready() ? add(SYSTEM, NULL, 0) : -ENODEV;
}

static void free_vm(struct vm *vm)
{
    for (int i = 0; i < vm->vcpu_count; i++)
        if (vm->vcpus[i]->fd >= 0)
            return;
    if (vm->fd >= 0)
        return;
    soft_glue_free(vm);
    for (int i = 0; i < vm->vcpu_count; i++) {
        munmap(vm->vcpus[i]->run, RUN_SIZE);
        free(vm->vcpus[i]->cpuid);
        free(vm->vcpus[i]);
    }
    soft_engine_free(vm);
    for (int i = 0; i < vm->doorbell_count; i++)
        close(vm->doorbells[i].fd);
    for (int i = 0; i < vm->filter_count; i++)
        free(vm->filter[i].bits);
    free(vm->doorbells);
    free(vm);
}

/* In a forked child. What only takes memory stays: a lock may be held by a thread that is not
 * there. */
static void let_go(struct vm *vm)
{
    soft_glue_let_go(vm);
    for (int i = 0; i < vm->doorbell_count; i++)
        close(vm->doorbells[i].fd);
}

int soft_close(int fd)
{
    struct entry *e = entry_of(fd);
    if (!e)
        return -EBADF;
    struct vm *vm = e->kind == VM ? e->object
                    : e->kind == VCPU ? ((struct vcpu *)e->object)->vm : NULL;
    if (vm && vm->pid != getpid()) {
        if (e->kind == VM)
            let_go(vm);
        else
            munmap(((struct vcpu *)e->object)->run, RUN_SIZE);
        e->kind = 0;
        return close(fd);
    }
    pthread_mutex_lock(&table_lock);
    struct entry old = *e;
    e->kind = 0;
    close(fd);
    if (old.kind == VM)
        ((struct vm *)old.object)->fd = -1;
    if (old.kind == VCPU)
        ((struct vcpu *)old.object)->fd = -1;
    if (old.kind != SYSTEM)
        free_vm(vm);
    else
        free(old.object);       /* its seed */
    pthread_mutex_unlock(&table_lock);
    return 0;
}

/* ---- capabilities ---- */

static int check_extension(unsigned long capability)
{
    int answer = soft_glue_check_extension(capability);
    if (answer != -ENOTTY)
        return answer;
    switch (capability) {
    case KVM_CAP_USER_MEMORY: case KVM_CAP_SET_TSS_ADDR: case KVM_CAP_EXT_CPUID:
    case KVM_CAP_MP_STATE: case KVM_CAP_IOEVENTFD: case KVM_CAP_SET_IDENTITY_MAP_ADDR:
    case KVM_CAP_VCPU_EVENTS: case KVM_CAP_DEBUGREGS: case KVM_CAP_XSAVE: case KVM_CAP_XCRS:
    case KVM_CAP_GET_TSC_KHZ: case KVM_CAP_READONLY_MEM: case KVM_CAP_IOEVENTFD_ANY_LENGTH:
    case KVM_CAP_CHECK_EXTENSION_VM: case KVM_CAP_IMMEDIATE_EXIT: case KVM_CAP_ENABLE_CAP_VM:
    case KVM_CAP_COALESCED_PIO: case KVM_CAP_X86_MSR_FILTER: case KVM_CAP_X86_USER_SPACE_MSR:
    case KVM_CAP_DESTROY_MEMORY_REGION_WORKS: case KVM_CAP_SYNC_MMU:
    case KVM_CAP_TSC_CONTROL: case KVM_CAP_VCPU_ATTRIBUTES:
        return 1;
    case KVM_CAP_COALESCED_MMIO: return 2;
    case KVM_CAP_NR_MEMSLOTS: return MOST_SLOTS;
    case KVM_CAP_NR_VCPUS: case KVM_CAP_MAX_VCPUS: case KVM_CAP_MAX_VCPU_ID: return MOST_VCPUS;
    case KVM_CAP_XSAVE2: return sizeof(struct kvm_xsave);
    case KVM_CAP_EXIT_HYPERCALL: return 1 << KVM_HC_MAP_GPA_RANGE;
    default: return 0;
    }
}

/* ---- the system ---- */

static int create_vm(const uint64_t *seed)
{
    struct vm *vm = calloc(1, sizeof *vm);
    if (!vm)
        return -ENOMEM;
    vm->doorbells = calloc(MOST_DOORBELLS, sizeof *vm->doorbells);
    int answer = vm->doorbells ? soft_engine_new(vm) : -ENOMEM;
    if (answer) {
        free(vm->doorbells);
        free(vm);
        return answer;
    }
    vm->last = vm->slots;
    vm->pid = getpid();
    vm->tsc_khz = soft_host_tsc_khz();
    vm->order.look = ORDER_NEVER;
    vm->fd = -1;
    answer = seed ? soft_order_seed(vm, *seed) : 0;
    if (answer || soft_glue_new(vm)) {
        free_vm(vm);
        return answer ? answer : -ENOMEM;
    }
    answer = add(VM, vm, 0);
    if (answer < 0)
        free_vm(vm);
    else
        vm->fd = answer;
    return answer;
}

static int system_ioctl(const uint64_t *seed, unsigned long request, void *argument)
{
    switch (request) {
    case KVM_GET_API_VERSION: return KVM_API_VERSION;
    case KVM_CREATE_VM: return argument ? -EINVAL : create_vm(seed);
    case KVM_CHECK_EXTENSION: return check_extension((unsigned long)argument);
    case KVM_GET_VCPU_MMAP_SIZE: return RUN_SIZE;
    case KVM_GET_SUPPORTED_CPUID: return soft_cpuid_supported(argument);
    case KVM_GET_MSR_INDEX_LIST: return soft_msr_list(argument);
    default: return -ENOTTY;
    }
}

/* ---- a VM ---- */

static int create_vcpu(struct vm *vm, unsigned long id)
{
    if (id >= 255)
        return -EINVAL;
    for (int i = 0; i < vm->vcpu_count; i++)
        if (vm->vcpus[i]->id == (int)id)
            return -EEXIST;
    if (vm->vcpu_count == MOST_VCPUS)
        return -EINVAL;
    struct vcpu *v = calloc(1, sizeof *v);
    if (!v)
        return -ENOMEM;
    v->vm = vm;
    v->id = id;
    v->index = vm->vcpu_count;
    v->apic_base = 0xfee00800 | (id ? 0 : 0x100);
    v->misc_enable = 1;
    v->tsc_khz = vm->tsc_khz;
    v->mp_state = id ? KVM_MP_STATE_UNINITIALIZED : KVM_MP_STATE_RUNNABLE;
    memcpy(v->state, vm->fresh, ENV_STATE);
    soft_reset(v);
    int fd = add(VCPU, v, RUN_SIZE);
    if (fd < 0) {
        free(v);
        return fd;
    }
    v->fd = fd;
    v->run = mmap(NULL, RUN_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    vm->vcpus[vm->vcpu_count++] = v;
    if (v->run == MAP_FAILED || soft_glue_vcpu_new(v)) {
        vm->vcpu_count--;
        entry_of(fd)->kind = 0;
        close(fd);
        if (v->run != MAP_FAILED)
            munmap(v->run, RUN_SIZE);
        free(v);
        return -ENOMEM;
    }
    return fd;
}

static int set_doorbell(struct vm *vm, const struct kvm_ioeventfd *e)
{
    if (e->flags & ~7u || (e->len != 0 && e->len != 1 && e->len != 2 && e->len != 4 && e->len != 8))
        return -EINVAL;
    for (int i = 0; i < vm->doorbell_count; i++) {
        struct doorbell *d = &vm->doorbells[i];
        uint32_t flags = e->flags & ~KVM_IOEVENTFD_FLAG_DEASSIGN;
        if (d->at != e->addr || d->length != e->len || d->flags != flags
            || (flags & KVM_IOEVENTFD_FLAG_DATAMATCH && d->match != e->datamatch))
            continue;
        if (!(e->flags & KVM_IOEVENTFD_FLAG_DEASSIGN))
            return -EEXIST;
        close(d->fd);
        *d = vm->doorbells[--vm->doorbell_count];
        return 0;
    }
    if (e->flags & KVM_IOEVENTFD_FLAG_DEASSIGN)
        return -ENOENT;
    if (vm->doorbell_count == MOST_DOORBELLS)
        return -ENOSPC;
    int own = fcntl(e->fd, F_DUPFD_CLOEXEC, 3);     /* the caller may close its own */
    if (own < 0)
        return -errno;
    vm->doorbells[vm->doorbell_count++] =
        (struct doorbell){ e->addr, e->datamatch, e->len, e->flags, own };
    return 0;
}

static int set_zone(struct vm *vm, const struct kvm_coalesced_mmio_zone *z, int add)
{
    if (!add) {
        for (int i = 0; i < vm->zone_count; i++)
            if (vm->zones[i].at == z->addr && vm->zones[i].size == z->size
                && vm->zones[i].port == z->pio)
                vm->zones[i--] = vm->zones[--vm->zone_count];
        return 0;
    }
    if (vm->zone_count == MOST_ZONES)
        return -ENOSPC;
    if (z->pio > 1)
        return -EINVAL;
    vm->zones[vm->zone_count++] = (struct zone){ z->addr, z->size, z->pio };
    return 0;
}

static int set_filter(struct vm *vm, const struct kvm_msr_filter *f)
{
    struct msr_range made[16];
    int count = 0;
    for (int i = 0; i < KVM_MSR_FILTER_MAX_RANGES && i < 16; i++) {
        const struct kvm_msr_filter_range *r = &f->ranges[i];
        if (!r->nmsrs)
            continue;
        size_t size = (r->nmsrs + 63) / 64 * 8;
        uint8_t *bits = r->nmsrs <= KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8 ? malloc(size) : NULL;
        if (!bits) {
            while (count)
                free(made[--count].bits);
            return -EINVAL;
        }
        memcpy(bits, r->bitmap, size);
        made[count++] = (struct msr_range){ r->flags, r->base, r->nmsrs, bits };
    }
    for (int i = 0; i < vm->filter_count; i++)
        free(vm->filter[i].bits);
    memcpy(vm->filter, made, sizeof *made * count);
    vm->filter_count = count;
    vm->filter_default_deny = f->flags & KVM_MSR_FILTER_DEFAULT_DENY;
    return 0;
}

static int enable(struct vm *vm, const struct kvm_enable_cap *e)
{
    switch (e->cap) {
    case KVM_CAP_X86_USER_SPACE_MSR: vm->user_msrs = e->args[0]; return 0;
    case KVM_CAP_EXIT_HYPERCALL:
        if (e->args[0] & ~(1ULL << KVM_HC_MAP_GPA_RANGE))
            return -EINVAL;
        vm->hypercall_exits = e->args[0];
        return 0;
    default: return -EINVAL;
    }
}

/* With the turn. */
static int vm_ioctl_alone(struct vm *vm, unsigned long request, void *argument)
{
    switch (request) {
    case KVM_CREATE_VCPU: return create_vcpu(vm, (unsigned long)argument);
    case KVM_SET_USER_MEMORY_REGION: return soft_memory_set(vm, argument);
    case KVM_GET_DIRTY_LOG: return soft_memory_dirty(vm, argument);
    case KVM_IOEVENTFD: return set_doorbell(vm, argument);
    case KVM_REGISTER_COALESCED_MMIO: return set_zone(vm, argument, 1);
    case KVM_UNREGISTER_COALESCED_MMIO: return set_zone(vm, argument, 0);
    case KVM_X86_SET_MSR_FILTER: return set_filter(vm, argument);
    case KVM_ENABLE_CAP: return enable(vm, argument);
    default: return -ENOTTY;
    }
}

static int vm_ioctl(struct vm *vm, unsigned long request, void *argument)
{
    if (request == KVM_CHECK_EXTENSION)
        return check_extension((unsigned long)argument);
    if (request == KVM_SET_TSS_ADDR || request == KVM_SET_IDENTITY_MAP_ADDR)
        return 0;
    int answer = soft_glue_vm_ioctl(vm, request, argument);
    if (answer != -ENOTTY)
        return answer;
    soft_turn_take(vm, 1);
    answer = vm_ioctl_alone(vm, request, argument);
    soft_turn_give(vm);
    return answer;
}

/* ---- a vCPU ---- */

static int set_cpuid(struct vcpu *v, const struct kvm_cpuid2 *c)
{
    if (c->nent > 256)
        return -E2BIG;
    struct kvm_cpuid_entry2 *copy = calloc(c->nent + 1, sizeof *copy);
    if (!copy)
        return -ENOMEM;
    memcpy(copy, c->entries, c->nent * sizeof *copy);
    free(v->cpuid);
    v->cpuid = copy;
    v->cpuids = c->nent;
    return 0;
}

static int get_cpuid(struct vcpu *v, struct kvm_cpuid2 *c)
{
    if (c->nent < v->cpuids)
        return -E2BIG;
    memcpy(c->entries, v->cpuid, v->cpuids * sizeof *v->cpuid);
    c->nent = v->cpuids;
    return 0;
}

static int get_msrs(struct vcpu *v, struct kvm_msrs *m)
{
    uint32_t i = 0;
    uint64_t value = 0;
    for (; i < m->nmsrs && !soft_msr_get(v, m->entries[i].index, &value, 1); i++)
        m->entries[i].data = value;
    return i;
}

static int set_msrs(struct vcpu *v, const struct kvm_msrs *m)
{
    uint32_t i = 0;
    while (i < m->nmsrs && !soft_msr_set(v, m->entries[i].index, m->entries[i].data, 1))
        i++;
    return i;
}

static void get_debugregs(struct vcpu *v, struct kvm_debugregs *d)
{
    void *env = env_of(v);
    memset(d, 0, sizeof *d);
    memcpy(d->db, &AT(env, ENV_DR, uint64_t), 32);
    d->dr6 = AT(env, ENV_DR + 48, uint64_t);
    d->dr7 = AT(env, ENV_DR + 56, uint64_t);
}

static int set_debugregs(struct vcpu *v, const struct kvm_debugregs *d)
{
    void *env = env_of(v);
    if (d->flags)
        return -EINVAL;
    memcpy(&AT(env, ENV_DR, uint64_t), d->db, 32);
    AT(env, ENV_DR + 48, uint64_t) = d->dr6;
    AT(env, ENV_DR + 56, uint64_t) = d->dr7;
    return 0;
}

static void get_events(struct vcpu *v, struct kvm_vcpu_events *e)
{
    void *env = env_of(v);
    *e = v->injected;
    e->interrupt.shadow = AT(env, ENV_HFLAGS, uint32_t) & HF_INHIBIT_IRQ ? 3 : 0;
    e->nmi.pending = soft_glue_nmis(v);
    e->sipi_vector = soft_glue_sipi_vector(v);
    e->nmi.masked = AT(env, ENV_HFLAGS2, uint32_t) & HF2_NMI ? 1 : 0;
    e->flags = KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING;
}

static int set_events(struct vcpu *v, const struct kvm_vcpu_events *e)
{
    void *env = env_of(v);
    if (e->exception.injected && (e->exception.nr > 31 || e->exception.nr == 2))
        return -EINVAL;
    v->injected = *e;
    if (e->flags & KVM_VCPUEVENT_VALID_SHADOW) {
        AT(env, ENV_HFLAGS, uint32_t) &= ~HF_INHIBIT_IRQ;
        if (e->interrupt.shadow)
            AT(env, ENV_HFLAGS, uint32_t) |= HF_INHIBIT_IRQ;
    }
    if (e->flags & KVM_VCPUEVENT_VALID_NMI_PENDING)
        soft_glue_set_nmis(v, e->nmi.pending);
    if (e->flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR)
        soft_glue_set_sipi_vector(v, e->sipi_vector);
    AT(env, ENV_HFLAGS2, uint32_t) &= ~HF2_NMI;
    if (e->nmi.masked)
        AT(env, ENV_HFLAGS2, uint32_t) |= HF2_NMI;
    return 0;
}

static int tsc_offset(struct vcpu *v, unsigned long request, const struct kvm_device_attr *a)
{
    if (a->group != KVM_VCPU_TSC_CTRL || a->attr != KVM_VCPU_TSC_OFFSET)
        return -ENXIO;
    uint64_t *value = (uint64_t *)a->addr;
    if (request == KVM_GET_DEVICE_ATTR)
        *value = v->tsc_offset;
    else if (request == KVM_SET_DEVICE_ATTR) {
        v->tsc_offset = *value;
        soft_glue_tsc_changed(v);
    }
    return 0;
}

static int translate(struct vcpu *v, struct kvm_translation *t)
{
    uint32_t attrs = 0;
    soft_engine_load(v);
    sigjmp_buf guard;
    if (sigsetjmp(guard, 1)) {
        soft_guard = NULL;
        return -EFAULT;
    }
    soft_guard = &guard;
    uint64_t page = lib.debug_physical(v->vm->cpu, t->linear_address, &attrs);
    soft_guard = NULL;
    t->valid = page != ~0ULL;
    t->physical_address = (page & ~(uint64_t)(PAGE - 1)) | t->linear_address % PAGE;
    t->writeable = 1;
    t->usermode = 0;
    return 0;
}

static int get_xcrs(struct vcpu *v, struct kvm_xcrs *x)
{
    memset(x, 0, sizeof *x);
    x->nr_xcrs = 1;
    x->xcrs[0].value = AT(env_of(v), ENV_XCR0, uint64_t);
    return 0;
}

static int set_xcrs(struct vcpu *v, const struct kvm_xcrs *x)
{
    if (x->nr_xcrs > KVM_MAX_XCRS || x->flags)
        return -EINVAL;
    for (uint32_t i = 0; i < x->nr_xcrs; i++)
        if (x->xcrs[i].xcr == 0) {
            if (!(x->xcrs[i].value & 1) || x->xcrs[i].value & ~3ULL)
                return -EINVAL;
            AT(env_of(v), ENV_XCR0, uint64_t) = x->xcrs[i].value;
        }
    return 0;
}

static int set_mp_state(struct vcpu *v, const struct kvm_mp_state *m)
{
    if (m->mp_state > KVM_MP_STATE_HALTED)
        return -EINVAL;
    v->mp_state = m->mp_state;
    soft_wake(v);
    return 0;
}

static int set_tsc_khz(struct vcpu *v, uint64_t khz)
{
    if (khz == 0)
        khz = v->vm->tsc_khz;
    if (khz < 1000 || khz >> 32)        /* no processor is as slow as that */
        return -EINVAL;
    if (khz != v->tsc_khz)
        soft_set_tsc_khz(v, khz);
    return 0;
}

static int vcpu_ioctl_alone(struct vcpu *v, unsigned long request, void *a)
{
    switch (request) {
    case KVM_GET_REGS: soft_get_regs(v, a); return 0;
    case KVM_SET_REGS: soft_set_regs(v, a); return 0;
    case KVM_GET_SREGS: soft_get_sregs(v, a); return 0;
    case KVM_SET_SREGS: return soft_set_sregs(v, a);
    case KVM_GET_FPU: soft_get_fpu(v, a); return 0;
    case KVM_SET_FPU: soft_set_fpu(v, a); return 0;
    case KVM_GET_XSAVE: case KVM_GET_XSAVE2: soft_get_xsave(v, a); return 0;
    case KVM_SET_XSAVE: return soft_set_xsave(v, a);
    case KVM_GET_XCRS: return get_xcrs(v, a);
    case KVM_SET_XCRS: return set_xcrs(v, a);
    case KVM_GET_MSRS: return get_msrs(v, a);
    case KVM_SET_MSRS: return set_msrs(v, a);
    case KVM_SET_CPUID2: return set_cpuid(v, a);
    case KVM_GET_CPUID2: return get_cpuid(v, a);
    case KVM_GET_DEBUGREGS: get_debugregs(v, a); return 0;
    case KVM_SET_DEBUGREGS: return set_debugregs(v, a);
    case KVM_GET_VCPU_EVENTS: get_events(v, a); return 0;
    case KVM_SET_VCPU_EVENTS: return set_events(v, a);
    case KVM_GET_MP_STATE:
        soft_glue_startup(v);
        ((struct kvm_mp_state *)a)->mp_state = v->mp_state;
        return 0;
    case KVM_SET_MP_STATE: return set_mp_state(v, a);
    case KVM_GET_TSC_KHZ: return v->tsc_khz;
    case KVM_SET_TSC_KHZ: return set_tsc_khz(v, (uint64_t)a);
    case KVM_HAS_DEVICE_ATTR: case KVM_GET_DEVICE_ATTR: case KVM_SET_DEVICE_ATTR:
        return tsc_offset(v, request, a);
    case KVM_TRANSLATE: return translate(v, a);
    default: return -ENOTTY;
    }
}

static int vcpu_ioctl(struct vcpu *v, unsigned long request, void *argument)
{
    if (request == KVM_RUN)
        return soft_vcpu_run(v);
    if (request == KVM_CHECK_EXTENSION)
        return check_extension((unsigned long)argument);
    soft_turn_take(v->vm, 1);
    int answer = soft_glue_vcpu_ioctl(v, request, argument);
    if (answer == -ENOTTY)
        answer = vcpu_ioctl_alone(v, request, argument);
    soft_turn_give(v->vm);
    return answer;
}

int soft_ioctl(int fd, unsigned long request, void *argument)
{
    struct entry *e = entry_of(fd);
    if (!e)
        return -EBADF;
    switch (e->kind) {
    case SYSTEM: return system_ioctl(e->object, request, argument);
    case VM: return vm_ioctl(e->object, request, argument);
    default: return vcpu_ioctl(e->object, request, argument);
    }
}

void soft_wrote(int fd, const void *host, uint64_t length)
{
    struct entry *e = entry_of(fd);
    if (e && e->kind == VM && length)
        soft_memory_wrote(e->object, host, length);
}

static struct vm *vm_of(int fd)
{
    struct entry *e = entry_of(fd);
    return e && e->kind == VM ? e->object : NULL;
}

int soft_seed(int fd, uint64_t seed)
{
    struct entry *e = entry_of(fd);
    if (!e || e->kind != SYSTEM || e->object)
        return -EINVAL;
    uint64_t *kept = malloc(sizeof *kept);
    if (!kept)
        return -ENOMEM;
    *kept = seed;
    e->object = kept;
    return 0;
}

int64_t soft_now(int fd)
{
    struct vm *vm = vm_of(fd);
    return vm ? vm->order.ns : -1;
}

void soft_settled(int fd, int64_t host_deadline, int *idle)
{
    struct vm *vm = vm_of(fd);
    *idle = 0;
    if (!vm)
        return;
    soft_turn_take(vm, 1);
    vm->order.host_deadline = host_deadline;
    *idle = vm->order.idle;
    soft_turn_give(vm);
}

void soft_unchanged(int fd)
{
    struct entry *e = entry_of(fd);
    if (e && e->kind == VCPU)
        ((struct vcpu *)e->object)->settles = 1;
}

uint64_t soft_trail(int fd, uint64_t *records)
{
    struct vm *vm = vm_of(fd);
    if (!vm)
        return 0;
    soft_turn_take(vm, 1);
    uint64_t digest = vm->order.digest;
    *records = vm->order.records;
    soft_turn_give(vm);
    return digest;
}

int soft_log(int fd, int log)
{
    struct vm *vm = vm_of(fd);
    if (!vm || !vm->order.on)
        return -EBADF;
    soft_turn_take(vm, 1);
    vm->order.log = log;
    soft_turn_give(vm);
    return 0;
}
