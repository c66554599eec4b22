#include "spin.h"

#include "boot.h"
#include "console.h"
#include "cpu.h"
#include "lapic.h"
#include "smp.h"

static volatile bool go;

/*
 * A cache line for each counter, at a fixed address, so that a host can watch them without a
 * symbol table.
 */
static volatile uint64_t *counter(int cpu)
{
        return (void *)(uint64_t)(SPIN_COUNTERS + 64 * cpu);
}

static void count_for_ever(int cpu)
{
        volatile uint64_t *word = counter(cpu);

        while (!go)
                pause();
        for (;;)
                ++*word;
}

void spin(const struct options *options)
{
        volatile uint64_t *word = counter(0);
        uint64_t begin, cycles, counts[MAX_CPUS];

        lapic_init(false);
        read_mp_table();
        for (int cpu = 0; cpu < boot.cpu_count; cpu++)
                *counter(cpu) = 0;
        start_cpus(boot.cpu_count, count_for_ever);

        begin = tsc();
        go = true;
        do
                ++*word;
        while (*word != options->count);
        cycles = tsc() - begin;

        /*
         * Copy all of them first, because printing takes long and the other CPUs go on counting.
         */
        for (int cpu = 0; cpu < boot.cpu_count; cpu++)
                counts[cpu] = *counter(cpu);
        print("exits kind=spin count=%lu cpus=%u cycles=%lu counts=", options->count,
              boot.cpu_count, cycles);
        for (int cpu = 0; cpu < boot.cpu_count; cpu++)
                print(cpu ? ",%lu" : "%lu", counts[cpu]);
        print("\n");
}
