/*
 * sum: a checksum of memory.
 *
 * It is 64-bit FNV-1a, but eight bytes at a time (little endian; the rest, if any, one by one), so
 * that it is limited by memory and not by the multiplier. It runs in ring 3, because some hosts
 * interpret ring 0.
 */
#include "clock.h"
#include "command.h"
#include "console.h"
#include "cpu.h"
#include "fault.h"
#include "input.h"
#include "ram.h"
#include "text.h"
#include "trap.h"

#define MIB             (1024 * 1024)
#define CHUNK           4096            /* bytes between two looks at Ctrl-C */
#define FNV_BASIS       0xcbf29ce484222325
#define FNV_PRIME       0x00000100000001b3

struct sum {
        uint64_t address, size;         /* of what is left */
        uint64_t hash, cycles;
};

static uint64_t step(uint64_t hash, uint64_t value)
{
        return (hash ^ value) * FNV_PRIME;
}

/* Runs in ring 3. */
static void sum_up(void *argument)
{
        struct sum *sum = argument;
        const uint64_t begin = tsc();

        while (sum->size && !interrupted) {
                const uint64_t size = sum->size < CHUNK ? sum->size : CHUNK;
                const uint64_t *word = (void *)sum->address;
                const uint8_t *byte = (void *)(sum->address + size / 8 * 8);
                uint64_t hash = sum->hash;

                for (uint64_t i = 0; i < size / 8; i++)
                        hash = step(hash, word[i]);
                for (uint64_t i = 0; i < size % 8; i++)
                        hash = step(hash, byte[i]);
                sum->hash = hash;
                sum->address += size;
                sum->size -= size;
        }
        sum->cycles += tsc() - begin;
}

/* False if it was stopped. */
static bool sum_range(struct sum *sum, uint64_t start, uint64_t size)
{
        sum->address = start;
        sum->size = size;
        if (!ring3_call(sum_up, sum))
                print_fault();
        return sum->size == 0;
}

bool sum_command(char *arguments, int width)
{
        const char *address = next_word(&arguments), *size = next_word(&arguments);
        struct sum sum = { .hash = FNV_BASIS };
        uint64_t start, total = 0, us;

        (void)width;
        if (address) {
                if (!size || next_word(&arguments) || !parse_number(address, &start) ||
                    !parse_number(size, &total))
                        return false;
                if (!sum_range(&sum, start, total))
                        return true;
        }
        for (int i = 0; !address && i < boot.range_count; i++) {
                const struct memory_range r = free_part(&boot.ranges[i]);

                if (!sum_range(&sum, r.start, r.size))
                        return true;
                total += r.size;
        }

        us = clock_microseconds(sum.cycles);
        print("sum 0x%016lx of ", sum.hash);
        print(total < MIB ? "%lu bytes" : "%lu MiB", total < MIB ? total : total / MIB);
        if (us)
                print(" in %lu.%06lu s (%lu MiB/s)", us / 1000000, us % 1000000,
                      total * 1000000 / MIB / us);
        print("\n");
        return true;
}
