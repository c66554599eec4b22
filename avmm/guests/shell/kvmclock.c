/*
 * KVM's clock page says how TSC cycles become nanoseconds, and with that how many there are in a
 * second. Nothing else of the page is used. (Documentation/virt/kvm/x86/msr.rst; the signature and
 * the feature are in cpuid.rst.)
 */
#include "kvmclock.h"

#include "cpu.h"

#define SIGNATURE       0x40000000      /* CPUID leaves */
#define FEATURES        0x40000001
#define CLOCKSOURCE2    (1 << 3)
#define SYSTEM_TIME_NEW 0x4b564d01      /* MSR */
#define ENABLE          1
#define LOOKS           100000

static volatile struct {
        uint32_t version, padding;
        uint64_t tsc_timestamp, system_time;
        uint32_t tsc_to_system_mul;
        int8_t tsc_shift;
        uint8_t flags, rest[2];
} page __attribute__((aligned(64)));

uint64_t kvm_tsc_khz(void)
{
        const struct cpuid kvm = cpuid(SIGNATURE);
        uint32_t looks = 0;
        uint64_t khz;

        /* "KVMKVMKVM"; a leaf of 0 means the next one */
        if (kvm.ebx != 0x4b4d564b || kvm.ecx != 0x564b4d56 || kvm.edx != 0x4d ||
            (kvm.eax && kvm.eax < FEATURES) || !(cpuid(FEATURES).eax & CLOCKSOURCE2))
                return 0;
        wrmsr(SYSTEM_TIME_NEW, (uintptr_t)&page | ENABLE);
        while ((!page.version || page.version & 1) && ++looks < LOOKS)
                pause();
        wrmsr(SYSTEM_TIME_NEW, 0);
        if (!page.tsc_to_system_mul)
                return 0;
        khz = (1000000ull << 32) / page.tsc_to_system_mul;
        return page.tsc_shift < 0 ? khz << -page.tsc_shift : khz >> page.tsc_shift;
}
