/* MSRs: those that the library needs for its own work, the engine's, and the chips'. An unknown one
 * is #GP for the guest, and refused to the host. */

#include "engine.h"
#include "chips_glue.h"

#include <errno.h>
#include <string.h>
#include <time.h>
#include <x86intrin.h>

enum { TSC = 0x10, APIC_BASE = 0x1b, TSC_ADJUST = 0x3b, MISC_ENABLE = 0x1a0, PAT = 0x277,
       EFER = 0xc0000080 };

static const uint32_t listed[] = {
    0x10, 0x174, 0x175, 0x176, 0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, 0xc0000102,
    0xc0000103, 0x277, 0x1a0, 0x17a, 0x2ff, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c,
    0x26d, 0x26e, 0x26f, 0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209,
    0x20a, 0x20b, 0x20c, 0x20d, 0x20e, 0x20f,
};

int soft_msr_list(struct kvm_msr_list *list)
{
    uint32_t room = list->nmsrs, more[16], count = sizeof listed / sizeof *listed;
    uint32_t others = soft_glue_msrs(more, 16);
    list->nmsrs = count + others;
    if (room < count + others)
        return -E2BIG;
    memcpy(list->indices, listed, sizeof listed);
    memcpy(list->indices + count, more, others * sizeof *more);
    return 0;
}

struct moment { int64_t ns; uint64_t tsc; };

/* Both clocks at once: the best of some tries, because this thread may lose its core in between. */
static struct moment moment(void)
{
    struct moment best = { 0, 0 };
    uint64_t least = ~0ULL;
    for (int i = 0; i < 8; i++) {
        uint64_t before = __rdtsc();
        int64_t ns = soft_now_ns();
        uint64_t took = __rdtsc() - before;
        if (took < least) {
            least = took;
            best = (struct moment){ ns, before + took / 2 };
        }
    }
    return best;
}

static struct moment loaded;

/* The measurement begins while the library is loaded, which takes as long. */
void soft_tsc_begin(void)
{
    loaded = moment();
}

/* Measured once against the monotonic clock, for at least 10 ms. Not over a long time, in which the
 * host may have slept. */
uint64_t soft_host_tsc_khz(void)
{
    enum { LEAST_NS = 10000000, MOST_NS = 1000000000 };
    static _Atomic uint64_t known;
    uint64_t khz = known;
    if (!khz) {
        struct moment begin = loaded, end = moment();
        if (end.ns - begin.ns > MOST_NS)
            begin = end;
        if (end.ns - begin.ns < LEAST_NS) {
            struct timespec rest = { .tv_nsec = LEAST_NS - (end.ns - begin.ns) };
            nanosleep(&rest, NULL);
            end = moment();
        }
        khz = (unsigned __int128)(end.tsc - begin.tsc) * 1000000 / (end.ns - begin.ns);
        khz = (khz + 500) / 1000 * 1000;
        known = khz;
    }
    return khz;
}

/* The host's TSC at the guest's pace. */
static uint64_t paced_tsc(struct vcpu *v)
{
    uint64_t host = v->vm->order.on ? (uint64_t)v->vm->order.ns * (ORDER_TSC_KHZ / 1000000) : __rdtsc();
    if (v->tsc_khz == v->vm->tsc_khz)
        return host;
    return (unsigned __int128)host * v->tsc_khz / v->vm->tsc_khz;
}

uint64_t soft_tsc(struct vcpu *v)
{
    return paced_tsc(v) + v->tsc_offset;
}

/* Another pace; the counter itself goes on from where it is. */
void soft_set_tsc_khz(struct vcpu *v, uint64_t khz)
{
    uint64_t tsc = soft_tsc(v);
    v->tsc_khz = khz;
    v->tsc_offset = tsc - paced_tsc(v);
    soft_glue_tsc_changed(v);
}

/* The field of `env` that holds an MSR, or NULL. */
static uint64_t *field(void *env, uint32_t index)
{
    switch (index) {
    case 0x175: return &AT(env, ENV_SYSENTER_ESP, uint64_t);
    case 0x176: return &AT(env, ENV_SYSENTER_EIP, uint64_t);
    case PAT: return &AT(env, ENV_PAT, uint64_t);
    case 0xc0000081: return &AT(env, ENV_STAR, uint64_t);
    case 0xc0000082: return &AT(env, ENV_LSTAR, uint64_t);
    case 0xc0000083: return &AT(env, ENV_CSTAR, uint64_t);
    case 0xc0000084: return &AT(env, ENV_FMASK, uint64_t);
    case 0xc0000100: return &AT(env, ENV_SEGS + 4 * SEG_SIZE + SEG_BASE, uint64_t);
    case 0xc0000101: return &AT(env, ENV_SEGS + 5 * SEG_SIZE + SEG_BASE, uint64_t);
    case 0xc0000102: return &AT(env, ENV_KERNELGS, uint64_t);
    case 0xc0000103: return &AT(env, ENV_TSC_AUX, uint64_t);
    default: return NULL;
    }
}

static uint64_t *own(struct vcpu *v, uint32_t index)
{
    switch (index) {
    case MISC_ENABLE: return &v->misc_enable;
    case 0x17a: return &v->mcg_status;
    case 0x2ff: return &v->mtrr_default;
    case 0x250: return &v->mtrr_fixed[0];
    case 0x258: case 0x259: return &v->mtrr_fixed[1 + index - 0x258];
    }
    if (index >= 0x268 && index <= 0x26f)
        return &v->mtrr_fixed[3 + index - 0x268];
    if (index >= 0x200 && index <= 0x20f)
        return &v->mtrr[index - 0x200];
    return NULL;
}

int soft_msr_get(struct vcpu *v, uint32_t index, uint64_t *value, int host)
{
    void *env = env_of(v);
    uint64_t *place = field(env, index);
    if (!place)
        place = own(v, index);
    if (place) {
        *value = *place;
        return 0;
    }
    switch (index) {
    case TSC: *value = soft_tsc(v); return 0;
    case TSC_ADJUST: return -EINVAL;
    case APIC_BASE: *value = soft_glue_base(v); return 0;
    case 0x174: *value = AT(env, ENV_SYSENTER_CS, uint32_t); return 0;
    case EFER: *value = AT(env, ENV_EFER, uint64_t); return 0;
    case 0xfe: *value = 0x508; return 0;            /* MTRRCAP: 8 variable ones, fixed ones, WC */
    case 0x8b: *value = 0x1000065ULL << 32; return 0;       /* the microcode's revision */
    case 0x17: case 0x2a: case 0x33: case 0x179: case 0x17b: case 0x186: case 0x187:
    case 0xc0010015: case 0xc001001f: case 0xc0010055: case 0xc0010058: case 0xc0010112:
    case 0xc0010113: case 0xc0010117: case 0xc0010010: case 0x1d9: case 0x1db: case 0x1dc:
    case 0x1dd: case 0x1de: case 0xc0010000: case 0xc0010001: case 0xc0010002: case 0xc0010003:
    case 0xc0010004: case 0xc0010005: case 0xc0010006: case 0xc0010007:
        *value = 0;                                 /* as KVM: there, and empty */
        return 0;
    }
    return soft_glue_msr_get(v, index, value, host);
}

static int is_canonical(uint64_t address)
{
    return (int64_t)(address << 16) >> 16 == (int64_t)address;
}

static int set_efer(struct vcpu *v, uint64_t value, int host)
{
    void *env = env_of(v);
    uint64_t old = AT(env, ENV_EFER, uint64_t);
    if (value & ~0xd01ULL)
        return -EINVAL;
    if (!host) {
        if ((old ^ value) & 0x100 && AT(env, ENV_CR, uint64_t) >> 31 & 1)
            return -EINVAL;
        value = (value & ~0x400ULL) | (old & 0x400);
    }
    AT(env, ENV_EFER, uint64_t) = value;
    AT(env, ENV_HFLAGS, uint32_t) &= ~HF_LMA;
    if (value & 0x400)
        AT(env, ENV_HFLAGS, uint32_t) |= HF_LMA;
    if ((old ^ value) & 0x800 && v->vm->loaded == v)
        lib.tlb_flush(v->vm->cpu);
    return 0;
}

int soft_msr_set(struct vcpu *v, uint32_t index, uint64_t value, int host)
{
    void *env = env_of(v);
    uint64_t *place = field(env, index);
    if (place) {
        if (index != PAT && index != 0xc0000081 && index != 0xc0000084 && index != 0xc0000103
            && !is_canonical(value))
            return -EINVAL;
        if (index == PAT)
            for (int i = 0; i < 8; i++) {
                uint8_t type = value >> 8 * i;
                if (type > 7 || type == 2 || type == 3)
                    return -EINVAL;
            }
        *place = index == 0xc0000084 || index == 0xc0000103 ? (uint32_t)value : value;
        return 0;
    }
    if ((place = own(v, index))) {
        *place = value;
        return 0;
    }
    switch (index) {
    case TSC: v->tsc_offset = value - paced_tsc(v); soft_glue_tsc_changed(v); return 0;
    case APIC_BASE: return soft_glue_base_set(v, value, host);
    case 0x174: AT(env, ENV_SYSENTER_CS, uint32_t) = value; return 0;
    case EFER: return set_efer(v, value, host);
    case 0x8b: case 0x79: case 0x33: case 0x1d9: case 0xc0010015: case 0xc001001f: case 0xc0010117:
    case 0x186: case 0x187: case 0xc0010000: case 0xc0010001: case 0xc0010002: case 0xc0010003:
    case 0xc0010004: case 0xc0010005: case 0xc0010006: case 0xc0010007: case 0x17b: case 0xc0010055:
        return 0;
    }
    return soft_glue_msr_set(v, index, value, host);
}
