/*
 * The console: the way out. The way in is input.h. It is serial, a 16550 at 0x3f8, until a command
 * line that says console=hvc0 and names a virtio console makes it that.
 */
#pragma once

#include <stdbool.h>

void console_init(void);

/* After read_start_info(). */
void console_choose(void);

extern bool console_is_virtual;

/* All that was put is with the device: before a guest's end. */
void console_drain(void);

void put_char(char c);

/* "\n" becomes "\r\n", for the terminal at the other end is likely to be raw. */
void put_string(const char *s);

/* %s %c %u %lu %x %lx %%, with '-', '0' and a width. */
__attribute__((format(printf, 1, 2))) void print(const char *format, ...);
