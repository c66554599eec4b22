/* CPUID: what the library really does, and what KVM_SET_CPUID2 has made of it.
 *
 * The processor is one without AVX. Its vendor and family are those of an AMD that has no known
 * speculation bugs, so that Linux does not spend time on page-table isolation for a CPU that does
 * not speculate. */

#include "engine.h"
#include "chips_glue.h"

#include <errno.h>
#include <string.h>

enum {
    BASE_EDX = 0x078bbb7d,      /* FPU ... SSE2; no VME, MCE, MCA */
    BASE_ECX = 0x46f82203,      /* SSE3 ... SSE4.2, CX16, x2APIC, MOVBE, POPCNT, AES, XSAVE, RDRAND */
    LEAF7_EBX = 1 << 0 | 1 << 7 | 1 << 9 | 1 << 19 | 1 << 20 | 1 << 23 | 1 << 24,
        /* FSGSBASE, SMEP, ERMS, ADX, SMAP, CLFLUSHOPT, CLWB. Not BMI1 and BMI2: the library does
         * BEXTR, BLSI, BZHI, PDEP and RORX wrong. */
    LEAF81_EDX = 0x2c100800,    /* SYSCALL, NX, 1 GiB pages, RDTSCP, LM */
    LEAF81_ECX = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8, /* LAHF, CR8, ABM, SSE4A, 3DNOWPREFETCH */
    XSAVE_EAX = 1 << 0 | 1 << 2,        /* XSAVEOPT, XGETBV(1) */
};

void soft_cpuid_features(void *env)
{
    uint64_t *f = &AT(env, ENV_FEATURES, uint64_t);
    f[FEATURE_1_EDX] = BASE_EDX;
    f[FEATURE_1_ECX] = BASE_ECX | 1u << 31;
    f[FEATURE_7_EBX] = LEAF7_EBX;
    f[FEATURE_7_ECX] = f[FEATURE_7_EDX] = 0;
    f[FEATURE_81_EDX] = LEAF81_EDX | (BASE_EDX & 0x0183f3ff);
    f[FEATURE_81_ECX] = LEAF81_ECX;
    f[FEATURE_XSAVE] = XSAVE_EAX;
    memcpy(&AT(env, ENV_CPUID_VENDOR, uint8_t), "AuthenticAMD", 12);
}

static void add(struct kvm_cpuid2 *c, uint32_t room, uint32_t function, uint32_t index,
                int indexed, uint32_t eax, uint32_t ebx, uint32_t ecx, uint32_t edx)
{
    if (c->nent < room)
        c->entries[c->nent] = (struct kvm_cpuid_entry2){
            .function = function, .index = index,
            .flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0,
            .eax = eax, .ebx = ebx, .ecx = ecx, .edx = edx };
    c->nent++;
}

static uint32_t word(const char *text, int at)
{
    uint32_t value;
    memcpy(&value, text + at, 4);
    return value;
}

int soft_cpuid_supported(struct kvm_cpuid2 *c)
{
    static const char name[49] = "avmm software engine (TCG)";
    static const char vendor[13] = "AuthenticAMD", kvm[13] = "KVMKVMKVM\0\0";
    uint32_t room = c->nent, paravirtual = soft_glue_cpuid_features();
    uint32_t v[3] = { word(vendor, 0), word(vendor, 8), word(vendor, 4) };
    c->nent = 0;
    add(c, room, 0, 0, 0, 0xd, v[0], v[1], v[2]);
    add(c, room, 1, 0, 0, 0x60fb1, 0x00010800, BASE_ECX, BASE_EDX);
    add(c, room, 7, 0, 1, 0, LEAF7_EBX, 0, 0);
    add(c, room, 0xb, 0, 1, 0, 1, 0x100, 0);
    add(c, room, 0xb, 1, 1, 0, 1, 0x201, 0);
    add(c, room, 0xd, 0, 1, 3, 576, 576, 0);
    add(c, room, 0xd, 1, 1, XSAVE_EAX, 0, 0, 0);
    add(c, room, 0x40000000, 0, 0, 0x40000001, word(kvm, 0), word(kvm, 4), word(kvm, 8));
    add(c, room, 0x40000001, 0, 0, paravirtual, 0, 0, 0);
    add(c, room, 0x80000000, 0, 0, 0x80000008, v[0], v[1], v[2]);
    add(c, room, 0x80000001, 0, 0, 0x60fb1, 0, LEAF81_ECX, LEAF81_EDX | (BASE_EDX & 0x0183f3ff));
    for (int i = 0; i < 3; i++)
        add(c, room, 0x80000002 + i, 0, 0, word(name, 16 * i), word(name, 16 * i + 4),
            word(name, 16 * i + 8), word(name, 16 * i + 12));
    add(c, room, 0x80000007, 0, 0, 0, 0, 0, 1 << 8);    /* the TSC never changes its pace */
    add(c, room, 0x80000008, 0, 0, 0x3028, 0, 0, 0);    /* 40 bits physical, 48 virtual */
    return c->nent > room ? -E2BIG : 0;
}

static const struct kvm_cpuid_entry2 *find(struct vcpu *v, uint32_t leaf, uint32_t index)
{
    for (uint32_t i = 0; i < v->cpuids; i++) {
        struct kvm_cpuid_entry2 *e = &v->cpuid[i];
        if (e->function == leaf
            && (!(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e->index == index))
            return e;
    }
    return NULL;
}

void soft_cpuid(struct vcpu *v, uint32_t leaf, uint32_t index, uint32_t out[4])
{
    const struct kvm_cpuid_entry2 *e = find(v, leaf, index);
    void *env = env_of(v);
    memset(out, 0, 16);
    if (!e) {
        if (leaf == 0xb || leaf == 0x1f) {      /* no such level; the APIC id is told anyway */
            out[2] = index & 255;
            if ((e = find(v, leaf, 0)))
                out[3] = e->edx;
        }
        return;
    }
    out[0] = e->eax;
    out[1] = e->ebx;
    out[2] = e->ecx;
    out[3] = e->edx;
    if (leaf == 1) {
        out[2] &= ~(1u << 27);
        if (AT(env, ENV_CR + 32, uint64_t) >> 18 & 1)
            out[2] |= 1u << 27;                 /* OSXSAVE */
    } else if (leaf == 0xd && index == 0) {
        out[1] = 576;
    }
}
