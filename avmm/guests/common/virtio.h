/*
 * virtio-mmio devices with split rings: VIRTIO 1.2, 4.2 and 2.7. It negotiates VERSION_1 and those
 * features of the device that its driver asks for.
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
        uint32_t features;              /* the wanted ones that the device has */
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
        uint16_t taken;                 /* entries of the used ring that were taken */
        uint16_t number;
        const struct virtio_device *device;
} __attribute__((aligned(16)));

/* Finds the first such device among those that the command line names in Linux's form. */
bool virtio_find(uint32_t id, struct virtio_device *device);

/*
 * Sets the device up with these queues, which must be all zero, and with those wanted features (0
 * to 31) that it offers. The caller handles interrupts. Returns false if the device refuses.
 */
bool virtio_start(struct virtio_device *device, uint32_t wanted, struct virtqueue *queues,
                  int count);

/* Resets the queues, and the device, which no longer touches their memory. */
void virtio_stop(const struct virtio_device *device, struct virtqueue *queues, int count);

/* Call it once for each interrupt, before you look at the used rings. */
void virtio_acknowledge(const struct virtio_device *device);

/* Asks for no interrupts when requests come back in this queue. */
void virtqueue_silence(struct virtqueue *queue);

/* Reads 8 bytes of the device's configuration. */
uint64_t virtio_config(const struct virtio_device *device, uint32_t offset);

/* A part of a request, which the device reads or, if is_input, writes. */
struct virtio_part {
        const void *data;
        uint32_t length;
        bool is_input;
};

/* Gives the device a request, in one descriptor for each part, from `slot` on. */
void virtqueue_offer(struct virtqueue *queue, uint16_t slot, const struct virtio_part *parts,
                     int count);
void virtqueue_notify(const struct virtqueue *queue);

/* Does the device want to be notified? It may have said that it looks at the queue anyway. */
bool virtqueue_wants_notify(const struct virtqueue *queue);

/*
 * Takes a request that has come back. Returns its first slot, and in `length` how much the device
 * wrote. Returns -1 if there is none.
 */
int virtqueue_take(struct virtqueue *queue, uint32_t *length);
