/*
 * peek, poke, in and out: one access of 1, 2, 4 or 8 bytes.
 */
#include "command.h"
#include "console.h"
#include "cpu.h"
#include "fault.h"
#include "text.h"
#include "trap.h"

/* Parses exactly this many numbers, each within its width. */
static bool parse_numbers(char *arguments, uint64_t *numbers, int count)
{
        for (int i = 0; i < count; i++) {
                const char *word = next_word(&arguments);

                if (!word || !parse_number(word, &numbers[i]))
                        return false;
        }
        return !next_word(&arguments);
}

static bool fits(uint64_t value, int width)
{
        return width == 8 || value >> 8 * width == 0;
}

static void print_value(uint64_t value, int width)
{
        print(width == 1 ? "0x%02lx\n" : width == 2 ? "0x%04lx\n" :
              width == 4 ? "0x%08lx\n" : "0x%016lx\n", value);
}

bool peek_command(char *arguments, int width)
{
        struct access access;
        uint64_t address;

        if (!parse_numbers(arguments, &address, 1))
                return false;
        access = guarded_load(address, width);
        if (access.faulted)
                print_fault();
        else
                print_value(access.value, width);
        return true;
}

bool poke_command(char *arguments, int width)
{
        uint64_t numbers[2];

        if (!parse_numbers(arguments, numbers, 2) || !fits(numbers[1], width))
                return false;
        if (guarded_store(numbers[0], width, numbers[1]).faulted)
                print_fault();
        return true;
}

bool in_command(char *arguments, int width)
{
        uint64_t port;

        if (!parse_numbers(arguments, &port, 1) || !fits(port, 2) || width == 8)
                return false;
        print_value(width == 1 ? in8(port) : width == 2 ? in16(port) : in32(port), width);
        return true;
}

bool out_command(char *arguments, int width)
{
        uint64_t numbers[2];

        if (!parse_numbers(arguments, numbers, 2) || !fits(numbers[0], 2) ||
            !fits(numbers[1], width) || width == 8)
                return false;
        if (width == 1)
                out8(numbers[0], numbers[1]);
        else if (width == 2)
                out16(numbers[0], numbers[1]);
        else
                out32(numbers[0], numbers[1]);
        return true;
}
