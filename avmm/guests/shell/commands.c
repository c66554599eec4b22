/*
 * The table of commands, and the code that turns a line into a call of one.
 */
#include "command.h"

#include "console.h"
#include "input.h"
#include "text.h"

static bool help_command(char *arguments, int width);

const struct command commands[] = {
        { "help", "", "this list", help_command, false },
        { "echo", "TEXT", "print it", echo_command, false },
        { "uptime", "", "time since boot, and whether the timer ticks", uptime_command, false },
        { "cpus", "", "start all processors, interrupt each", cpus_command, false },
        { "mem", "", "memory map", mem_command, false },
        { "sum", "[ADDR LEN]", "checksum of memory, of all if not told", sum_command, false },
        { "burn", "N [SECONDS]", "dirty N MiB a second, for so long or until a key",
          burn_command, false },
        { "count", "[N] [TO...]", "number up to N or until a key; to serial hvc vsock disk",
          count_command, false },
        { "peek", "ADDR", "read memory; peek.b .w .l .q: 1 to 8 bytes", peek_command, true },
        { "poke", "ADDR VALUE", "write memory, likewise", poke_command, true },
        { "in", "PORT", "read a port; in.b .w .l: 1 to 4 bytes", in_command, true },
        { "out", "PORT VALUE", "write a port, likewise", out_command, true },
        { "reboot", "", "reset through the keyboard controller", reboot_command, false },
        { "crash", "", "triple fault", crash_command, false },
        { "exit", "[CODE]", "end, with this status or 0 (so does Ctrl-D)", exit_command, false },
};

const int command_count = sizeof(commands) / sizeof(*commands);

static bool help_command(char *arguments, int width)
{
        (void)width;
        if (next_word(&arguments))
                return false;
        for (const struct command *c = commands; c < commands + command_count; c++)
                print("  %-7s%-12s %s\n", c->name, c->arguments, c->help);
        print("Numbers are decimal or 0x hexadecimal. Ctrl-C stops a command.\n");
        return true;
}

bool should_stop(bool on_any_key)
{
        return interrupted || (on_any_key && key_pressed());
}

void swallow_key(bool on_any_key)
{
        if (on_any_key && key_pressed() && !interrupted)
                get_char();
}

/* Cuts the suffix off a word. Returns the width, -1 without a suffix, or 0 for an unknown one. */
static int cut_width(char *word)
{
        static const char suffixes[] = "bwlq";

        for (; *word; word++) {
                if (*word != '.')
                        continue;
                *word = '\0';
                for (int i = 0; i < 4; i++)
                        if (word[1] == suffixes[i] && word[2] == '\0')
                                return 1 << i;
                return 0;
        }
        return -1;
}

void run_command(char *line)
{
        char *word = next_word(&line);
        int width;

        if (!word)
                return;
        width = cut_width(word);
        for (const struct command *c = commands; c < commands + command_count; c++) {
                if (!same(word, c->name))
                        continue;
                if (width == 0 || (width > 0 && !c->sized))
                        print("no such suffix: %s takes %s\n", word,
                              c->sized ? ".b, .w, .l or .q" : "none");
                else if (!c->run(line, width < 0 ? 4 : width))
                        print("usage: %s %s\n", c->name, c->arguments);
                return;
        }
        print("%s? There is no such command; 'help' lists them all.\n", word);
}
