/*
 * Output to the console. THRE says that the transmit FIFO is empty, so one look at it is good
 * for sixteen characters: half the exits of asking every time.
 */
#include "console.h"

#include <stdarg.h>
#include <stdbool.h>

#include "boot.h"
#include "cpu.h"
#include "hvc.h"
#include "text.h"
#include "uart.h"

static int fifo_depth, fifo_room;

void console_init(void)
{
        out8(UART_IER, 0);
        out8(UART_LCR, LCR_DIVISOR);
        out8(UART_DATA, 1);             /* 115200 baud */
        out8(UART_IER, 0);
        out8(UART_LCR, LCR_8N1);

        /*
         * Turning the FIFOs on throws away what has come in. A sender that looks at RTS, which
         * is still down, has sent nothing; for one that does not, no FIFO is better than half a
         * command.
         */
        if (!(in8(UART_LSR) & LSR_RECEIVED))
                out8(UART_FCR, FCR_ENABLE);
        out8(UART_MCR, MCR_READY);
        fifo_depth = (in8(UART_IIR) & IIR_FIFO) == IIR_FIFO ? 16 : 1;
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

static void put_serial(char c)
{
        if (fifo_room == 0) {
                while (!(in8(UART_LSR) & LSR_THRE))
                        pause();
                fifo_room = fifo_depth;
        }
        fifo_room--;
        out8(UART_DATA, c);
}

/* A virtual one is told of characters when all of a text is there. */
static void put(char c)
{
        if (console_is_virtual)
                hvc_put(c);
        else
                put_serial(c);
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
                char text[24], *s = text + sizeof(text) - 1, fill = ' ';
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

                *s = '\0';
                if (*f == 's') {
                        s = va_arg(arguments, char *);
                } else if (*f == 'c') {
                        *--s = va_arg(arguments, int);
                } else if (*f == 'u' || *f == 'x') {
                        const unsigned base = *f == 'u' ? 10 : 16;
                        uint64_t n = is_long ? va_arg(arguments, uint64_t)
                                             : va_arg(arguments, uint32_t);

                        do
                                *--s = "0123456789abcdef"[n % base];
                        while (n /= base);
                } else {
                        *--s = *f;
                }
                put_padded(s, width, fill, left);
        }
        va_end(arguments);
        flush();
}
