/*
 * Registers of the 16550.
 */
#pragma once

#define UART            0x3f8
#define UART_DATA       (UART + 0)
#define UART_IER        (UART + 1)
#define UART_FCR        (UART + 2)
#define UART_IIR        (UART + 2)
#define UART_LCR        (UART + 3)
#define UART_MCR        (UART + 4)
#define UART_LSR        (UART + 5)

#define IER_RECEIVED    0x01
#define FCR_ENABLE      0x07    /* and empty both FIFOs */
#define IIR_FIFO        0xc0
#define LCR_8N1         0x03
#define LCR_DIVISOR     0x80
#define MCR_READY       0x0b    /* DTR, RTS, and OUT2, which gates the interrupt line */
#define LSR_RECEIVED    0x01
#define LSR_THRE        0x20
