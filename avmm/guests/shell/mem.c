/*
 * mem: prints the memory map, and which part of it is free.
 */
#include "command.h"
#include "console.h"
#include "ram.h"
#include "text.h"

bool mem_command(char *arguments, int width)
{
        static const char *const types[] = { "?", "RAM", "reserved", "ACPI", "ACPI NVS", "bad" };

        (void)width;
        if (next_word(&arguments))
                return false;
        if (boot.range_count == 0)
                print("the loader has passed no memory map\n");
        for (int i = 0; i < boot.range_count; i++) {
                const struct memory_range *r = &boot.ranges[i];

                print("  0x%012lx - 0x%012lx %10lu KiB  %s\n", r->start, r->start + r->size - 1,
                      r->size / 1024, types[r->type < 6 ? r->type : 0]);
        }
        for (int i = 0; i < boot.range_count; i++) {
                const struct memory_range r = free_part(&boot.ranges[i]);

                if (r.size)
                        print("  0x%012lx - 0x%012lx %10lu KiB  free (for sum and burn)\n",
                              r.start, r.start + r.size - 1, r.size / 1024);
        }
        return true;
}
