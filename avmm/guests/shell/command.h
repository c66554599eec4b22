/*
 * A command: its name, its help, and the function that runs it.
 */
#pragma once

#include <stdbool.h>

struct command {
        const char *name, *arguments, *help;

        /* False if the arguments make no sense; the usage is shown then. */
        bool (*run)(char *arguments, int width);

        /* Accepts a suffix .b .w .l .q for the width of the access. Without one it is 4 bytes. */
        bool sized;
};

extern const struct command commands[];
extern const int command_count;

void run_command(char *line);

/*
 * Whether a long-running command should end. Ctrl-C always ends it. Any other key ends it only if
 * it has no limit of its own; if it has one, waiting input (such as a script on a pipe) is meant
 * for the next command.
 */
bool should_stop(bool on_any_key);

/*
 * Removes the key that stopped the command from the input, except a Ctrl-C, which is left for the
 * shell.
 */
void swallow_key(bool on_any_key);

bool echo_command(char *arguments, int width);
bool count_command(char *arguments, int width);
bool uptime_command(char *arguments, int width);
bool mem_command(char *arguments, int width);
bool sum_command(char *arguments, int width);
bool burn_command(char *arguments, int width);
bool cpus_command(char *arguments, int width);
bool peek_command(char *arguments, int width);
bool poke_command(char *arguments, int width);
bool in_command(char *arguments, int width);
bool out_command(char *arguments, int width);
bool reboot_command(char *arguments, int width);
bool crash_command(char *arguments, int width);
bool exit_command(char *arguments, int width);
