/*
 * burn: dirties memory at a given rate, with one write per page, to test programs that copy the
 * memory meanwhile.
 */
#include "clock.h"
#include "command.h"
#include "console.h"
#include "fault.h"
#include "ram.h"
#include "text.h"
#include "trap.h"

#define PAGE            4096
#define MIB             (1024 * 1024)
#define BURST           4096            /* pages between two looks at the clock and the keyboard */

/* The pages of one range, which are written to in turn, for ever. */
struct burn {
        struct memory_range range;
        uint64_t page;                  /* the next one to write to */
        uint64_t pages;                 /* how many to write now */
        uint64_t written;
};

/* Runs in ring 3. */
static void dirty(void *argument)
{
        struct burn *burn = argument;

        for (uint64_t i = 0; i < burn->pages; i++) {
                *(volatile uint64_t *)burn->page = ++burn->written;
                burn->page += PAGE;
                if (burn->page >= burn->range.start + burn->range.size)
                        burn->page = burn->range.start;
        }
}

static struct memory_range largest_free_part(void)
{
        struct memory_range largest = { 0, 0, 0 };

        for (int i = 0; i < boot.range_count; i++) {
                struct memory_range r = free_part(&boot.ranges[i]);

                r.start = (r.start + PAGE - 1) & -PAGE;
                if (r.size > largest.size)
                        largest = r;
        }
        largest.size &= -PAGE;
        return largest;
}

/*
 * Writes to as many pages as the clock allows, until `ticks` have passed or, if that is 0, for
 * ever.
 */
static uint64_t burn_for(struct burn *burn, uint64_t pages_per_second, uint64_t ticks)
{
        const uint64_t begin = clock_ticks;
        uint64_t elapsed = 0;

        while (!should_stop(!ticks)) {
                uint64_t due;

                elapsed = clock_ticks - begin;
                if (ticks && elapsed >= ticks)
                        break;
                due = (elapsed + 1) * pages_per_second / CLOCK_HZ;
                if (burn->written < due) {
                        burn->pages = due - burn->written;
                        if (burn->pages > BURST)
                                burn->pages = BURST;
                        if (!ring3_call(dirty, burn)) {
                                print_fault();
                                break;
                        }
                } else {
                        clock_wait();
                }
        }
        return elapsed;
}

bool burn_command(char *arguments, int width)
{
        const char *rate_word = next_word(&arguments), *seconds_word = next_word(&arguments);
        struct burn burn = { .range = largest_free_part() };
        uint64_t rate, seconds = 0, ticks;

        (void)width;
        if (!rate_word || next_word(&arguments) || !parse_number(rate_word, &rate) ||
            (seconds_word && (!parse_number(seconds_word, &seconds) || !seconds)) ||
            rate == 0 || rate > MIB || seconds > UINT32_MAX)
                return false;
        if (!burn.range.size) {
                print("there is no free memory to burn\n");
                return true;
        }
        if (!clock_runs()) {
                print("the timer is not ticking, so the rate cannot be kept\n");
                return true;
        }

        print("dirtying %lu MiB a second, in turn, of %lu MiB at 0x%lx; %s stops\n", rate,
              burn.range.size / MIB, burn.range.start, seconds ? "Ctrl-C" : "any key");
        burn.page = burn.range.start;
        ticks = burn_for(&burn, rate * MIB / PAGE, seconds * CLOCK_HZ);
        swallow_key(!seconds);
        print("wrote to %lu pages, %lu MiB, in %lu.%02lu s", burn.written,
              burn.written * PAGE / MIB, ticks / CLOCK_HZ, ticks % CLOCK_HZ);
        if (ticks)
                print(": %lu MiB/s", burn.written * PAGE * CLOCK_HZ / MIB / ticks);
        print("\n");
        return true;
}
