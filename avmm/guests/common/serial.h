/*
 * The way out by the 16550 at 0x3f8. The way in is input.h.
 */
#pragma once

void serial_init(void);

/* Waits for room in the transmit FIFO. */
void serial_put(char c);
