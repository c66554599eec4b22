#include "keys.h"

#include "console.h"
#include "finish.h"
#include "text.h"

#define BAD_COMMAND_LINE 2

_Noreturn void bad_command_line(const char *why, const char *what)
{
        print("error: %s%s\n", why, what);
        finish(BAD_COMMAND_LINE);
}

static bool parse_value(const struct key *key, const char *text, uint64_t *value)
{
        if (!key->words[0])
                return parse_number(text, value);
        if (same(key->words[0], ANY_WORD))
                return true;
        for (uint64_t i = 0; i < 3 && key->words[i]; i++) {
                if (same(text, key->words[i])) {
                        *value = i;
                        return true;
                }
        }
        return false;
}

static void parse_word(char *word, const struct key *keys, void *values)
{
        char *value = word;

        while (*value && *value != '=')
                value++;
        if (!*value)
                bad_command_line("not key=value: ", word);
        *value++ = '\0';

        for (const struct key *key = keys; key->name; key++) {
                if (!same(word, key->name))
                        continue;
                if (!parse_value(key, value, (void *)((char *)values + key->offset)))
                        bad_command_line("bad value for ", word);
                return;
        }
        bad_command_line("unknown key: ", word);
}

void parse_keys(char *command_line, const struct key *keys, void *values)
{
        char *word;

        while ((word = next_word(&command_line)))
                parse_word(word, keys, values);
}
