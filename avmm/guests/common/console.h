/*
 * Output to the console. input.h is for its input. The console is the serial port, a 16550 at
 * 0x3f8, or, if the command line says console=hvc0 and names a virtio console, that console.
 */
#pragma once

#include <stdbool.h>

void console_init(void);

/* Call it after read_start_info(). */
void console_choose(void);

extern bool console_is_virtual;

/* Returns when the device has all output. Call it before the guest ends. */
void console_drain(void);

void put_char(char c);

/* "\n" becomes "\r\n", because the terminal at the other end is probably in raw mode. */
void put_string(const char *s);

/* Knows %s %c %u %lu %x %lx %%, with '-', '0' and a width. */
__attribute__((format(printf, 1, 2))) void print(const char *format, ...);
