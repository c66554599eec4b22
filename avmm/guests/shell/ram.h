/*
 * The RAM that is free: everything that the start info calls RAM, above this image and below 4
 * GiB, where the guest's page tables end. Nothing in it changes by itself, so its checksum is the
 * same before and after a snapshot or a migration.
 */
#pragma once

#include "boot.h"

/* The part of a range that is free; size 0 if there is none. */
struct memory_range free_part(const struct memory_range *range);

uint64_t total_ram(void);
