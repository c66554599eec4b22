#include "console.h"

#include <stdarg.h>
#include <stdbool.h>

#include "boot.h"
#include "hvc.h"
#include "serial.h"
#include "text.h"

void console_init(void)
{
        serial_init();
}

bool console_is_virtual;

void console_choose(void)
{
        static char text[sizeof(boot.command_line)];
        char *rest = text, *word;
        bool wanted = false;

        copy_text(text, boot.command_line, sizeof(text));
        while ((word = next_word(&rest)))
                wanted |= same(word, "console=hvc0");
        console_is_virtual = wanted && hvc_init();
}

void console_drain(void)
{
        if (console_is_virtual)
                hvc_drain();
}

/* A virtio console is notified only when the whole text is in its buffer. */
static void put(char c)
{
        if (console_is_virtual)
                hvc_put(c);
        else
                serial_put(c);
}

static void flush(void)
{
        if (console_is_virtual)
                hvc_flush();
}

static void put_text(const char *s)
{
        for (; *s; s++) {
                if (*s == '\n')
                        put('\r');
                put(*s);
        }
}

void put_char(char c)
{
        put(c);
        flush();
}

void put_string(const char *s)
{
        put_text(s);
        flush();
}

static void put_padded(const char *s, int width, char fill, bool left)
{
        for (const char *c = s; *c; c++)
                width--;
        for (; !left && width > 0; width--)
                put(fill);
        put_text(s);
        for (; width > 0; width--)
                put(' ');
}

void print(const char *format, ...)
{
        va_list arguments;

        va_start(arguments, format);
        for (const char *f = format; *f; f++) {
                char text[NUMBER_SIZE] = "", *s = text, fill = ' ';
                bool left = false, is_long = false;
                int width = 0;

                if (*f != '%') {
                        if (*f == '\n')
                                put('\r');
                        put(*f);
                        continue;
                }
                f++;
                if (*f == '-') {
                        left = true;
                        f++;
                }
                if (*f == '0') {
                        fill = '0';
                        f++;
                }
                while (*f >= '0' && *f <= '9')
                        width = width * 10 + *f++ - '0';
                if (*f == 'l') {
                        is_long = true;
                        f++;
                }

                if (*f == 's') {
                        s = va_arg(arguments, char *);
                } else if (*f == 'c') {
                        text[0] = va_arg(arguments, int);
                } else if (*f == 'u' || *f == 'x') {
                        const uint64_t n = is_long ? va_arg(arguments, uint64_t)
                                                   : va_arg(arguments, uint32_t);

                        s = number_text(text, n, *f == 'u' ? 10 : 16);
                } else {
                        text[0] = *f;
                }
                put_padded(s, width, fill, left);
        }
        va_end(arguments);
        flush();
}
