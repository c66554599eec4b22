/*
 * CPUs are started one at a time, so that one trampoline and one pair of boot variables (start.S)
 * serve them all. The MP specification asks for delays between INIT and SIPI. They are for chips
 * of 1994, and no VMM needs them.
 */
#include "smp.h"

#include "boot.h"
#include "console.h"
#include "cpu.h"
#include "finish.h"
#include "input.h"
#include "lapic.h"
#include "layout.h"
#include "text.h"
#include "trap.h"

#define NO_CPU          3
#define PATIENCE        (1ull << 36)    /* TSC cycles: half a minute, as the host may be busy */

extern const char trampoline[], trampoline_end[];
extern uint64_t boot_stack;
extern void (*boot_main)(void);

static char stacks[MAX_CPUS][1024] __attribute__((aligned(16)));
static volatile int starting;
static void (*ap_main)(int cpu);

static void ap_begin(void)
{
        const int cpu = starting;

        trap_init_ap();
        lapic_init(false);
        starting = 0;           /* from here on nobody reads boot_stack and boot_main */
        ap_main(cpu);
}

bool start_cpu(int cpu, void (*main)(int cpu))
{
        const uint8_t id = boot.apic_ids[cpu];
        const uint64_t begin = tsc();

        memcpy((void *)TRAMPOLINE, trampoline, trampoline_end - trampoline);
        boot_stack = (uint64_t)stacks[cpu + 1];
        boot_main = ap_begin;
        ap_main = main;
        starting = cpu;

        lapic_send_init(id);
        lapic_send_startup(id, TRAMPOLINE);
        while (starting && tsc() - begin < PATIENCE && !interrupted)
                pause();
        if (starting)
                lapic_send_init(id);    /* or it might come up later as another CPU */
        return !starting;
}

void start_cpus(int count, void (*main)(int cpu))
{
        for (int cpu = 1; cpu < count; cpu++) {
                if (!start_cpu(cpu, main)) {
                        print("error: cpu %u does not start\n", cpu);
                        finish(NO_CPU);
                }
        }
}
