#pragma once

#include "options.h"

/*
 * kind=spin: every CPU counts in a word of its own, at SPIN_COUNTERS + 64 * cpu, until the boot
 * processor has counted to `count`. With 0 they count for ever, for a host that watches them.
 */
#define SPIN_COUNTERS   0x9000

void spin(const struct options *options);
