/*
 * exits: measures how long one exit takes. It repeats one kind of access, reads the clock before
 * and after, and prints one line:
 *
 *   exits kind=pio op=write width=1 port=0xe0 count=10000 string=0 straddle=0 ring=0
 *   cycles=123456789 sum=0x0
 *
 * (all of it on one line). Writes write the running index. sum is the wrapping sum of all values
 * read.
 */
#include "boot.h"
#include "console.h"
#include "finish.h"
#include "job.h"
#include "options.h"
#include "spin.h"
#include "trap.h"

#define FAULT   4

static loop *choose(const struct options *options)
{
        static loop *const loops[2][2][4] = {
                [PIO] = { { out_1, out_2, out_4, 0 }, { in_1, in_2, in_4, 0 } },
                [MMIO] = { { store_1, store_2, store_4, store_8 },
                           { load_1, load_2, load_4, load_8 } },
        };

        if (options->string)
                return options->op == READ ? string_in : string_out;
        return loops[options->kind][options->op][__builtin_ctzl(options->width)];
}

static struct job run(const struct options *options, uint64_t count)
{
        struct job job = {
                .where = options->kind == PIO ? options->port : options->addr,
                .count = count,
                .string = options->string,
                .width = options->width,
        };

        if (count == 0)
                return job;
        if (options->ring == 0) {
                choose(options)(&job);
        } else if (!ring3_call(choose(options), &job)) {
                print("error: %s in ring 3\n", exception_name(last_fault.vector));
                finish(FAULT);
        }
        return job;
}

static void measure(const struct options *options)
{
        struct job job;

        run(options, options->warmup);
        job = run(options, options->count);
        print("exits kind=%s op=%s width=%lu %s=0x%lx count=%lu string=%lu straddle=%lu "
              "ring=%lu cycles=%lu sum=0x%lx\n",
              options->kind == PIO ? "pio" : "mmio", options->op == READ ? "read" : "write",
              options->width, options->kind == PIO ? "port" : "addr", job.where, options->count,
              options->string, options->straddle, options->ring, job.cycles, job.sum);
}

void guest_main(uint64_t start_info)
{
        struct options options;

        console_init();
        trap_init();
        read_start_info(start_info);
        options = parse_options(boot.command_line);
        if (options.kind == SPIN)
                spin(&options);
        else
                measure(&options);
        finish(0);
}
