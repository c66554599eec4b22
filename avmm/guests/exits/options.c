#include "options.h"

#include "console.h"
#include "finish.h"
#include "job.h"
#include "text.h"

#define BAD_COMMAND_LINE 2

static const struct key {
        const char *name;
        uint64_t offset;
        const char *words[3];   /* instead of numbers: the place of the word is the value */
} keys[] = {
        { "kind", offsetof(struct options, kind), { "pio", "mmio", "spin" } },
        { "op", offsetof(struct options, op), { "write", "read" } },
        { "width", offsetof(struct options, width), {} },
        { "port", offsetof(struct options, port), {} },
        { "addr", offsetof(struct options, addr), {} },
        { "count", offsetof(struct options, count), {} },
        { "string", offsetof(struct options, string), {} },
        { "straddle", offsetof(struct options, straddle), {} },
        { "ring", offsetof(struct options, ring), {} },
        { "warmup", offsetof(struct options, warmup), {} },
};

static _Noreturn void fail(const char *why, const char *what)
{
        print("error: %s%s\n", why, what);
        finish(BAD_COMMAND_LINE);
}

static bool parse_value(const struct key *key, const char *text, uint64_t *value)
{
        if (!key->words[0])
                return parse_number(text, value);
        for (uint64_t i = 0; i < 3 && key->words[i]; i++) {
                if (same(text, key->words[i])) {
                        *value = i;
                        return true;
                }
        }
        return false;
}

static void parse_option(struct options *options, char *word)
{
        char *value = word;

        while (*value && *value != '=')
                value++;
        if (!*value)
                fail("not key=value: ", word);
        *value++ = '\0';

        for (unsigned i = 0; i < sizeof(keys) / sizeof(*keys); i++) {
                if (!same(word, keys[i].name))
                        continue;
                if (!parse_value(&keys[i], value, (void *)((char *)options + keys[i].offset)))
                        fail("bad value for ", word);
                return;
        }
        fail("unknown key: ", word);
}

static void check(const struct options *o)
{
        const uint64_t w = o->width;

        if (w != 1 && w != 2 && w != 4 && w != 8)
                fail("width must be 1, 2, 4 or 8", "");
        if (o->kind == PIO && w == 8)
                fail("width 8 is for mmio only", "");
        if (o->kind == PIO && o->port > 0xffff)
                fail("port is above 0xffff", "");
        if (o->kind == MMIO && o->addr > 0xfffff000)
                fail("addr is not below 4 GiB less a page", "");
        if (o->string && (o->kind != PIO || o->string > STRING_BYTES / w))
                fail("string is for pio only, and up to 16384 bytes", "");
        if (o->straddle > 1 || (o->straddle && (o->kind != MMIO || w == 1)))
                fail("straddle is 0 or 1, and for mmio of 2 bytes or more", "");
        if ((o->ring != 0 && o->ring != 3) || (o->ring && o->kind == SPIN))
                fail("ring must be 0 or 3, and 0 for spin", "");
}

struct options parse_options(char *command_line)
{
        struct options options = {
                .width = 1,
                .port = 0xe0,
                .addr = 0xd0000000,
                .count = 10000,
        };
        char *word;

        while ((word = next_word(&command_line)))
                parse_option(&options, word);
        check(&options);
        if (options.straddle)
                options.addr = (options.addr | 4095) + 1 - options.width / 2;
        return options;
}
