/*
 * A queue between the receive interrupt, which alone moves `head`, and the reader, which alone
 * moves `tail`. While it is full, further characters stay in the device, so the sender waits and
 * no character is lost. Later the reader fetches them, because the edge-triggered interrupt does
 * not come again.
 */
#include "input.h"

#include "console.h"
#include "cpu.h"
#include "hvc.h"
#include "irq.h"
#include "trap.h"
#include "uart.h"

#define IRQ_SERIAL      4
#define QUEUE           1024            /* a power of two */

static volatile unsigned head, tail;
static volatile bool left_behind;
static char queue[QUEUE];
static bool after_return;

volatile unsigned interrupted;

bool input_has_room(void)
{
        left_behind = head - tail == QUEUE;
        return !left_behind;
}

void input_put(char c)
{
        if (c == CTRL_C)
                interrupted++;
        if (c != '\n' || !after_return)
                queue[head++ % QUEUE] = c;
        after_return = c == '\r';
}

/* Call it with interrupts off. */
static void receive(void)
{
        if (console_is_virtual)
                hvc_receive();
        else
                while (in8(UART_LSR) & LSR_RECEIVED && input_has_room())
                        input_put(in8(UART_DATA));
}

static void on_receive(void)
{
        in8(UART_IIR);
        receive();
        irq_acknowledge(IRQ_SERIAL);
}

void input_init(void)
{
        if (console_is_virtual) {
                hvc_listen();
                return;
        }
        on_interrupt(VECTOR_IRQ + IRQ_SERIAL, on_receive);
        irq_enable(IRQ_SERIAL);
        out8(UART_IER, IER_RECEIVED);
        interrupts_off();
        receive();                      /* what came before we listened */
        interrupts_on();
}

bool key_pressed(void)
{
        return head != tail;
}

int get_char(void)
{
        char c;

        for (;;) {
                interrupts_off();
                if (key_pressed())
                        break;
                interrupts_on_and_wait();
        }
        c = queue[tail++ % QUEUE];
        if (c == CTRL_C)
                interrupted--;
        if (left_behind)
                receive();
        interrupts_on();
        return (unsigned char)c;
}
