/*
 * THRE says that the transmit FIFO is empty, so after one look at it sixteen characters can be
 * sent. That takes half as many exits as looking every time.
 */
#include "serial.h"

#include "cpu.h"
#include "uart.h"

static int fifo_depth, fifo_room;

void serial_init(void)
{
        out8(UART_IER, 0);
        out8(UART_LCR, LCR_DIVISOR);
        out8(UART_DATA, 1);             /* 115200 baud */
        out8(UART_IER, 0);
        out8(UART_LCR, LCR_8N1);

        /*
         * Turning the FIFOs on throws away what has come in. A sender that looks at RTS has sent
         * nothing yet, because RTS is still low. For a sender that does not, losing everything is
         * better than keeping half a command.
         */
        if (!(in8(UART_LSR) & LSR_RECEIVED))
                out8(UART_FCR, FCR_ENABLE);
        out8(UART_MCR, MCR_READY);
        fifo_depth = (in8(UART_IIR) & IIR_FIFO) == IIR_FIFO ? 16 : 1;
}

void serial_put(char c)
{
        if (fifo_room == 0) {
                while (!(in8(UART_LSR) & LSR_THRE))
                        pause();
                fifo_room = fifo_depth;
        }
        fifo_room--;
        out8(UART_DATA, c);
}
