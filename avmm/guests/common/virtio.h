/*
 * virtio-mmio devices with split rings: VIRTIO 1.2, 4.2 and 2.7. Of features VERSION_1, and
 * what of the device's own its driver wants.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define VIRTIO_BLOCK            2
#define VIRTIO_CONSOLE          3
#define VIRTIO_SOCKET           19
#define VIRTQUEUE_SIZE          64      /* at most */

struct virtio_device {
        uint64_t base;
        uint32_t id;
        int irq;                        /* of the two 8259s */
        uint32_t features;              /* what was wanted and is there */
};

struct virtqueue {
        struct {
                uint64_t address;
                uint32_t length;
                uint16_t flags, next;
        } descriptors[VIRTQUEUE_SIZE];
        volatile struct {
                uint16_t flags, index, ring[VIRTQUEUE_SIZE];
        } available;
        volatile struct {
                uint16_t flags, index;
                struct {
                        uint32_t slot, length;
                } ring[VIRTQUEUE_SIZE];
        } used __attribute__((aligned(4)));
        uint16_t size;                  /* a power of two; slots are below it */
        uint16_t taken;                 /* of the used ring, by us */
        uint16_t number;
        const struct virtio_device *device;
} __attribute__((aligned(16)));

/* The first such device of those that the command line names, as for Linux. */
bool virtio_find(uint32_t id, struct virtio_device *device);

/*
 * Sets the device up with these queues, all zero, and those of the wanted features (0 to 31) that
 * it has; interrupts are the caller's. False: it refuses.
 */
bool virtio_start(struct virtio_device *device, uint32_t wanted, struct virtqueue *queues,
                  int count);

/* Resets the device, so that it touches none of this memory any more, and the queues. */
void virtio_stop(const struct virtio_device *device, struct virtqueue *queues, int count);

/* Once for each interrupt, before the used rings are looked at. */
void virtio_acknowledge(const struct virtio_device *device);

/* No interrupt for what comes back by this queue. */
void virtqueue_silence(struct virtqueue *queue);

/* The device's configuration, 8 bytes of it. */
uint64_t virtio_config(const struct virtio_device *device, uint32_t offset);

/* A piece of a request, for the device to read or (is_input) to write. */
struct virtio_part {
        const void *data;
        uint32_t length;
        bool is_input;
};

/* Gives the device a request in the descriptors from `slot` on, one a part. */
void virtqueue_offer(struct virtqueue *queue, uint16_t slot, const struct virtio_part *parts,
                     int count);
void virtqueue_notify(const struct virtqueue *queue);

/* Has the device not said that it looks at the queue anyway? */
bool virtqueue_wants_notify(const struct virtqueue *queue);

/* The first slot of a request that has come back, and how much the device wrote; -1: none. */
int virtqueue_take(struct virtqueue *queue, uint32_t *length);
