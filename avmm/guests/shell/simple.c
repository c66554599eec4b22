/*
 * Commands of a line or two each.
 */
#include "clock.h"
#include "command.h"
#include "console.h"
#include "finish.h"
#include "text.h"

bool echo_command(char *arguments, int width)
{
        (void)width;
        put_string(arguments);
        put_string("\n");
        return true;
}

bool uptime_command(char *arguments, int width)
{
        uint64_t ticks, seconds;

        (void)width;
        if (next_word(&arguments))
                return false;
        if (!clock_runs())
                print("the timer is not ticking: no interrupt comes from the PIT\n");
        ticks = clock_uptime();
        seconds = ticks / CLOCK_HZ;
        print("up %lu:%02lu:%02lu.%02lu\n", seconds / 3600, seconds / 60 % 60, seconds % 60,
              ticks % CLOCK_HZ);
        return true;
}

bool reboot_command(char *arguments, int width)
{
        (void)width;
        if (next_word(&arguments))
                return false;
        reboot();
}

bool crash_command(char *arguments, int width)
{
        (void)width;
        if (next_word(&arguments))
                return false;
        triple_fault();
}

bool exit_command(char *arguments, int width)
{
        const char *word = next_word(&arguments);
        uint64_t status = 0;

        (void)width;
        if ((word && !parse_number(word, &status)) || next_word(&arguments) ||
            status > UINT32_MAX)
                return false;
        finish(status);
}
