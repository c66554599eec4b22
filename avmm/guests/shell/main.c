/*
 * shell: a guest to talk to. A prompt on the serial console, and commands that show what a
 * machine can do: memory, ports, timers, processors, ways to end.
 */
#include "boot.h"
#include "clock.h"
#include "command.h"
#include "console.h"
#include "cpu.h"
#include "finish.h"
#include "input.h"
#include "irq.h"
#include "lapic.h"
#include "line.h"
#include "ram.h"
#include "trap.h"

#define MIB     (1024 * 1024)

static void greet(void)
{
        print("\navmm guest shell: %lu MiB of memory, %u CPU%s\n"
              "Type help for the commands, Ctrl-D to leave.\n\n",
              (total_ram() + MIB - 1) / MIB, boot.cpu_count, boot.cpu_count > 1 ? "s" : "");
}

/* Like on a terminal, Ctrl-C throws away what was typed before it. */
static void after_command(void)
{
        while (interrupted)
                if (get_char() == CTRL_C)
                        put_string("^C\n");
}

void guest_main(uint64_t start_info)
{
        static char line[LINE_SIZE];

        console_init();
        trap_init();
        read_start_info(start_info);
        console_choose();
        lapic_init(true);
        read_mp_table();
        irq_init();
        clock_init();
        input_init();

        greet();
        clock_stop();
        while (read_line("avmm> ", line)) {
                clock_start();
                run_command(line);
                after_command();
                clock_stop();
        }
        finish(0);
}
