/*
 * The first virtio disk, one request at a time: VIRTIO 1.2, 5.2.
 *
 * The device is polled. A request takes as long as the disk takes. It cannot be cancelled, because
 * its memory belongs to the device until the request comes back.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define SECTOR_SIZE     512

/* Starts the disk, unless it runs already. False if the command line names no disk. */
bool block_init(void);

uint64_t block_sectors(void);

/* Reads or writes one sector. False if the disk reports an error. */
bool block_read(uint64_t sector, void *data);
bool block_write(uint64_t sector, const void *data);

/* Makes everything that was written durable. */
bool block_flush(void);
