#include "options.h"

#include "keys.h"

static const struct key keys[] = {
        { "virtio_mmio.device", 0, { ANY_WORD } },
        { "kind", offsetof(struct options, kind), { "block", "console", "notify" } },
        { "op", offsetof(struct options, op), { "read", "write" } },
        { "bytes", offsetof(struct options, bytes), {} },
        { "depth", offsetof(struct options, depth), {} },
        { "count", offsetof(struct options, count), {} },
        { "warmup", offsetof(struct options, warmup), {} },
        {},
};

struct options parse_options(char *command_line)
{
        struct options o = { .bytes = 4096, .depth = 1, .count = 1000 };

        parse_keys(command_line, keys, &o);
        if (!o.bytes || o.bytes > MOST_BYTES)
                bad_command_line("bytes must be 1 to 65536", "");
        if (o.kind == BLOCK && o.bytes % SECTOR)
                bad_command_line("bytes must be whole sectors of 512", "");
        if (!o.depth || o.depth > MOST_DEPTH)
                bad_command_line("depth must be 1 to 16", "");
        return o;
}
