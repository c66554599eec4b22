/*
 * The RAM that is free: what the start info calls RAM, above this image, below 4 GiB (that is as
 * far as our page tables go). Nothing in it changes by itself, so its checksum is the same
 * before and after a snapshot or a migration.
 */
#pragma once

#include "boot.h"

/* The part of a range that is free; size 0 if there is none. */
struct memory_range free_part(const struct memory_range *range);

uint64_t total_ram(void);
