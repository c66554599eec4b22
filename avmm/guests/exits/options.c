#include "options.h"

#include "job.h"
#include "keys.h"

static const struct key keys[] = {
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
        {},
};

static void check(const struct options *o)
{
        const uint64_t w = o->width;

        if (w != 1 && w != 2 && w != 4 && w != 8)
                bad_command_line("width must be 1, 2, 4 or 8", "");
        if (o->kind == PIO && w == 8)
                bad_command_line("width 8 is for mmio only", "");
        if (o->kind == PIO && o->port > 0xffff)
                bad_command_line("port is above 0xffff", "");
        if (o->kind == MMIO && o->addr > 0xfffff000)
                bad_command_line("addr is not below 4 GiB less a page", "");
        if (o->string && (o->kind != PIO || o->string > STRING_BYTES / w))
                bad_command_line("string is for pio only, and up to 16384 bytes", "");
        if (o->straddle > 1 || (o->straddle && (o->kind != MMIO || w == 1)))
                bad_command_line("straddle is 0 or 1, and for mmio of 2 bytes or more", "");
        if ((o->ring != 0 && o->ring != 3) || (o->ring && o->kind == SPIN))
                bad_command_line("ring must be 0 or 3, and 0 for spin", "");
}

struct options parse_options(char *command_line)
{
        struct options options = {
                .width = 1,
                .port = 0xe0,
                .addr = 0xd0000000,
                .count = 10000,
        };

        parse_keys(command_line, keys, &options);
        check(&options);
        if (options.straddle)
                options.addr = (options.addr | 4095) + 1 - options.width / 2;
        return options;
}
