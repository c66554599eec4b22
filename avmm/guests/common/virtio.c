#include "virtio.h"

#include "boot.h"
#include "cpu.h"
#include "text.h"

enum register_offset {
        MAGIC = 0x000,
        VERSION = 0x004,
        DEVICE_ID = 0x008,
        DEVICE_FEATURES = 0x010,
        DEVICE_FEATURES_SEL = 0x014,
        DRIVER_FEATURES = 0x020,
        DRIVER_FEATURES_SEL = 0x024,
        QUEUE_SEL = 0x030,
        QUEUE_SIZE_MAX = 0x034,
        QUEUE_SIZE = 0x038,
        QUEUE_READY = 0x044,
        QUEUE_NOTIFY = 0x050,
        INTERRUPT_STATUS = 0x060,
        INTERRUPT_ACK = 0x064,
        STATUS = 0x070,
        QUEUE_DESC = 0x080,
        QUEUE_DRIVER = 0x090,
        QUEUE_DEVICE = 0x0a0,
        CONFIG = 0x100,
};

#define MAGIC_VALUE             0x74726976
#define VERSION_1               1               /* of features 32 to 63 */
#define ACKNOWLEDGE             1
#define DRIVER                  2
#define DRIVER_OK               4
#define FEATURES_OK             8
#define NEXT                    1
#define DEVICE_WRITES           2
#define NO_INTERRUPT            1
#define NO_NOTIFY               1
#define PIC_INPUTS              16

static uint32_t get(const struct virtio_device *device, enum register_offset offset)
{
        return *(volatile uint32_t *)(device->base + offset);
}

static void set(const struct virtio_device *device, enum register_offset offset, uint32_t value)
{
        *(volatile uint32_t *)(device->base + offset) = value;
}

/*
 * Cuts off a number that ends with `end`, and returns what follows, or NULL if there is no such
 * number.
 */
static char *number_until(char *text, char end, uint64_t *number)
{
        char *at = text;

        while (*at && *at != end)
                at++;
        if (*at != end)
                return 0;
        *at = '\0';
        return parse_number(text, number) ? at + 1 : 0;
}

/* virtio_mmio.device=SIZE@BASE:IRQ */
static bool parse(char *word, struct virtio_device *device)
{
        static const char name[] = "virtio_mmio.device=";
        uint64_t size, irq;

        if (length(word) < sizeof(name) || memcmp(word, name, sizeof(name) - 1))
                return false;
        word = number_until(word + sizeof(name) - 1, '@', &size);
        if (!word)
                return false;
        word = number_until(word, ':', &device->base);
        if (!word || !parse_number(word, &irq) || irq >= PIC_INPUTS)
                return false;
        device->irq = irq;
        return true;
}

bool virtio_find(uint32_t id, struct virtio_device *device)
{
        static char text[sizeof(boot.command_line)];
        char *rest = text, *word;

        copy_text(text, boot.command_line, sizeof(text));
        while ((word = next_word(&rest))) {
                if (!parse(word, device) || get(device, MAGIC) != MAGIC_VALUE ||
                    get(device, VERSION) != 2)
                        continue;
                device->id = get(device, DEVICE_ID);
                if (device->id == id)
                        return true;
        }
        return false;
}

static void set_address(const struct virtio_device *device, enum register_offset offset,
                        volatile void *address)
{
        set(device, offset, (uint64_t)address);
        set(device, offset + 4, (uint64_t)address >> 32);
}

static bool start_queue(const struct virtio_device *device, struct virtqueue *queue, int number)
{
        set(device, QUEUE_SEL, number);
        queue->size = VIRTQUEUE_SIZE;
        while (queue->size > get(device, QUEUE_SIZE_MAX))
                queue->size /= 2;
        if (!queue->size)
                return false;
        queue->device = device;
        queue->number = number;
        set(device, QUEUE_SIZE, queue->size);
        set_address(device, QUEUE_DESC, queue->descriptors);
        set_address(device, QUEUE_DRIVER, &queue->available);
        set_address(device, QUEUE_DEVICE, &queue->used);
        set(device, QUEUE_READY, 1);
        return true;
}

bool virtio_start(struct virtio_device *device, uint32_t wanted, struct virtqueue *queues,
                  int count)
{
        set(device, STATUS, 0);
        set(device, STATUS, ACKNOWLEDGE | DRIVER);
        set(device, DEVICE_FEATURES_SEL, 0);
        device->features = get(device, DEVICE_FEATURES) & wanted;
        set(device, DRIVER_FEATURES_SEL, 0);
        set(device, DRIVER_FEATURES, device->features);
        set(device, DRIVER_FEATURES_SEL, 1);
        set(device, DRIVER_FEATURES, VERSION_1);
        set(device, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if (!(get(device, STATUS) & FEATURES_OK))
                return false;
        for (int i = 0; i < count; i++)
                if (!start_queue(device, &queues[i], i))
                        return false;
        set(device, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        return true;
}

void virtio_stop(const struct virtio_device *device, struct virtqueue *queues, int count)
{
        set(device, STATUS, 0);
        while (get(device, STATUS))
                pause();
        memset(queues, 0, count * sizeof(*queues));
}

uint64_t virtio_config(const struct virtio_device *device, uint32_t offset)
{
        const uint64_t low = get(device, CONFIG + offset);

        return (uint64_t)get(device, CONFIG + offset + 4) << 32 | low;
}

void virtio_acknowledge(const struct virtio_device *device)
{
        set(device, INTERRUPT_ACK, get(device, INTERRUPT_STATUS));
}

void virtqueue_silence(struct virtqueue *queue)
{
        queue->available.flags = NO_INTERRUPT;
}

/*
 * x86 keeps stores in order, and the compiler keeps volatile stores in order. Only the other
 * stores need a barrier for the compiler.
 */
static void order_stores(void)
{
        asm volatile("" : : : "memory");
}

void virtqueue_offer(struct virtqueue *queue, uint16_t slot, const struct virtio_part *parts,
                     int count)
{
        const uint16_t index = queue->available.index;

        for (int i = 0; i < count; i++) {
                const bool is_last = i == count - 1;

                queue->descriptors[slot + i].address = (uint64_t)parts[i].data;
                queue->descriptors[slot + i].length = parts[i].length;
                queue->descriptors[slot + i].flags = (parts[i].is_input ? DEVICE_WRITES : 0) |
                                                     (is_last ? 0 : NEXT);
                queue->descriptors[slot + i].next = slot + i + 1;
        }
        queue->available.ring[index % queue->size] = slot;
        order_stores();
        queue->available.index = index + 1;
}

void virtqueue_notify(const struct virtqueue *queue)
{
        set(queue->device, QUEUE_NOTIFY, queue->number);
}

bool virtqueue_wants_notify(const struct virtqueue *queue)
{
        /*
         * The offered request must be visible before the guest reads whether the device wants a
         * notification (2.7.10.1).
         */
        asm volatile("mfence" : : : "memory");
        return !(queue->used.flags & NO_NOTIFY);
}

int virtqueue_take(struct virtqueue *queue, uint32_t *length)
{
        uint16_t at = queue->taken;

        if (queue->used.index == at)
                return -1;
        queue->taken++;
        at %= queue->size;
        *length = queue->used.ring[at].length;
        return queue->used.ring[at].slot;
}
