#pragma once

#include "options.h"

/*
 * kind=spin: every CPU counts in a word of its own, at SPIN_COUNTERS + 64 * cpu, until the boot
 * processor has counted to `count` (0: for ever, for whoever watches from outside).
 */
#define SPIN_COUNTERS   0x9000

void spin(const struct options *options);
