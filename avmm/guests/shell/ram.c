#include "ram.h"

#define REACH   (1ull << 32)

extern const char image_end[];

struct memory_range free_part(const struct memory_range *range)
{
        uint64_t start = range->start, end = range->start + range->size;

        if (start < (uint64_t)image_end)
                start = (uint64_t)image_end;
        if (end > REACH)
                end = REACH;
        if (range->type != MEMORY_RAM || start >= end)
                return (struct memory_range){ 0, 0, 0 };
        return (struct memory_range){ start, end - start, MEMORY_RAM };
}

uint64_t total_ram(void)
{
        uint64_t total = 0;

        for (int i = 0; i < boot.range_count; i++)
                if (boot.ranges[i].type == MEMORY_RAM)
                        total += boot.ranges[i].size;
        return total;
}
