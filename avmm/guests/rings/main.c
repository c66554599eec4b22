/*
 * rings: drives the queues of a virtio device as fast as it can, and measures itself by the TSC.
 *
 * It polls for the answers, with interrupts off. So a figure contains the device's work and the
 * way to it, but nothing of a guest kernel. The loop runs in ring 3, which every host runs at full
 * speed. The result is a line on the serial console.
 */
#include "boot.h"
#include "console.h"
#include "cpu.h"
#include "finish.h"
#include "options.h"
#include "text.h"
#include "trap.h"
#include "virtio.h"

#define PARTS           3               /* of a block request: header, data, status */
#define BLOCK_FLUSH     (1 << 9)
#define FAULT           3
#define NO_DEVICE       4

enum { RECEIVE, TRANSMIT, QUEUES };     /* of a console */

struct header {
        uint32_t type, reserved;
        uint64_t sector;
};

struct run {
        const struct options *options;
        struct virtqueue *queue;
        uint64_t sectors;               /* of the disk */
        uint64_t count;
        uint64_t cycles, bytes, errors; /* out */
};

/* Descriptors of a request. */
static int parts_of(const struct options *options)
{
        return options->kind == CONSOLE ? 1 : PARTS;
}

static struct virtio_device device;
static struct virtqueue queues[QUEUES];
static struct header headers[MOST_DEPTH];
static volatile uint8_t statuses[MOST_DEPTH];
static uint8_t data[MOST_DEPTH][MOST_BYTES] __attribute__((aligned(4096)));

/* A place on the disk. The multiplier leads to all parts of the disk, in no particular order. */
static uint64_t some_sector(const struct run *run, uint64_t number)
{
        const uint64_t each = run->options->bytes / SECTOR, places = run->sectors / each;

        return number * 2654435761u % places * each;
}

static void offer(struct run *run, int request, uint64_t number)
{
        const struct options *o = run->options;
        const bool is_input = o->op == READ;
        const struct virtio_part parts[PARTS] = {
                { &headers[request], sizeof(headers[request]), false },
                { data[request], o->bytes, is_input },
                { (void *)&statuses[request], 1, true },
        };

        if (o->kind == CONSOLE) {
                virtqueue_offer(run->queue, request, &parts[1], 1);
                return;
        }
        headers[request].type = o->op;
        headers[request].sector = some_sector(run, number);
        statuses[request] = 0xff;
        virtqueue_offer(run->queue, request * PARTS, parts, PARTS);
}

/* Runs in ring 3. */
static void keep_busy(void *argument)
{
        struct run *run = argument;
        const uint64_t depth = run->options->depth, begin = tsc();
        uint64_t offered = 0, done = 0;

        for (; offered < depth && offered < run->count; offered++)
                offer(run, offered, offered);
        virtqueue_notify(run->queue);
        while (done < run->count) {
                bool is_new = false;
                uint32_t length;
                int slot;

                while ((slot = virtqueue_take(run->queue, &length)) >= 0) {
                        const int request = slot / parts_of(run->options);

                        done++;
                        run->bytes += length;
                        run->errors += run->options->kind == BLOCK && statuses[request];
                        if (offered < run->count) {
                                offer(run, request, offered++);
                                is_new = true;
                        }
                }
                if (!is_new)
                        pause();
                else if (virtqueue_wants_notify(run->queue))
                        virtqueue_notify(run->queue);
        }
        run->cycles = tsc() - begin;
}

/* Runs in ring 3. */
static void keep_notifying(void *argument)
{
        struct run *run = argument;
        const uint64_t begin = tsc();

        for (uint64_t i = 0; i < run->count; i++)
                virtqueue_notify(run->queue);
        run->cycles = tsc() - begin;
}

static struct run measure(const struct options *options, uint64_t count)
{
        const bool is_console = options->kind == CONSOLE;
        struct run run = {
                .options = options,
                .queue = &queues[is_console && options->op == WRITE ? TRANSMIT : RECEIVE],
                .count = count,
        };

        if (!count)
                return run;
        if (options->depth * parts_of(options) > run.queue->size) {
                print("error: depth is more than the queue holds\n");
                finish(NO_DEVICE);
        }
        if (options->kind == BLOCK)
                run.sectors = virtio_config(&device, 0);
        if (!ring3_call(options->kind == NOTIFY ? keep_notifying : keep_busy, &run)) {
                print("error: %s in ring 3\n", exception_name(last_fault.vector));
                finish(FAULT);
        }
        return run;
}

void guest_main(uint64_t start_info)
{
        struct options options;
        uint32_t features;
        struct run run;
        bool found;
        int count;

        console_init();
        trap_init();
        read_start_info(start_info);
        found = virtio_find(VIRTIO_BLOCK, &device) || virtio_find(VIRTIO_CONSOLE, &device);
        options = parse_options(boot.command_line);
        /* Without this feature each write would also be a flush, which every real guest avoids. */
        features = device.id == VIRTIO_BLOCK ? BLOCK_FLUSH : 0;
        count = device.id == VIRTIO_CONSOLE ? QUEUES : 1;
        if (!found || !virtio_start(&device, features, queues, count)) {
                print("error: no virtio device\n");
                finish(NO_DEVICE);
        }
        virtqueue_silence(&queues[RECEIVE]);
        virtqueue_silence(&queues[TRANSMIT]);

        measure(&options, options.warmup);
        run = measure(&options, options.count);
        print("rings count=%lu bytes=%lu errors=%lu cycles=%lu\n", run.count, run.bytes,
              run.errors, run.cycles);
        finish(0);
}
