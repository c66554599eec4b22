/* Registers that C serves: a vCPU's thread answers accesses to them without the GIL.
 *
 * A register is a few bytes that a device has declared (avmm/bus/registers.py). The guest reads
 * them as they are. A write of the guest stores, clears bits, is ignored, or is collected for the
 * device. The device can read and change them in Python at any time. Each access, from whichever
 * side, is made as a whole, under the register's mutex; nobody who has it waits for anything.
 *
 * A register may leave an access to its device, which then answers in Python as it would without
 * the register: reads while `answers` is 0, and writes that it collects while `limit` are there.
 *
 * Numbers are little endian, on both sides. */

#include <pthread.h>
#include <stdint.h>
#include <string.h>

enum {
    AVMM_TO_DEVICE,             /* a write is none of C's business */
    AVMM_STORES,
    AVMM_IGNORES,
    AVMM_CLEARS,                /* the bits that are set in what is written */
    AVMM_COLLECTS,              /* whole writes, one behind the other */
};

struct avmm_register {
    pthread_mutex_t mutex;
    uint8_t *bytes;             /* its value; where it collects, what it has collected: a ring */
    uint32_t size;              /* how many bytes that is */
    uint32_t whole;             /* is only an access to all of it C's business? */
    uint32_t answers;           /* does a read get the value? */
    uint32_t width;             /* where it collects: how many bytes a write has */
    uint32_t limit;             /* ... until how many writes are there it takes more by itself */
    uint32_t first, count;      /* ... which is the oldest in the ring, and how many are there */
};

static void avmm_register_init(struct avmm_register *r)
{
    pthread_mutex_init(&r->mutex, NULL);
}

/* Read `size` bytes (at most 8) at `at`. Returns 0 if the device has to answer. */
static int avmm_register_read(struct avmm_register *r, uint32_t at, uint32_t size, uint64_t *value)
{
    pthread_mutex_lock(&r->mutex);
    int served = r->answers && !(r->whole && size != r->size);
    *value = 0;
    if (served)
        memcpy(value, r->bytes + at, size);
    pthread_mutex_unlock(&r->mutex);
    return served;
}

static int collect(struct avmm_register *r, uint32_t limit, uint32_t size, uint64_t value)
{
    uint32_t capacity = r->size / r->width;
    if (r->count >= limit || size != r->width)
        return 0;
    memcpy(r->bytes + (r->first + r->count) % capacity * r->width, &value, r->width);
    r->count++;
    return 1;
}

/* Write `size` bytes (at most 8) at `at`, in the manner `how`. Returns 0 if the device has to take
 * the write. */
static int avmm_register_write(
    struct avmm_register *r, int how, uint32_t at, uint32_t size, uint64_t value)
{
    int served = 1;
    if (r->whole && size != r->size)
        return 0;
    pthread_mutex_lock(&r->mutex);
    switch (how) {
    case AVMM_STORES:
        memcpy(r->bytes + at, &value, size);
        break;
    case AVMM_CLEARS:
        for (uint32_t i = 0; i < size; i++)
            r->bytes[at + i] &= ~(value >> 8 * i);
        break;
    case AVMM_COLLECTS:
        served = collect(r, r->limit, size, value);
        break;
    case AVMM_IGNORES:
        break;
    default:
        served = 0;
    }
    pthread_mutex_unlock(&r->mutex);
    return served;
}

/* ---- the device's side ---- */

/* Keep the bits of `kept` and set those of `set`, in the first `size` bytes (at most 8). Returns
 * what was there before. */
static uint64_t avmm_register_change(
    struct avmm_register *r, uint32_t size, uint64_t kept, uint64_t set)
{
    uint64_t before = 0, after;
    pthread_mutex_lock(&r->mutex);
    memcpy(&before, r->bytes, size);
    after = (before & kept) | set;
    memcpy(r->bytes, &after, size);
    pthread_mutex_unlock(&r->mutex);
    return before;
}

/* Give reads the number `value` (of `size` bytes) from now on, or leave them to the device. */
static void avmm_register_answer(struct avmm_register *r, int answers, uint32_t size, uint64_t value)
{
    pthread_mutex_lock(&r->mutex);
    r->answers = answers;
    memcpy(r->bytes, &value, size);
    pthread_mutex_unlock(&r->mutex);
}

/* Copy its bytes out of it or, with `store`, into it. */
static void avmm_register_copy(
    struct avmm_register *r, uint8_t *bytes, uint32_t at, uint32_t size, int store)
{
    pthread_mutex_lock(&r->mutex);
    if (store)
        memcpy(r->bytes + at, bytes, size);
    else
        memcpy(bytes, r->bytes + at, size);
    pthread_mutex_unlock(&r->mutex);
}

/* Collect a write whatever the limit is. Returns 0 if there is no room in the ring. */
static int avmm_register_push(struct avmm_register *r, uint64_t value)
{
    pthread_mutex_lock(&r->mutex);
    int collected = collect(r, r->size / r->width, r->width, value);
    pthread_mutex_unlock(&r->mutex);
    return collected;
}

static void avmm_register_limit(struct avmm_register *r, uint32_t limit)
{
    pthread_mutex_lock(&r->mutex);
    r->limit = limit;
    pthread_mutex_unlock(&r->mutex);
}

/* Copy up to `most` collected writes to `bytes`, the oldest first, and forget them unless `keep`.
 * Returns how many. */
static uint32_t avmm_register_take(
    struct avmm_register *r, uint8_t *bytes, uint32_t most, int keep)
{
    uint32_t capacity = r->size / r->width, taken = 0;
    pthread_mutex_lock(&r->mutex);
    uint32_t first = r->first, count = r->count;
    while (taken < most && r->count) {
        uint32_t piece = capacity - r->first;   /* the ring ends there */
        piece = piece < r->count ? piece : r->count;
        piece = piece < most - taken ? piece : most - taken;
        memcpy(bytes + taken * r->width, r->bytes + r->first * r->width, piece * r->width);
        r->first = (r->first + piece) % capacity;
        r->count -= piece;
        taken += piece;
    }
    if (keep) {
        r->first = first;
        r->count = count;
    }
    pthread_mutex_unlock(&r->mutex);
    return taken;
}

/* Hold these `count` writes and no others; there must be room for them. */
static void avmm_register_fill(struct avmm_register *r, const uint8_t *bytes, uint32_t count)
{
    pthread_mutex_lock(&r->mutex);
    memcpy(r->bytes, bytes, (size_t)count * r->width);
    r->first = 0;
    r->count = count;
    pthread_mutex_unlock(&r->mutex);
}
