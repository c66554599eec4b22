#include "options.h"

#include "keys.h"
#include "window.h"

static const struct key keys[] = {
        { "loops", offsetof(struct options, loops), {} },
        { "cpus", offsetof(struct options, cpus), {} },
        { "long", offsetof(struct options, long_strings), { "0", "1" } },
        { "sse", offsetof(struct options, sse), { "0", "1" } },
        { "msr", offsetof(struct options, msr), {} },
        { "hypercall", offsetof(struct options, hypercall), { "0", "1" } },
        { "verbose", offsetof(struct options, verbose), { "0", "1" } },
        {},
};

static void check(const struct options *o)
{
        if (o->loops == 0)
                bad_command_line("loops is 0", "");
        if (o->cpus == 0 || o->cpus > MOST_CPUS)
                bad_command_line("cpus must be 1 to 15", "");
        if (o->msr > UINT32_MAX - MOST_CPUS)
                bad_command_line("msr is not a number of 32 bits", "");
}

struct options parse_options(char *command_line)
{
        struct options options = { .loops = 1, .cpus = 1, .sse = 1 };

        parse_keys(command_line, keys, &options);
        check(&options);
        return options;
}
