/*
 * torture: makes every shape of exit in a fixed order, and adds each answer to a checksum.
 *
 * What devices see, and the sums, depend only on what the devices answer: not on time, and not on
 * how CPUs take turns. So if a run is disturbed, for example stopped in the middle and continued
 * elsewhere, the devices' log and the sums show whether something was lost or done twice. (Values
 * that are only compared or written elsewhere are not all in the sum: the log shows those.) It
 * ends with one line:
 *
 *   torture cpus=2 loops=1 sum0=0x123456789abcdef sum1=0x23456789abcdef01
 */
#include "boot.h"
#include "console.h"
#include "cpu.h"
#include "finish.h"
#include "keys.h"
#include "lapic.h"
#include "options.h"
#include "smp.h"
#include "trap.h"
#include "window.h"

#define FIRST_SUM       0xcbf29ce484222325      /* anything but 0 */

static struct options options;
static struct window windows[MOST_CPUS];
static volatile bool go, done[MOST_CPUS];

static void set_up(int cpu)
{
        void *ram = (void *)(uint64_t)(RAM_BASE + RAM_BYTES * cpu);
        uint64_t words = RAM_BYTES / 8;

        windows[cpu] = (struct window){
                .sum = FIRST_SUM + cpu,
                .ports = PORTS_BASE + PORTS_BYTES * cpu,
                .device = DEVICE_BASE + DEVICE_BYTES * cpu,
                .ram = (uint64_t)ram,
                .msr = options.msr + cpu,
        };
        asm volatile("rep stosq" : "+D"(ram), "+c"(words) : "a"(0) : "memory");
}

static bool made_by_intel(void)
{
        uint32_t leaf = 0, ebx, ecx, edx;

        asm volatile("cpuid" : "+a"(leaf), "=b"(ebx), "=c"(ecx), "=d"(edx));
        return ebx == 0x756e6547;       /* "Genu" */
}

/* One CPU prints at a time, because all of them share the console. */
static void print_sum(int cpu, uint64_t loop)
{
        static volatile bool busy;

        while (__atomic_exchange_n(&busy, true, __ATOMIC_ACQUIRE))
                pause();
        print("cpu %u loop %lu sum 0x%lx\n", cpu, loop, windows[cpu].sum);
        __atomic_store_n(&busy, false, __ATOMIC_RELEASE);
}

static void torture(int cpu)
{
        struct window *window = &windows[cpu];

        if (options.sse)
                enable_sse();
        for (uint64_t loop = 0; loop < options.loops; loop++) {
                port_shapes(window);
                if (options.long_strings)
                        long_shapes(window);
                string_shapes(window);
                mmio_shapes(window);
                straddle_shapes(window);
                if (options.sse)
                        sse_shapes(window);
                if (options.msr)
                        msr_shapes(window);
                if (options.hypercall)
                        (made_by_intel() ? vmcall_shape : vmmcall_shape)(window);
                if (options.verbose)
                        print_sum(cpu, loop);
        }
        done[cpu] = true;
}

/* After returning, the CPU stays in HLT for ever. */
static void wait_and_torture(int cpu)
{
        while (!go)
                pause();
        torture(cpu);
}

static void start_others(void)
{
        if (options.cpus == 1)
                return;
        lapic_init(false);
        read_mp_table();
        if (options.cpus > (uint64_t)boot.cpu_count)
                bad_command_line("there are fewer CPUs than cpus", "");
        start_cpus(options.cpus, wait_and_torture);
}

void guest_main(uint64_t start_info)
{
        console_init();
        trap_init();
        read_start_info(start_info);
        options = parse_options(boot.command_line);
        for (uint64_t cpu = 0; cpu < options.cpus; cpu++)
                set_up(cpu);
        start_others();

        go = true;
        torture(0);
        for (uint64_t cpu = 0; cpu < options.cpus; cpu++)
                while (!done[cpu])
                        pause();

        print("torture cpus=%lu loops=%lu", options.cpus, options.loops);
        for (uint64_t cpu = 0; cpu < options.cpus; cpu++)
                print(" sum%lu=0x%lx", cpu, windows[cpu].sum);
        print("\n");
        finish(0);
}
