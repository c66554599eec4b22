#include "block.h"

#include "cpu.h"
#include "virtio.h"

#define FEATURE_FLUSH   (1u << 9)
#define PARTS           3               /* of a request: header, data, status */
#define OK              0
#define NOT_YET         0xff

enum type { READ = 0, WRITE = 1, FLUSH = 4 };

struct header {
        uint32_t type, reserved;
        uint64_t sector;
};

static struct virtio_device device;
static struct virtqueue queue;
static bool is_running;

bool block_init(void)
{
        if (is_running)
                return true;
        if (!virtio_find(VIRTIO_BLOCK, &device) ||
            !virtio_start(&device, FEATURE_FLUSH, &queue, 1) || queue.size < PARTS)
                return false;
        virtqueue_silence(&queue);
        is_running = true;
        return true;
}

uint64_t block_sectors(void)
{
        return virtio_config(&device, 0);
}

static bool request(enum type type, uint64_t sector, const void *data)
{
        const struct header header = { type, 0, sector };
        volatile uint8_t status = NOT_YET;
        struct virtio_part parts[PARTS];
        uint32_t written;
        int count = 0;

        parts[count++] = (struct virtio_part){ &header, sizeof(header), false };
        if (data)
                parts[count++] = (struct virtio_part){ data, SECTOR_SIZE, type == READ };
        parts[count++] = (struct virtio_part){ (void *)&status, 1, true };
        virtqueue_offer(&queue, 0, parts, count);
        virtqueue_notify(&queue);
        while (virtqueue_take(&queue, &written) < 0)
                pause();
        return status == OK;
}

bool block_read(uint64_t sector, void *data)
{
        return request(READ, sector, data);
}

bool block_write(uint64_t sector, const void *data)
{
        return request(WRITE, sector, data);
}

/* A disk without the feature reports a write only when the write is durable. */
bool block_flush(void)
{
        return !(device.features & FEATURE_FLUSH) || request(FLUSH, 0, 0);
}
