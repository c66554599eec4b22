/*
 * Command lines of words key=value.
 *
 * Numbers are decimal or 0x hexadecimal. What makes no sense ends the guest with an error line.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct key {
        const char *name;
        uint64_t offset;        /* of its uint64_t in the structure of all values */
        const char *words[3];   /* instead of numbers: the place of the word is the value ... */
};

#define ANY_WORD        "*"     /* ... as the only one: somebody else reads the value */

/* Changes the text. A value that is not named keeps what it has. The last key has no name. */
void parse_keys(char *command_line, const struct key *keys, void *values);

_Noreturn void bad_command_line(const char *why, const char *what);
