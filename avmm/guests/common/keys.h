/*
 * Command lines of words key=value.
 *
 * Numbers are decimal or 0x hexadecimal. A word that makes no sense ends the guest with an error
 * line.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct key {
        const char *name;
        uint64_t offset;        /* of the uint64_t for its value, in the structure of all values */
        const char *words[3];   /* if it takes words: its value is a word's position ... */
};

#define ANY_WORD        "*"     /* ... as the only word: the value is read elsewhere */

/* Changes the text. Values that are not named stay as they are. The last key has no name. */
void parse_keys(char *command_line, const struct key *keys, void *values);

_Noreturn void bad_command_line(const char *why, const char *what);
