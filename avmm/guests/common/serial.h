/*
 * Output through the 16550 at 0x3f8. input.h is for input.
 */
#pragma once

void serial_init(void);

/* Waits for room in the transmit FIFO. */
void serial_put(char c);
