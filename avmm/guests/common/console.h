/*
 * The serial console, a 16550 at 0x3f8: the way out. The way in is input.h.
 */
#pragma once

void console_init(void);

void put_char(char c);

/* "\n" becomes "\r\n", for the terminal at the other end is likely to be raw. */
void put_string(const char *s);

/* %s %c %u %lu %x %lx %%, with '-', '0' and a width. */
__attribute__((format(printf, 1, 2))) void print(const char *format, ...);
