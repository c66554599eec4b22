/*
 * count on the first disk: number n is the text of sector n - 1. The sector must be empty before.
 * So the guest itself notices a number that was written twice or to the wrong place.
 */
#include "block.h"
#include "console.h"
#include "count.h"
#include "text.h"

#define SHOWN   32                      /* characters to show of a sector's wrong contents */

static uint64_t sector[SECTOR_SIZE / sizeof(uint64_t)];

static bool open_disk(void)
{
        if (block_init())
                return true;
        print("count: there is no virtio disk\n");
        return false;
}

static bool is_empty(void)
{
        uint64_t bits = 0;

        for (unsigned i = 0; i < SECTOR_SIZE / sizeof(*sector); i++)
                bits |= sector[i];
        return !bits;
}

/* The part of a sector to show: its first line, if it has one. */
static const char *shown(void)
{
        static char text[SHOWN + 1];
        const char *from = (const char *)sector;
        int size = 0;

        while (size < SHOWN && from[size] != '\n' && from[size] != '\0') {
                text[size] = from[size] >= ' ' && from[size] <= '~' ? from[size] : '?';
                size++;
        }
        text[size] = '\0';
        return text;
}

static enum progress step_disk(uint64_t *given, uint64_t last)
{
        const uint64_t where = *given;

        if (*given == last)
                return DONE;
        if (where >= block_sectors()) {
                print("count: the disk is full, it has %lu sectors\n", where);
                return FAILED;
        }
        if (!block_read(where, sector)) {
                print("count: sector %lu cannot be read\n", where);
                return FAILED;
        }
        if (!is_empty()) {
                print("count: sector %lu holds \"%s\"\n", where, shown());
                return FAILED;
        }
        count_line((char *)sector, ++*given);
        if (!block_write(where, sector)) {
                print("count: sector %lu cannot be written\n", where);
                return FAILED;
        }
        return GOES_ON;
}

static void close_disk(void)
{
        if (!block_flush())
                print("count: the disk cannot be flushed\n");
}

const struct channel count_on_disk = {
        .name = "disk", .open = open_disk, .step = step_disk, .close = close_disk,
};
