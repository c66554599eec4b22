/* The library's functions that the engine replaces, by their own names.
 *
 * The library's calls to these are bound to these definitions (library.h). Each acts only for the
 * vCPU that this thread executes (`now`), and is the original for everybody else.
 *
 * Four groups: when to stop; code that changes; accesses outside of memory; instructions that the
 * library leaves to its user. Those that it does wrong are in corrections.c. */

#include "engine.h"
#include "chips_glue.h"

#include <stdio.h>
#include <stdlib.h>

/* Is this engine the one that this thread runs? */
static struct vcpu *mine(void *uc)
{
    struct vcpu *v = now;
    return v && v->vm->uc == uc ? v : NULL;
}

/* For the tests of the cures: each bit takes one away, and its test must fail then. */
unsigned soft_without;

void soft_take_away(unsigned cures)
{
    soft_without = cures;
}

/* ---- when to stop ---- */

/* After each load and store the library calls a helper that honours a stop by going back to the
 * start of the instruction, whose store is done already: it is done twice (trap 1). So that call
 * is not generated. The one at each block's start remains; nothing of the block is done there. */
OVERRIDE void check_exit_request_x86_64(void *context)
{
    if (!now || soft_without & WITHOUT_WHOLE_BLOCKS)
        lib.generate_check(context);
}

/* At the start of each block. `attention` is ours: unlike the library's own flags, nobody else
 * clears it, so a stop is not lost however early it comes (trap 4). */
OVERRIDE void helper_check_exit_request_x86_64(void *uc, uint32_t in_delay_slot)
{
    struct glance *g = &soft_glance;
    if (__builtin_expect(g->uc != uc, 0)) {
        lib.check(uc, in_delay_slot);
        return;
    }
    struct order *o = g->order;
    if (__builtin_expect(!atomic_load_explicit(g->attention, memory_order_relaxed), 1)
        && o->ns < o->look) {
        o->ns += BLOCK_NS;
        return;
    }
    struct vcpu *v = now;
    if (v->replay == REPLAY_ARMED) {
        v->replay = REPLAY_RUNS;        /* the instruction in hand; the next block is too far */
        o->ns += BLOCK_NS;
        return;
    }
    if (o->tail == TAIL_ARMED) {
        o->tail = TAIL_RAN;
        o->ns += BLOCK_NS;
        return;
    }
    v->is_at_start = 1;
    lib.cpu_loop_exit_restore(v->vm->cpu, FROM);
}

/* The library comes by here before each block that is not chained to the one before, because
 * INTERRUPT_HARD is always set. */
OVERRIDE bool x86_cpu_exec_interrupt_x86_64(void *cpu, int request)
{
    struct vcpu *v = now;
    if (!v || v->vm->cpu != cpu)
        return lib.exec_interrupt(cpu, request);
    return soft_between_blocks(v);
}

OVERRIDE void qemu_system_reset_request(void *uc)
{
    struct vcpu *v = mine(uc);
    if (v)
        v->exit_reason = KVM_EXIT_SHUTDOWN;     /* a triple fault */
    else
        lib.reset_request(uc);
}

/* All of the library's flushes come by here. */
OVERRIDE void tlb_flush_by_mmuidx_x86_64(void *cpu, uint16_t modes)
{
    if (now && now->vm->cpu == cpu)
        soft_order_pin_tlb(now->vm);
    lib.tlb_flush_modes(cpu, modes);
}

OVERRIDE void tlb_flush_page_by_mmuidx_x86_64(void *cpu, uint64_t at, uint16_t modes)
{
    if (now && now->vm->cpu == cpu)
        soft_order_pin_tlb(now->vm);    /* a page in a huge one flushes all */
    lib.tlb_flush_page_modes(cpu, at, modes);
}

/* The library gives up, for example on a guest without a task register. The guest ends then, and not
 * the process. */
OVERRIDE __attribute__((noreturn)) void cpu_abort_x86_64(void *cpu, const char *why, ...)
{
    struct vcpu *v = now;
    if (v && v->vm->cpu == cpu)
        soft_leave(v, KVM_EXIT_INTERNAL_ERROR, 0);
    fprintf(stderr, "unicorn: %s\n", why);
    abort();
}

/* ---- code that changes ---- */

static uint64_t bit(struct slot *s, uint64_t ram)
{
    return 1ULL << ((ram - s->ram) / PAGE % 64);
}

static uint64_t *word(uint64_t *bits, struct slot *s, uint64_t ram)
{
    return &bits[(ram - s->ram) / PAGE / 64];
}

OVERRIDE void tlb_protect_code_x86_64(void *uc, uint64_t ram)
{
    struct vcpu *v = mine(uc);
    struct slot *s = v ? soft_slot_of_ram(v->vm, ram) : NULL;
    lib.tlb_protect_code(uc, ram);
    if (!s || soft_without & WITHOUT_PROTECTION)
        return;
    __atomic_fetch_or(word(s->code, s, ram), bit(s, ram), __ATOMIC_SEQ_CST);
    lib.tlb_reset_dirty(v->vm->cpu, (uint64_t)s->host + ((ram - s->ram) & ~(uint64_t)(PAGE - 1)),
                        PAGE);
}

/* After each block that it translates, the library looks through the whole TLB for entries of the
 * block's page that are dirty, by the virtual address. The two cures leave none: the page's first
 * block has protected it under every address, and since then no entry has become dirty. */
OVERRIDE void tlb_reset_dirty_by_vaddr_x86_64(void *cpu, uint64_t start, uint64_t length)
{
    struct vcpu *v = now;
    if (!v || v->vm->cpu != cpu || soft_without & (WITHOUT_PROTECTION | WITHOUT_REFUSAL))
        lib.tlb_reset_dirty_by_vaddr(cpu, start, length);
}

OVERRIDE void tlb_unprotect_code_x86_64(void *uc, uint64_t ram)
{
    struct vcpu *v = mine(uc);
    struct slot *s = v ? soft_slot_of_ram(v->vm, ram) : NULL;
    lib.tlb_unprotect_code(uc, ram);
    if (s)
        __atomic_fetch_and(word(s->code, s, ram), ~bit(s, ram), __ATOMIC_SEQ_CST);
}

/* Each slow store comes by here before it is made, and by tlb_set_dirty when its page may become
 * fast. */
OVERRIDE void tb_invalidate_phys_page_fast_x86_64(void *uc, void *pages, uint64_t ram, int length,
                                                  uintptr_t from)
{
    struct vcpu *v = mine(uc);
    struct slot *s = v ? soft_slot_of_ram(v->vm, ram) : NULL;
    if (s) {
        v->vm->stored_at = ram;
        if (s->dirty)
            *word(s->dirty, s, ram) |= bit(s, ram);
    }
    lib.invalidate_fast(uc, pages, ram, length, from);
}

OVERRIDE void tlb_set_dirty_x86_64(void *cpu, uint64_t address)
{
    struct vcpu *v = now;
    if (v && v->vm->cpu == cpu) {
        struct slot *s = soft_slot_of_ram(v->vm, v->vm->stored_at);
        if (s && !(soft_without & WITHOUT_REFUSAL)
            && *word(s->code, s, v->vm->stored_at) & bit(s, v->vm->stored_at))
            return;
    }
    lib.tlb_set_dirty(cpu, address);
}

/* The accessed and dirty bits of page tables. */
OVERRIDE void x86_stl_phys_notdirty_x86_64(void *cpu, uint64_t at, uint32_t value)
{
    struct vcpu *v = now;
    if (v && v->vm->cpu == cpu) {
        struct slot *s = soft_slot_at(v->vm, at);
        if (s)
            soft_memory_mark(s, at - s->gpa, 4);
        if (!s || s->flags & KVM_MEM_READONLY)
            return;
    }
    lib.store_phys(cpu, at, value);
}

/* ---- accesses outside of memory ---- */

OVERRIDE int memory_region_dispatch_read_x86_64(void *uc, void *region, uint64_t at,
                                                uint64_t *value, int op, uint64_t attrs)
{
    struct vcpu *v = mine(uc);
    if (!v)
        return lib.dispatch_read(uc, region, at, value, op, attrs);
    uintptr_t from = AT(v->vm->cpu, CPU_MEM_IO_PC, uintptr_t);
    if (!from)
        soft_leave(v, KVM_EXIT_INTERNAL_ERROR, 0);      /* code there is nothing we can run */
    *value = 0;
    soft_access(v, MMIO_READ, at, 1 << (op & 3), value, from);
    return 0;
}

/* INS stores a zero first, so that a fault comes before the port is read. A device must not see
 * that. `from` leads to RIP. */
int soft_is_dummy_of_ins(struct vcpu *v, uint64_t value, uintptr_t from)
{
    if (value)
        return 0;
    for (int i = 0; i < v->position; i++)
        if (v->accesses[i].kind == PORT_IN)
            return 0;
    if (from)
        lib.cpu_restore_state(v->vm->cpu, from, false);
    uint8_t opcode = 0;
    int at = soft_opcode_offset(v);
    return at >= 0 && !soft_code(v, at, &opcode) && (opcode == 0x6c || opcode == 0x6d);
}

OVERRIDE int memory_region_dispatch_write_x86_64(void *uc, void *region, uint64_t at,
                                                 uint64_t value, int op, uint64_t attrs)
{
    struct vcpu *v = mine(uc);
    if (!v)
        return lib.dispatch_write(uc, region, at, value, op, attrs);
    uintptr_t from = AT(v->vm->cpu, CPU_MEM_IO_PC, uintptr_t);
    if (!soft_is_dummy_of_ins(v, value, from))
        soft_access(v, MMIO_WRITE, at, 1 << (op & 3), &value, from);
    return 0;
}

/* The library makes an unaligned load of two aligned ones, and an unaligned store of single bytes.
 * A device must see what the guest does: one access, or one for each page. */
static int is_outside(struct vcpu *v, uint64_t at, uint32_t oi, int access, uint64_t *physical)
{
    return lib.to_physical(v->vm->env, at, access, oi & 15, physical)
           && !soft_slot_at(v->vm, *physical);
}

/* Is an unaligned access at least partly outside of memory? */
static int needs_parts(struct vcpu *v, uint64_t at, unsigned size, uint32_t oi, int access)
{
    uint64_t ignored, end = at + size - 1;
    return is_outside(v, at, oi, access, &ignored)
           || ((at ^ end) / PAGE && is_outside(v, end & ~(uint64_t)(PAGE - 1), oi, access, &ignored)
               && lib.to_physical(v->vm->env, at, access, oi & 15, &ignored));
}

static uint64_t load_parts(struct vcpu *v, uint64_t at, unsigned size, uint32_t oi, uintptr_t from)
{
    uint64_t value = 0, physical;
    for (unsigned done = 0, part; done < size; done += part) {
        uint64_t here = at + done, bytes = 0;
        unsigned room = PAGE - here % PAGE;
        part = size - done < room ? size - done : room;
        if (is_outside(v, here, oi, 0, &physical))
            soft_access(v, MMIO_READ, physical, part, &bytes, from);
        else
            for (unsigned i = 0; i < part; i++)
                bytes |= (lib.load1(v->vm->env, here + i, oi & 15, from) & 255) << 8 * i;
        value |= bytes << 8 * done;
    }
    return value;
}

static void store_parts(struct vcpu *v, uint64_t at, uint64_t value, unsigned size, uint32_t oi,
                        uintptr_t from)
{
    uint64_t physical;
    for (unsigned done = 0, part; done < size; done += part) {
        uint64_t here = at + done, bytes = value >> 8 * done;
        unsigned room = PAGE - here % PAGE;
        part = size - done < room ? size - done : room;
        if (is_outside(v, here, oi, 1, &physical)) {
            if (part < 8)
                bytes &= (1ULL << 8 * part) - 1;
            if (!soft_is_dummy_of_ins(v, value, from))
                soft_access(v, MMIO_WRITE, physical, part, &bytes, from);
        } else {
            for (unsigned i = 0; i < part; i++)
                lib.store1(v->vm->env, here + i, bytes >> 8 * i & 255, oi & 15, from);
        }
    }
}

#define UNALIGNED(size, access) \
    (at % (size) && now && now->vm->env == env && needs_parts(now, at, size, oi, access))

#define OVERRIDE_LOAD(name, size, call, type) \
    OVERRIDE uint64_t name LOAD \
    { \
        if (UNALIGNED(size, 0)) \
            return (uint64_t)(type)load_parts(now, at, size, oi, from); \
        return (uint64_t)(type)lib.call(env, at, oi, from); \
    }
/* The library never lets a page that may be executed become fast for stores. Here it does so if the
 * page holds no code: tlb_protect_code will take that back. */
static void quicken(struct vcpu *v, uint64_t at)
{
    uint64_t ram = v->vm->stored_at;
    struct slot *s = soft_slot_of_ram(v->vm, ram);
    if (s && !(*word(s->code, s, ram) & bit(s, ram)))
        lib.tlb_set_dirty(v->vm->cpu, at);
}

#define OVERRIDE_STORE(name, size, call) \
    OVERRIDE void name STORE \
    { \
        struct vcpu *v = now; \
        if (!v || v->vm->env != env) { \
            lib.call(env, at, value, oi, from); \
            return; \
        } \
        v->vm->stored_at = ~0ULL; \
        if (UNALIGNED(size, 1)) \
            store_parts(v, at, value, size, oi, from); \
        else \
            lib.call(env, at, value, oi, from); \
        if (v->vm->stored_at != ~0ULL && at / PAGE == (at + (size) - 1) / PAGE) \
            quicken(v, at); \
    }
OVERRIDE_STORE(helper_ret_stb_mmu_x86_64, 1, store1)
OVERRIDE_LOAD(helper_le_lduw_mmu_x86_64, 2, load2, uint16_t)
OVERRIDE_LOAD(helper_le_ldsw_mmu_x86_64, 2, load2, int16_t)
OVERRIDE_LOAD(helper_le_ldul_mmu_x86_64, 4, load4, uint32_t)
OVERRIDE_LOAD(helper_le_ldsl_mmu_x86_64, 4, load4, int32_t)
OVERRIDE_LOAD(helper_le_ldq_mmu_x86_64, 8, load8, uint64_t)
OVERRIDE_STORE(helper_le_stw_mmu_x86_64, 2, store2)
OVERRIDE_STORE(helper_le_stl_mmu_x86_64, 4, store4)
OVERRIDE_STORE(helper_le_stq_mmu_x86_64, 8, store8)

/* The library does not look at the task's I/O permission bitmap. */
static void check_port(struct vcpu *v, uint32_t port, unsigned size, uintptr_t from)
{
    void *env = v->vm->env;
    unsigned cpl = AT(env, ENV_HFLAGS, uint32_t) & HF_CPL;
    uint64_t flags = AT(env, ENV_EFLAGS, uint64_t);
    if (!(AT(env, ENV_CR, uint64_t) & 1) || (cpl <= (flags >> 12 & 3) && !(flags >> 17 & 1)))
        return;
    uint64_t base = AT(env, ENV_TR + SEG_BASE, uint64_t);
    uint32_t limit = AT(env, ENV_TR + SEG_LIMIT, uint32_t);
    if (limit >= 103) {
        uint32_t map = lib.load2_at(env, base + 102, 2, from) + port / 8;
        if (map + 1 <= limit
            && !(lib.load2_at(env, base + map, 2, from) >> port % 8 & ((1 << size) - 1)))
            return;
    }
    lib.raise(env, 13, 0, from);
}

static uint64_t port_in(void *env, uint32_t port, unsigned size, uintptr_t from)
{
    uint64_t value = 0;
    struct vcpu *v = now;
    if (v && v->vm->env == env) {
        check_port(v, port & 0xffff, size, from);
        soft_access(v, PORT_IN, port & 0xffff, size, &value, from);
    }
    return value;
}

static void port_out(void *env, uint32_t port, uint64_t value, unsigned size, uintptr_t from)
{
    struct vcpu *v = now;
    if (v && v->vm->env == env) {
        check_port(v, port & 0xffff, size, from);
        value &= (1ULL << 8 * size) - 1;
        soft_access(v, PORT_OUT, port & 0xffff, size, &value, from);
    }
}

OVERRIDE uint64_t helper_inb_x86_64(void *env, uint32_t port) { return port_in(env, port, 1, FROM); }
OVERRIDE uint64_t helper_inw_x86_64(void *env, uint32_t port) { return port_in(env, port, 2, FROM); }
OVERRIDE uint64_t helper_inl_x86_64(void *env, uint32_t port) { return port_in(env, port, 4, FROM); }
OVERRIDE void helper_outb_x86_64(void *env, uint32_t port, uint32_t value)
{
    port_out(env, port, value, 1, FROM);
}
OVERRIDE void helper_outw_x86_64(void *env, uint32_t port, uint32_t value)
{
    port_out(env, port, value, 2, FROM);
}
OVERRIDE void helper_outl_x86_64(void *env, uint32_t port, uint32_t value)
{
    port_out(env, port, value, 4, FROM);
}

/* ---- instructions that the library leaves to its user ---- */

OVERRIDE void helper_cpuid_x86_64(void *env)
{
    uint32_t out[4] = { 0 };
    if (now && now->vm->env == env)
        soft_cpuid(now, REG(0), REG(1), out);
    REG(0) = out[0];
    REG(3) = out[1];
    REG(1) = out[2];
    REG(2) = out[3];
}

OVERRIDE void helper_rdtsc_x86_64(void *env)
{
    if (AT(env, ENV_CR + 32, uint64_t) & 4 && AT(env, ENV_HFLAGS, uint32_t) & HF_CPL)
        lib.raise(env, 13, 0, FROM);
    uint64_t tsc = now ? soft_tsc(now) : 0;
    REG(0) = (uint32_t)tsc;
    REG(2) = tsc >> 32;
}

OVERRIDE void helper_rdtscp_x86_64(void *env)
{
    if (AT(env, ENV_CR + 32, uint64_t) & 4 && AT(env, ENV_HFLAGS, uint32_t) & HF_CPL)
        lib.raise(env, 13, 0, FROM);
    uint64_t tsc = now ? soft_tsc(now) : 0;
    REG(0) = (uint32_t)tsc;
    REG(2) = tsc >> 32;
    REG(1) = AT(env, ENV_TSC_AUX, uint32_t);
}

/* In a deterministic run the seed makes the random numbers. */
OVERRIDE uint64_t helper_rdrand_x86_64(void *env)
{
    if (!now || now->vm->env != env || !now->vm->order.on)
        return lib.rdrand(env);
    AT(env, ENV_CC_SRC, uint64_t) = 1;
    return soft_order_entropy(now->vm);
}

static int is_filtered(struct vm *vm, uint32_t index, uint32_t way)
{
    if (!(vm->user_msrs & KVM_MSR_EXIT_REASON_FILTER) || !vm->filter_count
        || (index >= 0x800 && index <= 0x8ff))
        return 0;
    for (int i = 0; i < vm->filter_count; i++) {
        struct msr_range *r = &vm->filter[i];
        if (r->flags & way && index - r->first < r->count)
            return !(r->bits[(index - r->first) / 8] >> (index - r->first) % 8 & 1);
    }
    return vm->filter_default_deny;
}

OVERRIDE void helper_rdmsr_x86_64(void *env)
{
    struct vcpu *v = now;
    uint32_t index = REG(1);
    uint64_t value = 0;
    if (v && is_filtered(v->vm, index, KVM_MSR_FILTER_READ))
        soft_access(v, MSR_READ, index, 8, &value, FROM);
    else if (!v || soft_msr_get(v, index, &value, 0))
        lib.raise(env, 13, 0, FROM);
    REG(0) = (uint32_t)value;
    REG(2) = value >> 32;
}

OVERRIDE void helper_wrmsr_x86_64(void *env)
{
    struct vcpu *v = now;
    uint32_t index = REG(1);
    uint64_t value = REG(2) << 32 | (uint32_t)REG(0);
    if (v && is_filtered(v->vm, index, KVM_MSR_FILTER_WRITE))
        soft_access(v, MSR_WRITE, index, 8, &value, FROM);
    else if (!v || soft_msr_set(v, index, value, 0))
        lib.raise(env, 13, 0, FROM);
    if (v)
        soft_attend(v->vm);     /* it may have been an APIC's register */
}

OVERRIDE uint64_t helper_read_crN_x86_64(void *env, int n)
{
    return n == 8 ? (now ? soft_get_cr8(now) : 0) : AT(env, ENV_CR + 8 * n, uint64_t);
}

OVERRIDE void helper_write_crN_x86_64(void *env, int n, uint64_t value)
{
    switch (n) {
    case 0:
        if (value >> 32 || (value >> 31 & 1 && !(value & 1)) || (value >> 29 & 1
            && !(value >> 30 & 1)))
            lib.raise(env, 13, 0, FROM);
        lib.update_cr0(env, value);
        break;
    case 3:
        lib.update_cr3(env, value & ~(1ULL << 63));
        break;
    case 4:
        if (value & ~0x3507ffULL)
            lib.raise(env, 13, 0, FROM);
        lib.update_cr4(env, value);
        break;
    case 8:
        if (value >> 4)
            lib.raise(env, 13, 0, FROM);
        if (now) {
            soft_set_cr8(now, value);
            soft_attend(now->vm);
        }
        break;
    default:
        AT(env, ENV_CR + 8 * n, uint64_t) = value;
    }
}

/* Debug registers are kept, but no breakpoint is made of them: the library's list of breakpoints
 * is one for all vCPUs. */
OVERRIDE void helper_set_dr_x86_64(void *env, int n, uint64_t value)
{
    n = n == 4 ? 6 : n == 5 ? 7 : n;
    AT(env, ENV_DR + 8 * n, uint64_t) = n == 6 ? value | 0xffff0ff0 : n == 7 ? value | 0x400 : value;
}

OVERRIDE uint64_t helper_get_dr_x86_64(void *env, int n)
{
    n = n == 4 ? 6 : n == 5 ? 7 : n;
    return AT(env, ENV_DR + 8 * n, uint64_t);
}

/* XCR0: x87 and SSE are all that there is. */
OVERRIDE void helper_xsetbv_x86_64(void *env, uint32_t index, uint64_t value)
{
    if (!(AT(env, ENV_CR + 32, uint64_t) >> 18 & 1))
        lib.raise(env, 6, 0, FROM);
    if (index || !(value & 1) || value & ~3ULL)
        lib.raise(env, 13, 0, FROM);
    AT(env, ENV_XCR0, uint64_t) = value;
}

/* Intel SDM 2B, SYSCALL. RIP is the instruction's, and the block ends after this. */
OVERRIDE void helper_syscall_x86_64(void *env, int length)
{
    enum { CODE64 = 0xa09b00, CODE32 = 0xc09b00, DATA = 0xc09300 };
    if (!(AT(env, ENV_EFER, uint64_t) & 1))
        lib.raise(env, 6, 0, FROM);
    uint64_t star = AT(env, ENV_STAR, uint64_t), eip = AT(env, ENV_EIP, uint64_t) + length;
    uint16_t selector = (star >> 32 & 0xfffc);
    uint32_t hflags = AT(env, ENV_HFLAGS, uint32_t);
    if (hflags & HF_LMA) {
        uint64_t flags = soft_get_rflags(env);
        REG(1) = eip;
        REG(11) = flags & ~0x10000ULL;
        soft_set_rflags(env, flags & ~AT(env, ENV_FMASK, uint64_t) & ~0x10000ULL);
        soft_load_segment(env, 1, selector, 0, 0xffffffff, CODE64);
        soft_load_segment(env, 2, selector + 8, 0, 0xffffffff, DATA);
        AT(env, ENV_EIP, uint64_t) = AT(env, hflags & HF_CS64 ? ENV_LSTAR : ENV_CSTAR, uint64_t);
    } else {
        REG(1) = (uint32_t)eip;
        soft_set_rflags(env, soft_get_rflags(env) & ~0x30200ULL);
        soft_load_segment(env, 1, selector, 0, 0xffffffff, CODE32);
        soft_load_segment(env, 2, selector + 8, 0, 0xffffffff, DATA);
        AT(env, ENV_EIP, uint64_t) = (uint32_t)star;
    }
    soft_update_hflags(env);
}

OVERRIDE void helper_hlt_x86_64(void *env, int length)
{
    struct vcpu *v = now;
    AT(env, ENV_EIP, uint64_t) += length;
    AT(env, ENV_HFLAGS, uint32_t) &= ~HF_INHIBIT_IRQ;
    if (v)
        soft_leave(v, KVM_EXIT_HLT, 0);
}

OVERRIDE void helper_mwait_x86_64(void *env, int length)
{
    AT(env, ENV_EIP, uint64_t) += length;       /* as KVM does it: no sleep */
    AT(env, ENV_HFLAGS, uint32_t) &= ~HF_INHIBIT_IRQ;
}

OVERRIDE void helper_rdpmc_x86_64(void *env)
{
    lib.raise(env, 13, 0, FROM);
}

/* The library moves RIP past an INT before it is delivered. If the delivery faults, RIP must be
 * the instruction's. */
OVERRIDE void helper_raise_interrupt_x86_64(void *env, int vector, int length)
{
    if (now)
        now->interrupted_eip = AT(env, ENV_EIP, uint64_t);
    lib.raise_int(env, vector, length);
}

OVERRIDE void helper_into_x86_64(void *env, int length)
{
    if (now)
        now->interrupted_eip = AT(env, ENV_EIP, uint64_t);
    lib.into(env, length);
}

/* In long mode the library names an IDT's entry by its vector times 16, which is its offset; the
 * CPU names it by its vector times 8, like a selector. Only an IDT's entry has bit 1 set. */
OVERRIDE void raise_exception_err_x86_64(void *env, int vector, int error)
{
    if (now && AT(env, ENV_HFLAGS, uint32_t) & HF_LMA && error & 2 && (vector == 11 || vector == 13))
        error = (error >> 1 & ~7) | (error & 7);
    lib.raise(env, vector, error, 0);
}
