/* What one VM of the software engine is made of.
 *
 * All vCPUs of a VM take turns on one instance of the library, because LOCK is atomic, and
 * translated blocks are invalidated, only within one. Whoever holds the turn (turn.c) may touch
 * the instance, the registers of every vCPU, and the memory slots; nobody else may. */

#ifndef AVMM_SOFT_ENGINE_H
#define AVMM_SOFT_ENGINE_H

#include "library.h"
#include "order.h"

#include <linux/kvm.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>

enum { UC_ARCH_X86 = 4, UC_MODE_64 = 8, UC_USE_EXITS = 4 | 1 << 26 | 1 << 30, UC_ALL = 7,
       UC_HOOK_INTR = 1, UC_HOOK_WRITE_PROT = 1 << 8, UC_HOOK_INVALID = 1 << 14,
       UC_REG_RIP = 41 };

enum { MOST_VCPUS = 32, MOST_SLOTS = 64, MOST_ACCESSES = 64, MOST_ZONES = 64, MOST_DOORBELLS = 512,
       PAGE = 4096, RUN_SIZE = 3 * PAGE, RF = 1 << 16 };

/* An access of the guest's to what is not memory. */
enum access_kind { MMIO_READ, MMIO_WRITE, PORT_IN, PORT_OUT, MSR_READ, MSR_WRITE };

struct access {
    enum access_kind kind;
    uint8_t error;              /* an MSR that user space refuses */
    uint32_t size;
    uint64_t at, value;
};

struct slot {
    uint64_t gpa, size, ram;    /* size 0: unused */
    uint8_t *host;
    uint32_t id, flags;
    size_t hook;                /* of read-only memory */
    uint64_t *code;             /* a bit for each page that holds translated blocks */
    uint64_t *stale;            /* a bit for each such page that the host has written since */
    uint64_t *dirty;            /* a bit for each page written since the last KVM_GET_DIRTY_LOG */
};

struct zone { uint64_t at, size; uint32_t port; };
struct doorbell { uint64_t at, match; uint32_t length, flags; int fd; };
struct msr_range { uint32_t flags, first, count; uint8_t *bits; };

struct vm;

struct vcpu {
    struct vm *vm;
    int fd, index, id;
    struct kvm_run *run;
    uint8_t state[ENV_STATE];   /* its registers, while another vCPU's are loaded */
    uint32_t mp_state;
    uint32_t cpuids;
    struct kvm_cpuid_entry2 *cpuid;
    uint64_t tsc_khz, tsc_offset, apic_base, misc_enable, mtrr[16], mtrr_fixed[11], mtrr_default;
    uint64_t mcg_status;
    uint8_t cr8;
    struct kvm_vcpu_events injected;    /* what KVM_SET_VCPU_EVENTS wants to be injected first */

    /* The instruction in hand: what it has accessed so far, in order. It is begun anew from its
     * start for each exit, and each access that is in the list already is answered from it. */
    struct access accesses[MOST_ACCESSES];
    int count, position;
    enum { NOT_REPLAYING, REPLAY_WANTED, REPLAY_ARMED, REPLAY_RUNS } replay;
    enum { NOTHING, ACCESS_PENDING, HYPERCALL_PENDING } pending;

    int exit_reason;            /* what the guest has just left with; 0: nothing */
    int lacks_memory;           /* the host could not provide a page that the guest has touched */
    int is_at_start;            /* what is gone back to is a block's start, and nothing was done */
    int settles;                /* the host has settled when it comes back (order.c) */
    int stop;                   /* leave when the instruction in hand is done */
    uint64_t interrupted_eip;   /* of an INT instruction, before the library moves RIP past it */
    _Atomic uint32_t wake;      /* a futex: changed whenever a sleeping vCPU has to look again */
    _Atomic uint32_t kicked;
};

struct vm {
    int fd, pid;                /* a child of a fork has none of it but the descriptors */
    void *uc, *cpu, *env;
    void *mapping_ram, *mapping_rom;    /* what the library takes for a region: see memory.c */
    struct vcpu *vcpus[MOST_VCPUS];
    int vcpu_count;
    struct vcpu *loaded;        /* whose registers are in `env` */
    struct slot slots[MOST_SLOTS];
    struct slot *last;          /* the slot that was found last */
    uint64_t stored_at;         /* the RAM address of the slow store that is being made */
    struct zone zones[MOST_ZONES];
    int zone_count;
    struct doorbell *doorbells;
    int doorbell_count;
    struct msr_range filter[16];
    int filter_count, filter_default_deny;
    uint64_t user_msrs, hypercall_exits;
    uint8_t fresh[ENV_STATE];   /* a CPU's registers as the library makes them */
    _Atomic uint32_t attention; /* looked at wherever a block begins */
    _Atomic uint32_t has_stale; /* there is a bit in a slot's `stale` */
    uint64_t tsc_khz;
    int has_chips;              /* an irqchip: until then HLT exits, and nothing interrupts */
    struct soft_chips *chips;
    struct vcpu *by_id[64];
    struct order order;

    pthread_mutex_t lock;       /* protects the turn: the five below */
    pthread_cond_t changed;
    uint64_t next_ticket, serving;
    _Atomic uint32_t waiting, preempt;
    int64_t since;
};

/* The vCPU that this thread executes; NULL outside of KVM_RUN. The overrides act for this one
 * only, so another user of the library in this process keeps the library as it is. */
extern __thread struct vcpu *now;

/* Of `now`, what each block looks at: together, so that it takes few steps. `uc` is NULL outside. */
struct glance { void *uc; _Atomic uint32_t *attention; struct order *order; };
extern __thread struct glance soft_glance;

static inline void *env_of(struct vcpu *v)
{
    return v->vm->loaded == v ? v->vm->env : v->state;
}

enum { WITHOUT_WHOLE_BLOCKS = 1, WITHOUT_PROTECTION = 2, WITHOUT_REFUSAL = 4,
       WITHOUT_EARLY_STOP = 8 };
extern unsigned soft_without;

/* engine.c */
int soft_engine_new(struct vm *vm);
void soft_engine_free(struct vm *vm);
const char *soft_engine_verify(void *uc);
void soft_engine_load(struct vcpu *v);
bool soft_store_to_rom(void *uc, int type, uint64_t at, int size, int64_t value, void *data);
int soft_vcpu_run(struct vcpu *v);
int soft_is_runnable(struct vcpu *v);
void soft_attend(struct vm *vm);
void soft_wake(struct vcpu *v);
void soft_leave(struct vcpu *v, int reason, uintptr_t from) __attribute__((noreturn));
bool soft_between_blocks(struct vcpu *v);
uint64_t soft_get_cr8(struct vcpu *v);
void soft_set_cr8(struct vcpu *v, uint64_t value);

void soft_catch_faults(void);
/* Where to go on if the host cannot provide a page of guest memory that this thread touches outside
 * of the guest: sigsetjmp's buffer, set around the access; NULL: nowhere. */
extern __thread sigjmp_buf *soft_guard;

/* turn.c */
enum { SLICE_NS = 1000000 };
void soft_turn_take(struct vm *vm, int at_once);
void soft_turn_give(struct vm *vm);
int soft_turn_is_ours(struct vm *vm);
int64_t soft_now_ns(void);

/* memory.c */
int soft_memory_set(struct vm *vm, const struct kvm_userspace_memory_region *region);
int soft_memory_dirty(struct vm *vm, const struct kvm_dirty_log *log);
void soft_memory_free(struct vm *vm);
struct slot *soft_slot_at(struct vm *vm, uint64_t gpa);
struct slot *soft_slot_of_ram(struct vm *vm, uint64_t ram);
void *soft_memory_mapping(void *uc, uint64_t at);
void soft_memory_mark(struct slot *s, uint64_t offset, uint64_t length);
void soft_memory_wrote(struct vm *vm, const uint8_t *host, uint64_t length);
void soft_memory_refresh(struct vm *vm);

/* access.c */
void soft_access(struct vcpu *v, enum access_kind kind, uint64_t at, uint32_t size,
                 uint64_t *value, uintptr_t from);
void soft_access_answered(struct vcpu *v);

/* state.c */
void soft_reset(struct vcpu *v);
uint64_t soft_get_rflags(void *env);
void soft_set_rflags(void *env, uint64_t flags);
void soft_get_regs(struct vcpu *v, struct kvm_regs *regs);
void soft_set_regs(struct vcpu *v, const struct kvm_regs *regs);
void soft_get_sregs(struct vcpu *v, struct kvm_sregs *sregs);
int soft_set_sregs(struct vcpu *v, const struct kvm_sregs *sregs);
void soft_get_xsave(struct vcpu *v, uint8_t *area);
int soft_set_xsave(struct vcpu *v, const uint8_t *area);
void soft_get_fpu(struct vcpu *v, struct kvm_fpu *fpu);
void soft_set_fpu(struct vcpu *v, const struct kvm_fpu *fpu);
void soft_set_cs_ip(struct vcpu *v, uint32_t vector);
void soft_load_segment(void *env, int index, uint16_t selector, uint64_t base, uint32_t limit,
                       uint32_t flags);
void soft_update_hflags(void *env);

/* overrides.c, corrections.c */
void update_mxcsr_status_x86_64(void *env);
int soft_is_dummy_of_ins(struct vcpu *v, uint64_t value, uintptr_t from);

/* code.c */
int soft_code(struct vcpu *v, int offset, uint8_t *byte);
int soft_opcode_offset(struct vcpu *v);

/* msr.c, cpuid.c */
int soft_msr_get(struct vcpu *v, uint32_t index, uint64_t *value, int host);
int soft_msr_set(struct vcpu *v, uint32_t index, uint64_t value, int host);
int soft_msr_list(struct kvm_msr_list *list);
int soft_cpuid_supported(struct kvm_cpuid2 *cpuid);
void soft_cpuid(struct vcpu *v, uint32_t leaf, uint32_t index, uint32_t out[4]);
void soft_cpuid_features(void *env);
uint64_t soft_tsc(struct vcpu *v);
void soft_set_tsc_khz(struct vcpu *v, uint64_t khz);
void soft_tsc_begin(void);
uint64_t soft_host_tsc_khz(void);

#endif
