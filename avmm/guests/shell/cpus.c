/*
 * cpus: starts every processor, and checks that an interrupt reaches each.
 */
#include "boot.h"
#include "clock.h"
#include "command.h"
#include "console.h"
#include "cpu.h"
#include "input.h"
#include "lapic.h"
#include "layout.h"
#include "smp.h"
#include "text.h"
#include "trap.h"

#define PATIENCE        (1ull << 31)    /* TSC cycles */

static bool started[MAX_CPUS];
static volatile uint32_t answers[256];  /* by APIC id */

/* Runs on the processor that is asked. */
static void on_ipi(void)
{
        answers[lapic_id()]++;
        lapic_acknowledge();
}

static void idle(int cpu)
{
        (void)cpu;
        for (;;)
                interrupts_on_and_wait();
}

static bool ask(int cpu)
{
        const uint8_t id = boot.apic_ids[cpu];
        const uint32_t before = answers[id];
        const uint64_t begin = tsc();

        lapic_send_interrupt(id, VECTOR_IPI);
        while (answers[id] == before)
                if (tsc() - begin > PATIENCE || interrupted)
                        return false;
        return true;
}

static void show(int cpu)
{
        uint64_t begin = tsc();

        print("  cpu %u, APIC id %u: ", cpu, boot.apic_ids[cpu]);
        if (cpu == 0) {
                print("this one");
        } else if (started[cpu]) {
                print("runs already");
        } else if (start_cpu(cpu, idle)) {
                started[cpu] = true;
                print("started in %lu us", clock_microseconds(tsc() - begin));
        } else {
                print("does not start\n");
                return;
        }

        begin = tsc();
        if (ask(cpu))
                print(", answers an interrupt in %lu us\n", clock_microseconds(tsc() - begin));
        else
                print(", does not answer an interrupt\n");
}

bool cpus_command(char *arguments, int width)
{
        (void)width;
        if (next_word(&arguments))
                return false;
        on_interrupt(VECTOR_IPI, on_ipi);
        for (int cpu = 0; cpu < boot.cpu_count && !interrupted; cpu++)
                show(cpu);
        return true;
}
