/*
 * Functions for strings and numbers, as far as the guests need them.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

bool same(const char *a, const char *b);
size_t length(const char *s);

/* Copies as much as fits, and always ends it with a zero. */
void copy_text(char *to, const char *from, size_t size);

/* Cuts the next word off *rest, in place; NULL if there is none. */
char *next_word(char **rest);

/* Decimal, or hexadecimal with 0x; false unless all of s is one number of 64 bits. */
bool parse_number(const char *s, uint64_t *number);

/* Any number of 64 bits in decimal, and a zero. */
#define NUMBER_SIZE     21

/* Writes the number as digits at the end of `text`, and returns where they begin. */
char *number_text(char text[NUMBER_SIZE], uint64_t number, unsigned base);

/* The compiler may call these by itself. */
void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int value, size_t size);
void *memmove(void *to, const void *from, size_t size);
int memcmp(const void *a, const void *b, size_t size);
