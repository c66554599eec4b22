/*
 * The command line of the exits guest: words key=value, all optional.
 *
 *   kind=pio|mmio|spin   what to do                                           (pio)
 *   op=read|write                                                             (write)
 *   width=1|2|4|8        bytes of one access; 8 for mmio only                 (1)
 *   port=N, addr=N       where                                   (0xe0, 0xd0000000)
 *   count=N              accesses that are measured                           (10000)
 *   string=N             pio: each access is one REP INS or OUTS of N elements   (0)
 *   straddle=0|1         mmio: move the address so that the access crosses a page   (0)
 *   ring=0|3             where the loop runs                                  (0)
 *   warmup=N             accesses before the clock starts                     (0)
 *
 * Numbers are decimal or 0x hexadecimal.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum kind { PIO, MMIO, SPIN };
enum op { WRITE, READ };

struct options {
        uint64_t kind, op, width, port, addr, count, string, straddle, ring, warmup;
};

/* Changes the text. If the text makes no sense, prints an error line and ends the guest. */
struct options parse_options(char *command_line);
