/*
 * A command: a name, its help, and what to do.
 */
#pragma once

#include <stdbool.h>

struct command {
        const char *name, *arguments, *help;

        /* False: the arguments make no sense, show how it is used. */
        bool (*run)(char *arguments, int width);

        /* Takes a suffix .b .w .l .q for the width of the access; without one it is 4 bytes. */
        bool sized;
};

extern const struct command commands[];
extern const int command_count;

void run_command(char *line);

/*
 * Whether a command that may take long should end: always on Ctrl-C, and on any other key, too,
 * if nothing else would end it. Not so if it has a limit, for then input that waits (a script
 * on a pipe, say) is meant for the next command.
 */
bool should_stop(bool on_any_key);

/* Takes the key that has stopped it away; but leaves a Ctrl-C to the shell. */
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
