/*
 * The first virtio disk, one request at a time: VIRTIO 1.2, 5.2.
 *
 * It is polled, and a request takes as long as the disk does: nothing cuts it short, for the
 * memory is the device's until it comes back.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define SECTOR_SIZE     512

/* Starts it, unless it runs already. False: the command line names none. */
bool block_init(void);

uint64_t block_sectors(void);

/* One sector. False: the disk reports an error. */
bool block_read(uint64_t sector, void *data);
bool block_write(uint64_t sector, const void *data);

/* What was written is there for good. */
bool block_flush(void);
