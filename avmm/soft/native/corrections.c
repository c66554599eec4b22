/* Instructions that the library does wrong, with the results that a processor gives.
 *
 * The library's own functions of these names are replaced as in overrides.c, but for everybody who
 * uses the library in this process. What it does wrong in its translator cannot be replaced:
 * docs/engines.md has a table of that. tests/soft/test_mended.py tries each of these, and
 * tests/soft/test_differential.py found them. */

#include "engine.h"

#include <string.h>

uint64_t helper_le_ldq_mmu_x86_64 LOAD;         /* overrides.c */
void helper_le_stq_mmu_x86_64 STORE;

/* CMPXCHG8B and CMPXCHG16B keep all flags but ZF. The library computes them from a form that is
 * that of an earlier instruction: what it then has for flags is anything, with bits that are no
 * status flags at all, and PUSHF shows it. Going back to the instruction's start tells the form. */
static unsigned flags_before(void *env, uintptr_t from)
{
    lib.cpu_restore_state(now->vm->cpu, from, false);
    return lib.compute_flags(env, AT(env, ENV_CC_OP, uint32_t)) & (CC_ALL & ~CC_Z);
}

/* What the library's accesses are called with: the size, and whose rights hold. */
static uint32_t access_index(void *env)
{
    enum { SIZE_8 = 3 << 4, USER = 1, NO_SMAP = 2, WITH_SMAP = 0, AC = 1 << 18 };
    uint32_t hflags = AT(env, ENV_HFLAGS, uint32_t);
    if ((hflags & HF_CPL) == 3)
        return SIZE_8 | USER;
    return SIZE_8 | (hflags & HF_SMAP && !(AT(env, ENV_EFLAGS, uint64_t) & AC) ? WITH_SMAP
                                                                                 : NO_SMAP);
}

OVERRIDE void helper_cmpxchg8b_unlocked_x86_64(void *env, uint64_t at)
{
    uintptr_t from = FROM;
    if (!now || now->vm->env != env) {
        lib.cmpxchg8b(env, at);
        return;
    }
    unsigned flags = flags_before(env, from);
    uint32_t index = access_index(env);
    uint64_t wanted = REG(2) << 32 | (uint32_t)REG(0);
    uint64_t old = helper_le_ldq_mmu_x86_64(env, at, index, from);
    helper_le_stq_mmu_x86_64(env, at, old == wanted ? REG(1) << 32 | (uint32_t)REG(3) : old, index,
                             from);
    if (old != wanted) {
        REG(0) = (uint32_t)old;
        REG(2) = old >> 32;
    }
    AT(env, ENV_CC_SRC, uint64_t) = flags | (old == wanted ? CC_Z : 0);
}

OVERRIDE void helper_cmpxchg16b_unlocked_x86_64(void *env, uint64_t at)
{
    uintptr_t from = FROM;
    if (!now || now->vm->env != env) {
        lib.cmpxchg16b(env, at);
        return;
    }
    if (at & 15)
        lib.raise(env, 13, 0, from);
    unsigned flags = flags_before(env, from);
    uint32_t index = access_index(env);
    uint64_t low = helper_le_ldq_mmu_x86_64(env, at, index, from);
    uint64_t high = helper_le_ldq_mmu_x86_64(env, at + 8, index, from);
    int same = low == REG(0) && high == REG(2);
    helper_le_stq_mmu_x86_64(env, at, same ? REG(3) : low, index, from);
    helper_le_stq_mmu_x86_64(env, at + 8, same ? REG(1) : high, index, from);
    if (!same) {
        REG(0) = low;
        REG(2) = high;
    }
    AT(env, ENV_CC_SRC, uint64_t) = flags | (same ? CC_Z : 0);
}

/* ---- SETcc to memory ----
 *
 * For some conditions the library first computes all flags, in place of what they would be computed
 * from, and then stores. If the store leads back to the instruction's start (by a page fault, or
 * because a device is there), the library forgets that it has done so, and the flags are anything. So
 * what it does when it goes back is mended here, whatever for. */

/* How the flags are kept, and what a condition tells (the library's own numbers and order). */
enum { DYNAMIC = 0, EFLAGS = 1, SUB_FIRST = 14, SUB_LAST = 17, ADOX = 47, ADCOX = 48, CLR = 49,
       POPCNT = 50 };
enum { OVERFLOW, CARRY, ZERO, BELOW_OR_EQUAL, SIGN, PARITY, LESS, LESS_OR_EQUAL };

static int computes_all_flags(int condition, int kept_as)
{
    if (kept_as == EFLAGS)
        return 0;
    switch (condition) {
    case OVERFLOW: return kept_as != CLR && kept_as != POPCNT && kept_as != ADOX && kept_as != ADCOX;
    case CARRY: return 0;
    case ZERO: case SIGN: return kept_as == DYNAMIC;
    case PARITY: return 1;
    default: return kept_as < SUB_FIRST || kept_as > SUB_LAST;
    }
}

/* The condition of a SETcc to memory, or -1 if the instruction at RIP is none. */
static int condition_of_setcc(struct vcpu *v)
{
    uint8_t escape, opcode, modrm;
    int at = soft_opcode_offset(v);
    if (at < 0 || soft_code(v, at, &escape) || escape != 0x0f || soft_code(v, at + 1, &opcode)
        || opcode >> 4 != 9 || soft_code(v, at + 2, &modrm) || modrm >> 6 == 3)
        return -1;
    return (opcode & 15) >> 1;
}

OVERRIDE void restore_state_to_opc_x86_64(void *env, void *block, uint64_t *data)
{
    struct vcpu *v = now;
    lib.restore_state(env, block, data);
    if (!v || v->vm->env != env)
        return;
    int is_at_start = v->is_at_start, condition;
    v->is_at_start = 0;
    if (!is_at_start && (condition = condition_of_setcc(v)) >= 0
        && computes_all_flags(condition, data[1]))
        AT(env, ENV_CC_OP, uint32_t) = EFLAGS;
}

/* ---- SSE ---- */

/* With one register for both operands the library reads the results of the lower half. */
#define OVERRIDE_HORIZONTAL(symbol, call, size) \
    OVERRIDE void symbol(void *env, void *to, void *from) \
    { \
        uint8_t copy[XMM_SIZE]; \
        if (to == from) \
            from = memcpy(copy, from, size); \
        lib.call(env, to, from); \
    }
#define OVERRIDE_HORIZONTALS(name) \
    OVERRIDE_HORIZONTAL(helper_##name##_mmx_x86_64, name##_mmx, 8) \
    OVERRIDE_HORIZONTAL(helper_##name##_xmm_x86_64, name##_xmm, 16)
OVERRIDE_HORIZONTALS(phaddw)
OVERRIDE_HORIZONTALS(phaddd)
OVERRIDE_HORIZONTALS(phaddsw)
OVERRIDE_HORIZONTALS(phsubw)
OVERRIDE_HORIZONTALS(phsubd)
OVERRIDE_HORIZONTALS(phsubsw)

/* DPPS adds two pairs (Intel SDM 2A); the library adds from left to right to a zero, which rounds
 * otherwise, and makes +0 of -0. */
OVERRIDE void helper_dpps_xmm_x86_64(void *env, void *to, void *from, uint32_t mask)
{
    void *status = &AT(env, ENV_SSE_STATUS, char);
    uint32_t *a = to, *b = from, p[4] = { 0 };
    for (int i = 0; i < 4; i++)
        if (mask >> (4 + i) & 1)
            p[i] = lib.multiply32(a[i], b[i], status);
    uint32_t low = lib.add32(p[0], p[1], status), high = lib.add32(p[2], p[3], status);
    uint32_t sum = lib.add32(low, high, status);
    for (int i = 0; i < 4; i++)
        a[i] = mask >> i & 1 ? sum : 0;
}

OVERRIDE void helper_dppd_xmm_x86_64(void *env, void *to, void *from, uint32_t mask)
{
    void *status = &AT(env, ENV_SSE_STATUS, char);
    uint64_t *a = to, *b = from, p[2] = { 0 };
    for (int i = 0; i < 2; i++)
        if (mask >> (4 + i) & 1)
            p[i] = lib.multiply64(a[i], b[i], status);
    uint64_t sum = lib.add64(p[0], p[1], status);
    for (int i = 0; i < 2; i++)
        a[i] = mask >> i & 1 ? sum : 0;
}

/* Under DAZ a denormal operand is a zero of its sign, to MIN and MAX too. */
static void flush(void *numbers, int size, int count)
{
    for (int i = 0; i < count; i++) {
        uint32_t *n = (uint32_t *)numbers + i;
        uint64_t *w = (uint64_t *)numbers + i;
        if (size == 4 && !(*n & 0x7f800000))
            *n &= 1u << 31;
        if (size == 8 && !(*w & 0x7ff0000000000000))
            *w &= 1ULL << 63;
    }
}

#define OVERRIDE_LEAST(name, size, count) \
    OVERRIDE void helper_##name##_x86_64(void *env, void *to, void *from) \
    { \
        uint8_t copy[16]; \
        if (AT(env, ENV_MXCSR, uint32_t) & MXCSR_DAZ) { \
            from = memcpy(copy, from, (size) * (count)); \
            flush(from, size, count); \
            flush(to, size, count); \
        } \
        lib.name(env, to, from); \
    }
OVERRIDE_LEAST(minps, 4, 4)
OVERRIDE_LEAST(maxps, 4, 4)
OVERRIDE_LEAST(minss, 4, 1)
OVERRIDE_LEAST(maxss, 4, 1)
OVERRIDE_LEAST(minpd, 8, 2)
OVERRIDE_LEAST(maxpd, 8, 2)
OVERRIDE_LEAST(minsd, 8, 1)
OVERRIDE_LEAST(maxsd, 8, 1)

/* PCMPESTRI and its kin (Intel SDM 1, 14.3). The library reads outside of the operands if a length
 * is the smallest number of all, and looks for no string that begins at the end of the other. */
struct strings { const void *a, *b; int signs, wide, length[2]; };

static int element(const struct strings *s, const void *of, int i)
{
    if (s->wide)
        return s->signs ? ((const int16_t *)of)[i] : ((const uint16_t *)of)[i];
    return s->signs ? ((const int8_t *)of)[i] : ((const uint8_t *)of)[i];
}

static int matches(const struct strings *s, int mode, int j)
{
    int most = s->wide ? 8 : 16, there = j < s->length[1], v = element(s, s->b, j);
    switch (mode) {
    case 0:                             /* any of them */
        for (int i = 0; i < s->length[0]; i++)
            if (there && element(s, s->a, i) == v)
                return 1;
        return 0;
    case 1:                             /* in one of the ranges */
        for (int i = 0; i + 1 < s->length[0]; i += 2)
            if (there && element(s, s->a, i) <= v && v <= element(s, s->a, i + 1))
                return 1;
        return 0;
    case 2:                             /* each is equal */
        return there == (j < s->length[0]) && (!there || element(s, s->a, j) == v);
    default:                            /* the whole begins here */
        for (int i = 0; i < s->length[0] && i + j < most; i++)
            if (i + j >= s->length[1] || element(s, s->a, i) != element(s, s->b, i + j))
                return 0;
        return 1;
    }
}

static unsigned compare_strings(void *env, struct strings *s, uint32_t control)
{
    int most = s->wide ? 8 : 16;
    unsigned found = 0, all = (1u << most) - 1;
    for (int j = 0; j < most; j++)
        found |= matches(s, control >> 2 & 3, j) << j;
    if (control & 16)
        found ^= control & 32 ? (1u << s->length[1]) - 1 : all;
    AT(env, ENV_CC_SRC, uint64_t) = (found ? 1 : 0) | (s->length[1] < most ? CC_Z : 0)
                                    | (s->length[0] < most ? 0x80 : 0) | (found & 1 ? 0x800 : 0);
    return found;
}

static struct strings strings_of(const void *a, const void *b, uint32_t control)
{
    return (struct strings){ a, b, control >> 1 & 1, control & 1, { 0, 0 } };
}

static unsigned compare_counted(void *env, const void *a, const void *b, uint32_t control)
{
    struct strings s = strings_of(a, b, control);
    for (int i = 0; i < 2; i++) {       /* RAX and RDX: how many, whatever the sign */
        int64_t n = control >> 8 & 1 ? (int64_t)REG(2 * i) : (int32_t)REG(2 * i);
        int most = s.wide ? 8 : 16;
        s.length[i] = n >= most || n <= -most ? most : n < 0 ? -n : n;
    }
    return compare_strings(env, &s, control);
}

static unsigned compare_ended(void *env, const void *a, const void *b, uint32_t control)
{
    struct strings s = strings_of(a, b, control);
    int most = s.wide ? 8 : 16;
    while (s.length[0] < most && element(&s, a, s.length[0]))
        s.length[0]++;
    while (s.length[1] < most && element(&s, b, s.length[1]))
        s.length[1]++;
    return compare_strings(env, &s, control);
}

static void give_index(void *env, unsigned found, uint32_t control)
{
    REG(1) = !found ? (control & 1 ? 8 : 16)
             : control & 64 ? 31 - __builtin_clz(found) : __builtin_ctz(found);
}

static void give_mask(void *env, unsigned found, uint32_t control)
{
    uint8_t *xmm0 = &AT(env, ENV_XMM, uint8_t);
    memset(xmm0, 0, 16);
    if (!(control & 64)) {
        memcpy(xmm0, &found, 2);
        return;
    }
    int size = control & 1 ? 2 : 1;
    for (int i = 0; i < 16; i++)
        xmm0[i] = found >> i / size & 1 ? 0xff : 0;
}

OVERRIDE void helper_pcmpestri_xmm_x86_64(void *env, void *a, void *b, uint32_t control)
{
    give_index(env, compare_counted(env, a, b, control), control);
}
OVERRIDE void helper_pcmpestrm_xmm_x86_64(void *env, void *a, void *b, uint32_t control)
{
    give_mask(env, compare_counted(env, a, b, control), control);
}
OVERRIDE void helper_pcmpistri_xmm_x86_64(void *env, void *a, void *b, uint32_t control)
{
    give_index(env, compare_ended(env, a, b, control), control);
}
OVERRIDE void helper_pcmpistrm_xmm_x86_64(void *env, void *a, void *b, uint32_t control)
{
    give_mask(env, compare_ended(env, a, b, control), control);
}

/* The library divides the smallest number by -1 on the host, which is a SIGFPE there. */
OVERRIDE void helper_idivl_EAX_x86_64(void *env, uint64_t by)
{
    uintptr_t from = FROM;
    int64_t number = REG(2) << 32 | (uint32_t)REG(0), divisor = (int32_t)by;
    if (!divisor || (number == INT64_MIN && divisor == -1)
        || number / divisor != (int32_t)(number / divisor))
        lib.raise(env, 0, 0, from);
    REG(0) = (uint32_t)(number / divisor);
    REG(2) = (uint32_t)(number % divisor);
}

/* After LOOPE and LOOPNE the library takes for the flags what is none; at least no other bit of
 * RFLAGS may come of that. */
OVERRIDE uint32_t cpu_cc_compute_all_x86_64(void *env, int op)
{
    return lib.compute_flags(env, op) & CC_ALL;
}

/* A signalling NaN that is loaded as a float or a double becomes a quiet one. */
static void quieten(void *env)
{
    unsigned top = AT(env, ENV_FPSTT, uint32_t) & 7;
    char *st0 = &AT(env, ENV_FPREGS + FPREG_SIZE * top, char);
    if ((AT(st0, 8, uint16_t) & 0x7fff) == 0x7fff && AT(st0, 0, uint64_t) << 1)
        AT(st0, 0, uint64_t) |= 1ULL << 62;
}

OVERRIDE void helper_flds_ST0_x86_64(void *env, uint32_t value)
{
    lib.flds(env, value);
    quieten(env);
}

OVERRIDE void helper_fldl_ST0_x86_64(void *env, uint64_t value)
{
    lib.fldl(env, value);
    quieten(env);
}

/* The library takes MXCSR's FTZ for x87's, which has none. */
OVERRIDE void update_mxcsr_status_x86_64(void *env)
{
    lib.update_mxcsr_status(env);
    AT(env, ENV_FP_STATUS + STATUS_FTZ, uint8_t) = 0;
    AT(env, ENV_SSE_STATUS + STATUS_FTZ, uint8_t) = AT(env, ENV_MXCSR, uint32_t) >> 15 & 1;
}

/* x87's constants, as the rounding mode wants them (Intel SDM 1, 8.3.8). The library has those to
 * nearest alone. The modes: nearest, down, up, to zero. */
static void load_constant(void *env, uint16_t exponent, uint64_t down, int nearest_is_up)
{
    unsigned top = AT(env, ENV_FPSTT, uint32_t) & 7, mode = AT(env, ENV_FPUC, uint16_t) >> 10 & 3;
    char *st0 = &AT(env, ENV_FPREGS + FPREG_SIZE * top, char);
    AT(st0, 0, uint64_t) = down + (mode == 2 || (mode == 0 && nearest_is_up));
    AT(st0, 8, uint16_t) = exponent;
}

OVERRIDE void helper_fldl2t_ST0_x86_64(void *env)
{
    load_constant(env, 0x4000, 0xd49a784bcd1b8afe, 0);
}
OVERRIDE void helper_fldl2e_ST0_x86_64(void *env)
{
    load_constant(env, 0x3fff, 0xb8aa3b295c17f0bb, 1);
}
OVERRIDE void helper_fldpi_ST0_x86_64(void *env)
{
    load_constant(env, 0x4000, 0xc90fdaa22168c234, 1);
}
OVERRIDE void helper_fldlg2_ST0_x86_64(void *env)
{
    load_constant(env, 0x3ffd, 0x9a209a84fbcff798, 1);
}
OVERRIDE void helper_fldln2_ST0_x86_64(void *env)
{
    load_constant(env, 0x3ffe, 0xb17217f7d1cf79ab, 1);
}
