/*
 * One stream connection to the host, by a virtio socket device: VIRTIO 1.2, 5.10.
 *
 * It is polled: nothing is taken from the device and nothing answered but by vsock_poll().
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum vsock_state {
        VSOCK_CLOSED,   /* there is none (any more): refused, reset, or lost with its host */
        VSOCK_ASKED,    /* the host has not answered yet */
        VSOCK_OPEN,
        VSOCK_ENDED,    /* in order: the host receives no more; what it has sent is there */
};

/* False: the command line names no such device. */
bool vsock_start(void);

/* Ends the connection, in order if the host lets it within seconds, and resets the device. */
void vsock_stop(void);

/* Asks the host for a connection, instead of the one that there was. */
void vsock_connect(uint32_t host_port);

/* Takes and answers what has come from the host. */
enum vsock_state vsock_poll(void);

/* All of it (no more than VSOCK_MOST bytes), or false where there is no room for it just now. */
#define VSOCK_MOST      64
bool vsock_send(const void *data, uint32_t size);

/* How many bytes there were, up to `size`. */
uint32_t vsock_receive(char *data, uint32_t size);

/* Tells the host that nothing more will be sent; false where there is no room just now. */
bool vsock_send_end(void);
