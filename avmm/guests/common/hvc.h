/*
 * The first port of a virtio console, instead of the serial one.
 */
#pragma once

#include <stdbool.h>

/*
 * Starts it, unless it runs already. False where the command line names no virtio console: nothing
 * has happened then.
 */
bool hvc_init(void);

/* Fetches what has come in as long as there is room for it. With interrupts off. */
void hvc_receive(void);

/* Listens from now on; as input_init() for the serial port. */
void hvc_listen(void);

void hvc_put(char c);
void hvc_flush(void);

/* Waits a moment for the device to take all that was put: before a guest's end. */
void hvc_drain(void);
