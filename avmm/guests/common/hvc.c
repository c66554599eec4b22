#include "hvc.h"

#include <stdint.h>

#include "cpu.h"
#include "input.h"
#include "irq.h"
#include "layout.h"
#include "trap.h"
#include "virtio.h"

#define BYTES           128             /* of a slot */
#define PATIENCE        (1ull << 31)    /* TSC cycles, about a second */

enum { RECEIVE, TRANSMIT, QUEUES };

static struct virtio_device device;
static bool is_running;
static struct virtqueue queues[QUEUES];
static char received[VIRTQUEUE_SIZE][BYTES], sent[VIRTQUEUE_SIZE][BYTES];
static uint32_t filled;                 /* bytes of the slot that is being filled */
static uint16_t filling, in_flight;

/* Input for which there was no room yet. */
static int partial = -1;
static uint32_t partial_at, partial_length;

static void offer_input(uint16_t slot)
{
        const struct virtio_part part = { received[slot], BYTES, true };

        virtqueue_offer(&queues[RECEIVE], slot, &part, 1);
}

bool hvc_init(void)
{
        if (is_running)
                return true;
        if (!virtio_find(VIRTIO_CONSOLE, &device) || !virtio_start(&device, 0, queues, QUEUES))
                return false;
        is_running = true;
        virtqueue_silence(&queues[TRANSMIT]);
        for (int slot = 0; slot < queues[RECEIVE].size; slot++)
                offer_input(slot);
        virtqueue_notify(&queues[RECEIVE]);
        return true;
}

/* Transmitted slots come back in any order. Only their number matters. */
static void reclaim(void)
{
        uint32_t unused;

        while (virtqueue_take(&queues[TRANSMIT], &unused) >= 0)
                in_flight--;
}

void hvc_put(char c)
{
        sent[filling][filled++] = c;
        if (filled == BYTES)
                hvc_flush();
}

void hvc_flush(void)
{
        const struct virtio_part part = { sent[filling], filled, false };

        if (!filled)
                return;
        virtqueue_offer(&queues[TRANSMIT], filling, &part, 1);
        virtqueue_notify(&queues[TRANSMIT]);
        filled = 0;
        filling = (filling + 1) % queues[TRANSMIT].size;
        in_flight++;
        /* A console returns slots in order, so if one is back, it is the next one. */
        for (reclaim(); in_flight == queues[TRANSMIT].size; reclaim())
                pause();
}

void hvc_drain(void)
{
        const uint64_t begin = tsc();

        hvc_flush();
        for (reclaim(); in_flight && tsc() - begin < PATIENCE; reclaim())
                pause();
}

void hvc_receive(void)
{
        bool returned = false;

        for (;;) {
                if (partial < 0) {
                        partial = virtqueue_take(&queues[RECEIVE], &partial_length);
                        partial_at = 0;
                        if (partial < 0)
                                break;
                }
                while (partial_at < partial_length && input_has_room())
                        input_put(received[partial][partial_at++]);
                if (partial_at < partial_length)
                        break;
                offer_input(partial);
                partial = -1;
                returned = true;
        }
        if (returned)
                virtqueue_notify(&queues[RECEIVE]);
}

static void on_interrupt_of_hvc(void)
{
        virtio_acknowledge(&device);
        hvc_receive();
        irq_acknowledge(device.irq);
}

void hvc_listen(void)
{
        on_interrupt(VECTOR_IRQ + device.irq, on_interrupt_of_hvc);
        irq_enable(device.irq);
        interrupts_off();
        hvc_receive();                  /* what came before we listened */
        interrupts_on();
}
