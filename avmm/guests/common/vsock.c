/*
 * Each connection gets a port of its own, so that neither side takes packets for it that are still
 * under way, in either ring, for an older connection. After a TRANSPORT_RESET (5.10.6.6: the guest
 * has moved to another host) there is no connection, and the guest's CID may be different.
 *
 * The two rings must never wait for each other (5.10.6.1.1). So half of the slots for packets to
 * the host are reserved for answers, and a packet from the host is taken only if it can be
 * answered.
 */
#include "vsock.h"

#include <stddef.h>

#include "cpu.h"
#include "text.h"
#include "virtio.h"

#define FEATURE_STREAM  (1u << 0)
#define HOST            2
#define STREAM          1
#define NO_MORE_RECEIVED 1
#define NO_MORE_SENT    2
#define BOTH            (NO_MORE_RECEIVED | NO_MORE_SENT)
#define TRANSPORT_RESET 0
#define FIRST_PORT      1024
#define BUFFER          256             /* bytes from the host that may wait here */
#define PATIENCE        (1ull << 33)    /* TSC cycles, some seconds */

enum { RECEIVE, TRANSMIT, EVENT, QUEUES };

enum op { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };

struct packet {
        uint64_t from, to;
        uint32_t from_port, to_port, size;
        uint16_t type, op;
        uint32_t flags, room, taken;    /* the sender's credit for the receiver, in bytes */
        char data[VSOCK_MOST];
};

#define HEADER_SIZE     offsetof(struct packet, data)
#define PACKET_SIZE     (HEADER_SIZE + VSOCK_MOST)

static struct virtio_device device;
static struct virtqueue queues[QUEUES];
static struct packet received[VIRTQUEUE_SIZE], sent[VIRTQUEUE_SIZE];
static uint32_t events[VIRTQUEUE_SIZE];
static uint16_t spare[VIRTQUEUE_SIZE], spare_count;     /* slots of `sent` */

static uint64_t guest;                  /* our CID */
static enum vsock_state state;
static uint32_t port = FIRST_PORT, host_port;

static char input[BUFFER];
static uint32_t input_size;

/*
 * The guest's counters of bytes, which wrap: sent, taken from the host, and how much of that the
 * host knows about.
 */
static uint32_t bytes_sent, bytes_taken, bytes_told;
static uint32_t host_room, host_taken;
static bool has_asked;                  /* for credit, and has not heard of it since */

static void offer(int queue, uint16_t slot, const void *data, uint32_t size)
{
        const struct virtio_part part = { data, size, queue != TRANSMIT };

        virtqueue_offer(&queues[queue], slot, &part, 1);
}

bool vsock_start(void)
{
        if (!virtio_find(VIRTIO_SOCKET, &device) ||
            !virtio_start(&device, FEATURE_STREAM, queues, QUEUES))
                return false;
        for (int i = 0; i < QUEUES; i++)
                virtqueue_silence(&queues[i]);
        for (int slot = 0; slot < queues[EVENT].size; slot++)
                offer(EVENT, slot, &events[slot], sizeof(events[slot]));
        for (int slot = 0; slot < queues[RECEIVE].size; slot++)
                offer(RECEIVE, slot, &received[slot], PACKET_SIZE);
        virtqueue_notify(&queues[EVENT]);
        virtqueue_notify(&queues[RECEIVE]);
        for (spare_count = 0; spare_count < queues[TRANSMIT].size; spare_count++)
                spare[spare_count] = spare_count;
        guest = virtio_config(&device, 0);
        state = VSOCK_CLOSED;
        return true;
}

static void reclaim(void)
{
        uint32_t unused;
        int slot;

        while ((slot = virtqueue_take(&queues[TRANSMIT], &unused)) >= 0)
                spare[spare_count++] = slot;
}

/* There must be a spare slot. */
static void send_between(uint32_t from_port, uint32_t to_port, enum op op, uint32_t flags,
                         const void *data, uint32_t size)
{
        const uint16_t slot = spare[--spare_count];
        struct packet *packet = &sent[slot];

        packet->from = guest;
        packet->to = HOST;
        packet->from_port = from_port;
        packet->to_port = to_port;
        packet->size = size;
        packet->type = STREAM;
        packet->op = op;
        packet->flags = flags;
        packet->room = BUFFER;
        packet->taken = bytes_taken;
        memcpy(packet->data, data, size);
        offer(TRANSMIT, slot, packet, HEADER_SIZE + size);
        virtqueue_notify(&queues[TRANSMIT]);
}

static void send(enum op op, uint32_t flags, const void *data, uint32_t size)
{
        send_between(port, host_port, op, flags, data, size);
        bytes_told = bytes_taken;
}

static void reset(void)
{
        send(RST, 0, 0, 0);
        state = VSOCK_CLOSED;
}

/* A packet of the host for this connection. */
static void take(const struct packet *packet)
{
        if (packet->room != host_room || packet->taken != host_taken)
                has_asked = false;
        host_room = packet->room;
        host_taken = packet->taken;

        if (packet->op == RST) {
                state = VSOCK_CLOSED;
        } else if (packet->op == RESPONSE && state == VSOCK_ASKED) {
                state = VSOCK_OPEN;
        } else if (state != VSOCK_OPEN) {
                reset();
        } else if (packet->op == RW && packet->size <= BUFFER - input_size) {
                memcpy(input + input_size, packet->data, packet->size);
                input_size += packet->size;
        } else if (packet->op == SHUTDOWN) {
                if (packet->flags & NO_MORE_RECEIVED) {
                        reset();        /* which agrees to its end (5.10.6.5) */
                        state = VSOCK_ENDED;
                }
        } else if (packet->op == CREDIT_REQUEST) {
                send(CREDIT_UPDATE, 0, 0, 0);
        } else if (packet->op != CREDIT_UPDATE) {
                reset();
        }
}

static void take_any(const struct packet *packet, uint32_t length)
{
        if (length < HEADER_SIZE || packet->size > length - HEADER_SIZE ||
            packet->from != HOST || packet->to != guest)
                return;
        if (packet->type == STREAM && packet->from_port == host_port &&
            packet->to_port == port && (state == VSOCK_ASKED || state == VSOCK_OPEN))
                take(packet);
        else if (packet->op != RST)
                send_between(packet->to_port, packet->from_port, RST, 0, 0, 0);
}

static void take_events(void)
{
        uint32_t length;
        int slot;

        while ((slot = virtqueue_take(&queues[EVENT], &length)) >= 0) {
                if (length == sizeof(events[slot]) && events[slot] == TRANSPORT_RESET) {
                        guest = virtio_config(&device, 0);
                        state = VSOCK_CLOSED;
                }
                offer(EVENT, slot, &events[slot], sizeof(events[slot]));
                virtqueue_notify(&queues[EVENT]);
        }
}

enum vsock_state vsock_poll(void)
{
        bool returned = false;
        uint32_t length;
        int slot;

        take_events();
        for (reclaim(); spare_count; reclaim()) {
                slot = virtqueue_take(&queues[RECEIVE], &length);
                if (slot < 0)
                        break;
                take_any(&received[slot], length);
                offer(RECEIVE, slot, &received[slot], PACKET_SIZE);
                returned = true;
        }
        if (returned)
                virtqueue_notify(&queues[RECEIVE]);
        if (state == VSOCK_OPEN && spare_count && bytes_taken - bytes_told >= BUFFER / 2)
                send(CREDIT_UPDATE, 0, 0, 0);
        return state;
}

void vsock_connect(uint32_t to_port)
{
        port++;
        host_port = to_port;
        input_size = 0;
        bytes_sent = bytes_taken = bytes_told = host_room = host_taken = 0;
        has_asked = false;
        state = VSOCK_CLOSED;
        if (!spare_count)
                return;
        send(REQUEST, 0, 0, 0);
        state = VSOCK_ASKED;
}

bool vsock_send(const void *data, uint32_t size)
{
        if (state != VSOCK_OPEN || spare_count <= queues[TRANSMIT].size / 2)
                return false;
        if (bytes_sent - host_taken + size > host_room) {
                if (!has_asked)
                        send(CREDIT_REQUEST, 0, 0, 0);
                has_asked = true;
                return false;
        }
        send(RW, 0, data, size);
        bytes_sent += size;
        return true;
}

uint32_t vsock_receive(char *data, uint32_t size)
{
        if (size > input_size)
                size = input_size;
        memcpy(data, input, size);
        input_size -= size;
        memmove(input, input + size, input_size);
        bytes_taken += size;
        return size;
}

bool vsock_send_end(void)
{
        if (state != VSOCK_OPEN || !spare_count)
                return false;
        send(SHUTDOWN, NO_MORE_SENT, 0, 0);
        return true;
}

void vsock_stop(void)
{
        const uint64_t begin = tsc();
        bool is_told = false;

        while ((vsock_poll() == VSOCK_OPEN || spare_count < queues[TRANSMIT].size) &&
               tsc() - begin < PATIENCE) {
                if (state == VSOCK_OPEN && !is_told && spare_count) {
                        send(SHUTDOWN, BOTH, 0, 0);
                        is_told = true;
                }
                pause();
        }
        virtio_stop(&device, queues, QUEUES);
}
