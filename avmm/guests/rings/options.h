/*
 * The command line of the rings guest: words key=value, all optional but the device.
 *
 *   virtio_mmio.device=SIZE@BASE:IRQ    where to look for a device, as for Linux
 *   kind=block|console|notify           what to do                               (block)
 *   op=read|write                                                                (read)
 *   bytes=N                             of a request: up to 65536, for block whole sectors (4096)
 *   depth=N                             requests in flight, up to 16             (1)
 *   count=N                             requests that are measured               (1000)
 *   warmup=N                            requests before the clock starts         (0)
 *
 * Numbers are decimal or 0x hexadecimal.
 */
#pragma once

#include <stdint.h>

#define SECTOR          512
#define MOST_BYTES      65536
#define MOST_DEPTH      16

enum kind { BLOCK, CONSOLE, NOTIFY };
enum op { READ, WRITE };

struct options {
        uint64_t kind, op, bytes, depth, count, warmup;
};

/* Changes the text. If the text makes no sense, prints an error line and ends the guest. */
struct options parse_options(char *command_line);
