/*
 * The first port of a virtio console, instead of the serial one.
 */
#pragma once

#include <stdbool.h>

/*
 * Starts the console, unless it runs already. False, without any effect, if the command line names
 * no virtio console.
 */
bool hvc_init(void);

/* Fetches input as long as there is room for it. Call it with interrupts off. */
void hvc_receive(void);

/* Listens from now on, as input_init() does for the serial port. */
void hvc_listen(void);

void hvc_put(char c);
void hvc_flush(void);

/* Waits a moment until the device has taken all output. Call it before the guest ends. */
void hvc_drain(void);
