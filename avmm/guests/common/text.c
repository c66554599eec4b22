#include "text.h"

bool same(const char *a, const char *b)
{
        for (; *a && *a == *b; a++, b++)
                ;
        return *a == *b;
}

size_t length(const char *s)
{
        size_t n = 0;

        while (s[n])
                n++;
        return n;
}

void copy_text(char *to, const char *from, size_t size)
{
        for (; size > 1 && *from; size--)
                *to++ = *from++;
        *to = '\0';
}

char *next_word(char **rest)
{
        char *word = *rest, *end;

        while (*word == ' ' || *word == '\t')
                word++;
        for (end = word; *end && *end != ' ' && *end != '\t'; end++)
                ;
        *rest = *end ? end + 1 : end;
        *end = '\0';
        return *word ? word : NULL;
}

bool parse_number(const char *s, uint64_t *number)
{
        unsigned base = 10;
        uint64_t n = 0;

        if (s[0] == '0' && (s[1] | 0x20) == 'x') {
                base = 16;
                s += 2;
        }
        if (!*s)
                return false;
        for (; *s; s++) {
                const char c = *s | 0x20;       /* lower case; digits stay as they are */
                unsigned digit = base;

                if (c >= '0' && c <= '9')
                        digit = c - '0';
                else if (c >= 'a' && c <= 'f')
                        digit = c - 'a' + 10;
                if (digit >= base || n > (UINT64_MAX - digit) / base)
                        return false;
                n = n * base + digit;
        }
        *number = n;
        return true;
}

char *number_text(char text[NUMBER_SIZE], uint64_t number, unsigned base)
{
        char *at = text + NUMBER_SIZE - 1;

        *at = '\0';
        do
                *--at = "0123456789abcdef"[number % base];
        while (number /= base);
        return at;
}

void *memcpy(void *to, const void *from, size_t size)
{
        void *d = to;

        asm volatile("rep movsb" : "+D"(d), "+S"(from), "+c"(size) : : "memory");
        return to;
}

void *memset(void *to, int value, size_t size)
{
        void *d = to;

        asm volatile("rep stosb" : "+D"(d), "+c"(size) : "a"(value) : "memory");
        return to;
}

void *memmove(void *to, const void *from, size_t size)
{
        unsigned char *d = to;
        const unsigned char *s = from;

        if (d <= s || d >= s + size)
                return memcpy(to, from, size);
        while (size--)
                d[size] = s[size];
        return to;
}

int memcmp(const void *a, const void *b, size_t size)
{
        const unsigned char *x = a, *y = b;

        for (; size; size--, x++, y++)
                if (*x != *y)
                        return *x - *y;
        return 0;
}
