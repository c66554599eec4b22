/* KVM_RUN: a vCPU takes its turn, runs until something happens, and says what. */

#define _GNU_SOURCE
#include "engine.h"
#include "chips_glue.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

__thread struct vcpu *now;
__thread struct glance soft_glance;
static __thread struct vcpu *entered;           /* for soft_kicked */
static __thread volatile sig_atomic_t kicked_outside;

/* ---- the library's instance ---- */

void soft_attend(struct vm *vm)
{
    atomic_store(&vm->attention, 1);
}

void soft_wake(struct vcpu *v)
{
    atomic_fetch_add(&v->wake, 1);
    syscall(SYS_futex, &v->wake, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    if (v->vm->loaded == v)
        soft_attend(v->vm);
}

/* A fault's handler finds RF set in the flags that the CPU pushes (Intel SDM 3B, 19.3.1.1); the
 * library forgets it. It clears RF itself for the handler. */
static void deliver_by_table(struct vm *vm)
{
    uint32_t vector = AT(vm->cpu, CPU_EXCEPTION_INDEX, uint32_t);
    enum { NO_FAULTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 8 | 1 << 18 };
    if (vector < 32 && !(NO_FAULTS >> vector & 1) && !AT(vm->env, ENV_IS_INT, int))
        AT(vm->env, ENV_EFLAGS, uint64_t) |= RF;
    lib.do_interrupt(vm->cpu);
}

/* An exception, in the library's loop: deliver it as the CPU does. */
static void deliver(void *uc, uint32_t vector, void *data)
{
    struct vm *vm = data;
    struct vcpu *v = now;
    (void)uc;
    (void)vector;
    AT(vm->uc, UC_SIZE_RECUR, int) = 0;
    if (v && AT(vm->env, ENV_IS_INT, int))
        AT(vm->env, ENV_EIP, uint64_t) = v->interrupted_eip;
    deliver_by_table(vm);
}

/* #UD, or a hypercall: the library has neither VMCALL nor, without SVM, VMMCALL. */
static bool invalid(void *uc, void *data)
{
    struct vm *vm = data;
    struct vcpu *v = now;
    (void)uc;
    if (v && soft_hypercall(v))
        return true;
    deliver_by_table(vm);
    return true;
}

/* A store to read-only memory is an access outside of memory. The registers are the instruction's
 * already. */
bool soft_store_to_rom(void *uc, int type, uint64_t at, int size, int64_t value, void *data)
{
    uint64_t bytes = value;
    (void)uc;
    (void)type;
    (void)data;
    if (now && !soft_is_dummy_of_ins(now, value, 0))
        soft_access(now, MMIO_WRITE, at, size, &bytes, 0);
    return true;
}

static const char *open_engine(struct vm *vm)
{
    uint64_t rip;
    size_t hook;
    lib.uc_ctl(vm->uc, UC_USE_EXITS, 1);        /* no address ends the run */
    if (lib.uc_reg_read(vm->uc, UC_REG_RIP, &rip))
        return "it has no RIP";
    vm->cpu = AT(vm->uc, UC_CPU, void *);
    if (!vm->cpu || AT(vm->cpu, CPU_ENV_PTR, void *) != (char *)vm->cpu + CPU_ENV)
        return "the CPU's structure has another layout";
    vm->env = (char *)vm->cpu + CPU_ENV;
    if (AT(vm->env, ENV_UC, void *) != vm->uc)
        return "the registers' structure has another layout";
    if (AT(vm->uc, UC_MEMORY_MAPPING, void *) != (void *)lib.find_mapping)
        return "the engine's structure has another layout";
    vm->mapping_ram = calloc(1, REGION_SIZE);
    vm->mapping_rom = calloc(1, REGION_SIZE);
    if (!vm->mapping_ram || !vm->mapping_rom)
        return "no memory";
    AT(vm->mapping_ram, REGION_PERMS, uint32_t) = UC_ALL;
    AT(vm->mapping_rom, REGION_PERMS, uint32_t) = 5;
    AT(vm->uc, UC_MEMORY_MAPPING, void *) = (void *)soft_memory_mapping;
    if (lib.uc_hook_add(vm->uc, &hook, UC_HOOK_INTR, deliver, vm, 1, 0)
        || lib.uc_hook_add(vm->uc, &hook, UC_HOOK_INVALID, invalid, vm, 1, 0))
        return "it refuses hooks";
    soft_cpuid_features(vm->env);
    AT(vm->cpu, CPU_INTERRUPT_REQUEST, uint32_t) = INTERRUPT_HARD;
    AT(vm->cpu, CPU_STOP, uint8_t) = AT(vm->cpu, CPU_STOPPED, uint8_t) = 0;
    memcpy(vm->fresh, vm->env, ENV_STATE);
    return NULL;
}

int soft_engine_new(struct vm *vm)
{
    if (lib.uc_open(UC_ARCH_X86, UC_MODE_64, &vm->uc))
        return -ENOMEM;
    pthread_mutex_init(&vm->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&vm->changed, &monotonic);
    if (open_engine(vm)) {
        soft_engine_free(vm);
        return -ENOMEM;
    }
    return 0;
}

void soft_engine_free(struct vm *vm)
{
    if (vm->uc)
        lib.uc_close(vm->uc);
    soft_memory_free(vm);
    free(vm->mapping_ram);
    free(vm->mapping_rom);
}

/* The turn must be held. */
void soft_engine_load(struct vcpu *v)
{
    struct vm *vm = v->vm;
    if (vm->loaded == v)
        return;
    if (vm->loaded)
        memcpy(vm->loaded->state, vm->env, ENV_STATE);
    memcpy(vm->env, v->state, ENV_STATE);
    vm->loaded = v;
    soft_order_pin_tlb(vm);
    lib.tlb_flush(vm->cpu);
}

/* ---- in the guest ---- */

void soft_leave(struct vcpu *v, int reason, uintptr_t from)
{
    v->exit_reason = reason;
    AT(v->vm->uc, UC_SIZE_RECUR, int) = 0;
    AT(v->vm->cpu, CPU_EXCEPTION_INDEX, int) = EXCP_INTERRUPT;
    if (from)
        lib.cpu_loop_exit_restore(v->vm->cpu, from);
    lib.cpu_loop_exit(v->vm->cpu);
}

static int can_interrupt(void *env)
{
    return AT(env, ENV_EFLAGS, uint64_t) >> 9 & 1
           && !(AT(env, ENV_HFLAGS, uint32_t) & HF_INHIBIT_IRQ);
}

/* An event that KVM_SET_VCPU_EVENTS left to be delivered. */
static int deliver_set_event(struct vcpu *v)
{
    struct kvm_vcpu_events *e = &v->injected;
    void *env = v->vm->env;
    if (e->exception.injected) {
        AT(v->vm->cpu, CPU_EXCEPTION_INDEX, int) = e->exception.nr;
        AT(env, ENV_ERROR_CODE, int) = e->exception.error_code;
        AT(env, ENV_IS_INT, int) = 0;
        e->exception.injected = 0;
        lib.do_interrupt(v->vm->cpu);
        AT(v->vm->cpu, CPU_EXCEPTION_INDEX, int) = -1;
        return 1;
    }
    if (e->interrupt.injected) {
        e->interrupt.injected = 0;
        lib.do_hardware_interrupt(env, e->interrupt.nr, 1);
        return 1;
    }
    return 0;
}

/* Returns whether something was delivered. What is to stop the run is looked at first. */
bool soft_between_blocks(struct vcpu *v)
{
    struct vm *vm = v->vm;
    void *env = vm->env;
    if (v->replay == REPLAY_WANTED) {
        v->replay = REPLAY_ARMED;
        v->position = 0;
        AT(vm->cpu, CPU_CFLAGS_NEXT, uint32_t) = 1;     /* a block of one instruction */
        soft_attend(vm);
        return false;
    }
    if (v->replay != NOT_REPLAYING) {
        v->replay = NOT_REPLAYING;
        v->count = v->position = 0;
    }
    if (atomic_load_explicit(&vm->attention, memory_order_relaxed)
        || vm->order.ns >= vm->order.look) {
        atomic_store(&vm->attention, 0);
        if (atomic_load(&vm->has_stale))
            soft_memory_refresh(vm);
        if (soft_order_tail(v)) {
            soft_attend(vm);
            return true;        /* not chained to the block before, which goes on to a whole one */
        }
        if (v->exit_reason || v->stop || atomic_load(&v->kicked) || atomic_load(&vm->preempt)
            || soft_order_stops(v)
            || (atomic_load(&vm->waiting) && soft_now_ns() - vm->since > SLICE_NS)) {
            AT(vm->cpu, CPU_EXIT_REQUEST, uint8_t) = 1;
            return false;
        }
    }
    if (vm->has_chips)
        soft_glue_timers(v, 0);
    if (v->injected.exception.injected || v->injected.interrupt.injected)
        return deliver_set_event(v);
    if (vm->has_chips && soft_glue_startup_due(v)) {
        AT(vm->cpu, CPU_EXIT_REQUEST, uint8_t) = 1;     /* INIT stops it wherever it is */
        return false;
    }
    if (vm->has_chips && !(AT(env, ENV_HFLAGS2, uint32_t) & HF2_NMI)
        && !(AT(env, ENV_HFLAGS, uint32_t) & HF_INHIBIT_IRQ) && soft_glue_take_nmi(v)) {
        AT(env, ENV_HFLAGS2, uint32_t) |= HF2_NMI;
        lib.do_hardware_interrupt(env, 2, 1);
        return true;
    }
    if (vm->has_chips && can_interrupt(env) && soft_glue_due(v)) {
        int vector = soft_glue_take(v);
        if (vector >= 0) {
            lib.do_hardware_interrupt(env, vector, 1);
            return true;
        }
    }
    return false;
}

/* Guest memory can be a file that somebody has cut off: then the kernel has no page for an access,
 * and sends SIGBUS. KVM_RUN returns -EFAULT in that case, and so does this. */

static struct sigaction other_fault;

__thread sigjmp_buf *soft_guard;

static int is_guests(struct vm *vm, uint8_t *host)
{
    for (int i = 0; i < MOST_SLOTS; i++)
        if (vm->slots[i].size && (uint64_t)(host - vm->slots[i].host) < vm->slots[i].size)
            return 1;
    return 0;
}

static void fault(int signal, siginfo_t *info, void *context)
{
    struct vcpu *v = now;
    if (soft_guard)
        siglongjmp(*soft_guard, 1);     /* which brings the signal mask back, too */
    if (v && is_guests(v->vm, info->si_addr)) {
        sigset_t this;
        sigemptyset(&this);
        sigaddset(&this, signal);
        pthread_sigmask(SIG_UNBLOCK, &this, NULL);
        v->lacks_memory = 1;
        soft_leave(v, KVM_EXIT_INTERNAL_ERROR,
#ifdef __x86_64__
                   ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP]
#else
                   0
#endif
        );
    }
    if (other_fault.sa_flags & SA_SIGINFO)
        other_fault.sa_sigaction(signal, info, context);
    else if (other_fault.sa_handler != SIG_DFL && other_fault.sa_handler != SIG_IGN)
        other_fault.sa_handler(signal);
    else
        sigaction(signal, &other_fault, NULL);      /* the access is made again, and ends us */
}

void soft_catch_faults(void)
{
    struct sigaction ours = { .sa_sigaction = fault, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    sigaction(SIGBUS, &ours, &other_fault);
}

/* One stay in the guest. */
static void execute(struct vcpu *v)
{
    struct vm *vm = v->vm;
    now = v;
    soft_glance = (struct glance){ vm->uc, &vm->attention, &vm->order };
    soft_engine_load(v);
    AT(vm->uc, UC_NESTED, int) = 1;
    AT(vm->uc, UC_INVALID_ERROR, int) = 0;
    AT(vm->uc, UC_SIZE_RECUR, int) = 0;
    AT(vm->uc, UC_STOP_REQUEST, uint8_t) = AT(vm->uc, UC_QUIT_REQUEST, uint8_t) = 0;
    AT(vm->cpu, CPU_HALTED, uint32_t) = 0;
    AT(vm->cpu, CPU_EXCEPTION_INDEX, int) = -1;
    AT(vm->cpu, CPU_EXIT_REQUEST, uint8_t) = AT(vm->cpu, CPU_TCG_EXIT, uint8_t) = 0;
    AT(vm->cpu, CPU_INTERRUPT_REQUEST, uint32_t) = INTERRUPT_HARD;
    AT(vm->cpu, CPU_CFLAGS_NEXT, uint32_t) = -1;
    if (!(soft_without & WITHOUT_EARLY_STOP))
        soft_attend(vm);    /* whatever asked for attention before now, another may have cleared it */
    else
        atomic_store(&vm->attention, 0);
    lib.cpu_exec(vm->uc, vm->cpu);
    AT(vm->uc, UC_NESTED, int) = 0;
    if (v->replay != NOT_REPLAYING && !v->pending) {
        v->replay = REPLAY_WANTED;      /* the library gave up the block: it had no room for it */
    }
    if (AT(vm->uc, UC_INVALID_ERROR, int) && !v->exit_reason)
        v->exit_reason = KVM_EXIT_INTERNAL_ERROR;
    now = NULL;
    soft_glance.uc = NULL;
}

/* ---- KVM_RUN ---- */

void soft_kicked(void)
{
    struct vcpu *v = entered;
    if (!v) {
        kicked_outside = 1;
        return;
    }
    atomic_store(&v->kicked, 1);
    atomic_fetch_add(&v->wake, 1);
    atomic_store(&v->vm->attention, 1);
}

/* May a halted vCPU go on? The turn must be held. */
static int has_work(struct vcpu *v)
{
    void *env = env_of(v);
    return soft_glue_has_nmi(v) || v->injected.interrupt.injected || v->injected.exception.injected
           || (AT(env, ENV_EFLAGS, uint64_t) >> 9 & 1 && soft_glue_due(v));
}

static void sleep_until_woken(struct vcpu *v, uint32_t seen, const struct timespec *most)
{
    syscall(SYS_futex, &v->wake, FUTEX_WAIT_PRIVATE, seen, most, NULL, 0);
}

/* INIT and SIPI, and the end of a halt. Returns whether the vCPU can run. */
static int is_runnable(struct vcpu *v, int at_entry)
{
    if (v->vm->has_chips) {
        soft_glue_timers(v, at_entry);
        soft_glue_startup(v);
    }
    if (v->mp_state == KVM_MP_STATE_HALTED && v->vm->has_chips && has_work(v))
        v->mp_state = KVM_MP_STATE_RUNNABLE;
    return v->mp_state == KVM_MP_STATE_RUNNABLE;
}

int soft_is_runnable(struct vcpu *v)
{
    return is_runnable(v, 0);
}

static void record_exit(struct vcpu *v)
{
    struct access *a = v->pending == ACCESS_PENDING ? &v->accesses[v->count - 1] : NULL;
    soft_order_record(v, RECORD_EXIT, v->exit_reason | (a ? (uint64_t)a->size << 32 : 0),
                      a ? a->at : 0, a && a->kind & 1 ? a->value : 0);
}

static void exits(struct vcpu *v)
{
    struct kvm_run *run = v->run;
    run->exit_reason = v->exit_reason;
    run->if_flag = AT(env_of(v), ENV_EFLAGS, uint64_t) >> 9 & 1;
    run->ready_for_interrupt_injection = 0;
    if (v->exit_reason == KVM_EXIT_INTERNAL_ERROR) {
        run->internal.suberror = KVM_INTERNAL_ERROR_EMULATION;
        run->internal.ndata = 0;
    }
    if (!v->pending) {
        v->replay = NOT_REPLAYING;
        v->count = v->position = 0;
    }
    if (run->exit_reason != KVM_EXIT_INTR)
        record_exit(v);
    v->exit_reason = 0;
}

/* A stay in the guest, and what it has led to. Returns 1 with an exit in kvm_run, 0 if the vCPU goes
 * on, or -EFAULT. */
static int stay(struct vcpu *v, int stop)
{
    v->stop = stop;                     /* only the instruction in hand */
    execute(v);
    if (v->exit_reason == KVM_EXIT_HLT && v->vm->has_chips) {
        v->mp_state = KVM_MP_STATE_HALTED;
        v->exit_reason = 0;
    }
    if (v->lacks_memory) {
        v->lacks_memory = v->exit_reason = 0;
        return -EFAULT;
    }
    if (!v->exit_reason)
        return 0;
    exits(v);
    return 1;
}

/* These return 1 with an exit in kvm_run, -EINTR, or -EFAULT. */
static int run(struct vcpu *v)
{
    struct vm *vm = v->vm;
    int at_entry = v->run->immediate_exit, woken = 0;
    for (int first = 1;; first = 0) {
        uint32_t seen = atomic_load(&v->wake);
        int stop = at_entry || atomic_load(&v->kicked), answer = 0;
        if (stop && v->replay == NOT_REPLAYING && v->pending == NOTHING)
            return -EINTR;
        soft_turn_take(vm, woken);
        if (v->pending == HYPERCALL_PENDING)
            soft_hypercall_answered(v);
        int sleeps = v->replay == NOT_REPLAYING && !stop && !is_runnable(v, first);
        if (stop && v->replay == NOT_REPLAYING)
            answer = -EINTR;
        else if (!sleeps)
            answer = stay(v, stop);
        soft_turn_give(vm);
        if (answer)
            return answer;
        if (sleeps)
            sleep_until_woken(v, seen, NULL);
        woken = sleeps;                 /* by an interrupt: somebody may wait for the answer */
    }
}

/* The same in a deterministic run (order.c). The exit may also be KVM_EXIT_INTR: the host is to
 * settle. */
static int run_in_order(struct vcpu *v)
{
    struct vm *vm = v->vm;
    int at_entry = v->run->immediate_exit;
    for (int first = 1;; first = 0) {
        uint32_t seen = atomic_load(&v->wake);
        int stop = at_entry || atomic_load(&v->kicked), answer = 0;
        enum step step = STEP_RUN;
        soft_turn_take(vm, 1);
        if (first)
            soft_order_enter(v);
        if (v->pending == HYPERCALL_PENDING)
            soft_hypercall_answered(v);
        if (stop && v->replay == NOT_REPLAYING) {
            answer = -EINTR;
        } else if (stop || (step = soft_order_step(v)) == STEP_RUN) {
            answer = stay(v, stop);
        } else if (step == STEP_SETTLE) {
            v->exit_reason = KVM_EXIT_INTR;
            exits(v);
            answer = 1;
        }
        if (answer)
            soft_order_leave(v);
        soft_turn_give(vm);
        if (answer)
            return answer;
        struct timespec glance = { .tv_nsec = SLICE_NS };
        if (step != STEP_RUN)
            sleep_until_woken(v, seen, step == STEP_WAIT ? NULL : &glance);
    }
}

int soft_vcpu_run(struct vcpu *v)
{
    if (v->mp_state == KVM_MP_STATE_UNINITIALIZED && !v->vm->has_chips)
        v->mp_state = KVM_MP_STATE_RUNNABLE;
    entered = v;
    if (kicked_outside) {
        kicked_outside = 0;
        atomic_store(&v->kicked, !(soft_without & WITHOUT_EARLY_STOP));
    }
    if (v->pending == ACCESS_PENDING)
        soft_access_answered(v);
    int answer = v->vm->order.on ? run_in_order(v) : run(v);
    if (answer == -EINTR)
        v->run->exit_reason = KVM_EXIT_INTR;
    if (answer < 0)
        atomic_store(&v->kicked, 0);
    entered = NULL;
    return answer < 0 ? answer : 0;
}

/* ---- the self-check ---- */

static int resumed;

OVERRIDE void resume_all_vcpus_x86_64(void *uc)
{
    if (resumed == -1)
        resumed = AT(uc, UC_NESTED, int);
    else
        lib.resume_all(uc);
}

static const char *differs(struct vm *vm)
{
    void *uc = vm->uc, *env = vm->env;
    uint64_t value = 0x1122334455667788, rip = 0x1000;
    if (lib.uc_reg_write(uc, UC_REG_RIP, &value) || AT(env, ENV_EIP, uint64_t) != value)
        return "RIP lies elsewhere";
    AT(env, ENV_MXCSR, uint32_t) = 0x9fc0;      /* FTZ, DAZ */
    lib.update_mxcsr_status(env);
    if (AT(env, ENV_SSE_STATUS + STATUS_DAZ, uint8_t) != 1
        || AT(env, ENV_FP_STATUS + STATUS_FTZ, uint8_t) != 1)
        return "its status of floating point lies elsewhere";
    resumed = -1;
    lib.uc_emu_start(uc, rip, 0, 0, 0);
    int nested = resumed;
    resumed = 0;
    if (nested == -1)
        return "its calls are not bound to the engine's definitions";
    if (nested != 1 || AT(uc, UC_NESTED, int) != 0)
        return "its nesting level lies elsewhere";
    return NULL;
}

const char *soft_engine_verify(void *uc)
{
    struct vm vm = { .uc = uc };
    const char *wrong = open_engine(&vm);
    if (!wrong)
        wrong = differs(&vm);
    free(vm.mapping_ram);
    free(vm.mapping_rom);
    return wrong;
}
