/*
 * The PVH start info: https://xenbits.xen.org/docs/unstable/misc/pvh.html
 */
#include "boot.h"
#include "text.h"

#define START_MAGIC     0x336ec578

struct start_info {
        uint32_t magic, version, flags, module_count;
        uint64_t modules, command_line, rsdp;
        uint64_t memory_map;            /* from version 1 on */
        uint32_t memory_map_entries, reserved;
};

struct memory_map_entry {
        uint64_t start, size;
        uint32_t type, reserved;
};

struct boot boot;

void read_start_info(uint64_t address)
{
        const struct start_info *info = (void *)address;
        const struct memory_map_entry *map;

        if (!info || info->magic != START_MAGIC)
                return;
        if (info->command_line)
                copy_text(boot.command_line, (void *)info->command_line,
                          sizeof(boot.command_line));
        if (info->version < 1)
                return;
        map = (void *)info->memory_map;
        for (uint32_t i = 0; i < info->memory_map_entries && boot.range_count < MAX_RANGES; i++)
                if (map[i].size)        /* qboot appends an empty entry */
                        boot.ranges[boot.range_count++] =
                                (struct memory_range){ map[i].start, map[i].size, map[i].type };
}
