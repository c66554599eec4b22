/*
 * One stream connection to the host, by a virtio socket device: VIRTIO 1.2, 5.10.
 *
 * It is polled: only vsock_poll() takes packets from the device and answers them.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum vsock_state {
        VSOCK_CLOSED,   /* no connection: refused, reset, or lost with the old host */
        VSOCK_ASKED,    /* the host has not answered yet */
        VSOCK_OPEN,
        VSOCK_ENDED,    /* ended in order: all that the host sent has arrived */
};

/* False if the command line names no such device. */
bool vsock_start(void);

/*
 * Ends the connection and resets the device. The end is in order if the host agrees within
 * seconds.
 */
void vsock_stop(void);

/* Asks the host for a new connection, which replaces the old one. */
void vsock_connect(uint32_t host_port);

/* Takes packets from the host, and answers them. */
enum vsock_state vsock_poll(void);

/* Sends all of it (at most VSOCK_MOST bytes), or returns false if there is no room for it now. */
#define VSOCK_MOST      64
bool vsock_send(const void *data, uint32_t size);

/* Takes up to `size` received bytes, and returns how many there were. */
uint32_t vsock_receive(char *data, uint32_t size);

/*
 * Tells the host that nothing more will be sent. Returns false if there is no room for that now.
 */
bool vsock_send_end(void);
