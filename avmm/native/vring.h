/* A split virtqueue in guest RAM, from the device's side (VIRTIO 1.2, 2.7).
 *
 * The guest may change all of it at any moment, from another CPU. So each word is read only once,
 * and is checked before it is used. Nothing outside the table of RAM regions is ever touched. When
 * a machine is closed its table is empty, and every call fails.
 */

#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum { AVMM_RAM_REGIONS = 8, AVMM_VRING_PARTS = 1024, AVMM_VRING_SIZE_MAX = 32768 };

enum avmm_vring_error {
    AVMM_VRING_SHAPE = 1,
    AVMM_VRING_PLACE,
    AVMM_VRING_AHEAD,
    AVMM_VRING_INDEX,
    AVMM_VRING_LOOP,
    AVMM_VRING_OUTSIDE,
    AVMM_VRING_ORDER,
    AVMM_VRING_LENGTH,
    AVMM_VRING_PARTS_MAX,
    AVMM_VRING_INDIRECT,
    AVMM_VRING_TABLE,
};

struct avmm_ram_region {
    uint64_t gpa, size, offset;
    uint8_t *host;
};

struct avmm_ram {
    uint32_t count;
    uint64_t *dirty;            /* NULL: no log */
    void (*watcher)(int watching, const void *host, uint64_t length);   /* NULL: nobody */
    int watching;
    struct avmm_ram_region regions[AVMM_RAM_REGIONS];
};

struct avmm_part {
    uint64_t offset, length;
};

struct avmm_vring {
    const struct avmm_ram *ram;
    uint64_t desc, avail, used;
    uint32_t size;
    uint8_t event_idx, indirect, signalled_once;
    pthread_mutex_t giving;     /* held while `next_used` or `signalled` changes */
    uint16_t next_avail, next_used, signalled;
    /* The chain that was walked last: first the readable parts, then the writable ones. */
    uint16_t head;
    uint32_t readable, writable;
    uint32_t sent; /* how much of it avmm_vring_send has sent */
    struct avmm_part parts[AVMM_VRING_PARTS];
};

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4, DESC_BYTES = 16 };
enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };

/* The empty asm keeps the compiler from reading guest memory a second time. */
#define LOAD(bits)                                                     \
    static uint##bits##_t load##bits(const uint8_t *from)              \
    {                                                                  \
        uint##bits##_t value;                                          \
        __builtin_memcpy(&value, from, sizeof value);                  \
        __asm__ __volatile__("" : "+r"(value));                        \
        return le##bits##toh(value);                                   \
    }
LOAD(16)
LOAD(32)
LOAD(64)
#undef LOAD

static uint16_t load16_acquire(const uint8_t *from)
{
    return le16toh(__atomic_load_n((const uint16_t *)from, __ATOMIC_ACQUIRE));
}

static void store16_release(uint8_t *to, uint16_t value)
{
    __atomic_store_n((uint16_t *)to, htole16(value), __ATOMIC_RELEASE);
}

static void store32(uint8_t *to, uint32_t value)
{
    __atomic_store_n((uint32_t *)to, htole32(value), __ATOMIC_RELAXED);
}

static uint8_t *ram_at(const struct avmm_ram *ram, uint64_t gpa, uint64_t length, uint64_t *offset)
{
    for (uint32_t i = 0; i < ram->count; i++) {
        const struct avmm_ram_region *region = &ram->regions[i];
        uint64_t start = gpa - region->gpa;
        if (gpa >= region->gpa && start <= region->size && length <= region->size - start) {
            if (offset)
                *offset = region->offset + start;
            return region->host + start;
        }
    }
    return NULL;
}

/* Where byte `offset` of RAM as a whole is. */
static uint8_t *ram_byte(const struct avmm_ram *ram, uint64_t offset)
{
    for (uint32_t i = 0; i < ram->count; i++)
        if (offset - ram->regions[i].offset < ram->regions[i].size)
            return ram->regions[i].host + (offset - ram->regions[i].offset);
    return NULL;
}

static uint8_t *vring_desc(const struct avmm_vring *ring)
{
    return ram_at(ring->ram, ring->desc, (uint64_t)DESC_BYTES * ring->size, NULL);
}

static uint8_t *vring_avail(const struct avmm_vring *ring)
{
    return ram_at(ring->ram, ring->avail, 6 + 2ull * ring->size, NULL);
}

static uint8_t *vring_used(const struct avmm_vring *ring)
{
    return ram_at(ring->ram, ring->used, 6 + 8ull * ring->size, NULL);
}

/* Log all writes from now on in `dirty`, or none if it is NULL. There is no need to wait for
 * writers: either a writer sees the log after its write, or its write is visible to whoever reads
 * RAM after this call. The memory of a log stays valid as long as RAM does. */
static void avmm_ram_log(struct avmm_ram *ram, uint64_t *dirty)
{
    __atomic_store_n(&ram->dirty, dirty, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Tell `watcher` of all that the host writes from now on, or nobody if it is NULL: where in the
 * host's memory, and how many bytes. It is called in any thread. Call this while nobody writes. */
static void avmm_ram_watch(struct avmm_ram *ram, uint64_t watcher, int watching)
{
    ram->watching = watching;
    ram->watcher = (void (*)(int, const void *, uint64_t))watcher;
}

/* Does anybody want to know what was written before this call? */
static int is_noted(const struct avmm_ram *ram)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return ram->watcher || __atomic_load_n(&ram->dirty, __ATOMIC_SEQ_CST);
}

/* The host has written these bytes of RAM as a whole. Any thread. */
static void avmm_ram_wrote(const struct avmm_ram *ram, uint64_t offset, uint64_t length)
{
    if (!length || !is_noted(ram))
        return;
    avmm_dirty_mark(__atomic_load_n(&ram->dirty, __ATOMIC_SEQ_CST), offset, length);
    if (ram->watcher)
        ram->watcher(ram->watching, ram_byte(ram, offset), length);
}

static void used_was_written(const struct avmm_vring *ring)
{
    uint64_t offset, length = 6 + 8ull * ring->size;
    if (is_noted(ring->ram) && ram_at(ring->ram, ring->used, length, &offset))
        avmm_ram_wrote(ring->ram, offset, length);
}

/* Check the queue's settings (2.7, table of alignments). Returns 0 or an error. Call it before
 * anything else. */
static int avmm_vring_check(const struct avmm_vring *ring)
{
    uint32_t size = ring->size;
    if (!size || size > AVMM_VRING_SIZE_MAX || size & (size - 1))
        return -AVMM_VRING_SHAPE;
    if (ring->desc % 16 || ring->avail % 2 || ring->used % 4)
        return -AVMM_VRING_SHAPE;
    if (!vring_desc(ring) || !vring_avail(ring) || !vring_used(ring))
        return -AVMM_VRING_PLACE;
    return 0;
}

/* Find the parts of the chain that begins with descriptor `head`: 1, or a negative error. */
static int avmm_vring_walk(struct avmm_vring *ring, uint16_t head)
{
    const uint8_t *table = vring_desc(ring);
    uint32_t entries = ring->size, index = head, seen = 0, count = 0;
    int within_table = 0, writing = 0;
    uint64_t total = 0;
    if (!table)
        return -AVMM_VRING_PLACE;
    ring->head = head;
    ring->readable = ring->writable = 0;
    for (;;) {
        if (index >= entries)
            return -AVMM_VRING_INDEX;
        if (++seen > entries)
            return -AVMM_VRING_LOOP;
        const uint8_t *entry = table + (uint64_t)DESC_BYTES * index;
        uint64_t address = load64(entry);
        uint32_t length = load32(entry + 8);
        uint16_t flags = load16(entry + 12), next = load16(entry + 14);
        if (flags & DESC_INDIRECT) {
            /* 2.7.5.3.2: the write flag of such a descriptor means nothing. */
            if (!ring->indirect || within_table || flags & DESC_NEXT)
                return -AVMM_VRING_INDIRECT;
            if (!length || length % DESC_BYTES || length / DESC_BYTES > AVMM_VRING_PARTS)
                return -AVMM_VRING_TABLE;
            table = ram_at(ring->ram, address, length, NULL);
            if (!table)
                return -AVMM_VRING_OUTSIDE;
            entries = length / DESC_BYTES;
            index = seen = 0;
            within_table = 1;
            continue;
        }
        if (flags & DESC_WRITE)
            writing = 1;
        else if (writing)
            return -AVMM_VRING_ORDER;
        total += length;
        if (total > UINT32_MAX)
            return -AVMM_VRING_LENGTH;
        if (length) {
            if (count == AVMM_VRING_PARTS)
                return -AVMM_VRING_PARTS_MAX;
            struct avmm_part *part = &ring->parts[count];
            if (!ram_at(ring->ram, address, length, &part->offset))
                return -AVMM_VRING_OUTSIDE;
            part->length = length;
            count++;
            if (writing)
                ring->writable++;
            else
                ring->readable++;
        }
        if (!(flags & DESC_NEXT))
            return 1;
        index = next;
    }
}

/* The device may have written the writable parts of the chain of `head`: note them in the log of
 * dirty pages, if there is one. The descriptors are read again. If the driver has changed them
 * since, only its own data suffer. The chain that was walked last stays as it is. */
static void avmm_vring_mark(const struct avmm_vring *ring, uint16_t head)
{
    if (!is_noted(ring->ram))
        return;
    struct avmm_vring walker;   /* the walk fills its 16 KiB of parts: no initial value needed */
    walker.ram = ring->ram;
    walker.desc = ring->desc;
    walker.size = ring->size;
    walker.indirect = ring->indirect;
    if (avmm_vring_walk(&walker, head) < 0)
        return;
    const struct avmm_part *part = walker.parts + walker.readable;
    for (uint32_t i = 0; i < walker.writable; i++, part++)
        avmm_ram_wrote(ring->ram, part->offset, part->length);
}

/* Take the next chain. Returns 1, 0 if there is none, or a negative error. */
static int avmm_vring_pop(struct avmm_vring *ring)
{
    const uint8_t *avail = vring_avail(ring);
    if (!avail)
        return -AVMM_VRING_PLACE;
    uint16_t waiting = load16_acquire(avail + 2) - ring->next_avail;
    if (!waiting)
        return 0;
    if (waiting > ring->size)
        return -AVMM_VRING_AHEAD;
    uint16_t head = load16(avail + 4 + 2 * (ring->next_avail & (ring->size - 1)));
    int answer = avmm_vring_walk(ring, head);
    if (answer > 0)
        ring->next_avail++;
    return answer;
}

/* Return the chain of `head` to the guest, with `written` bytes written to it: 0, or a negative
 * error. With `more` the guest sees it only together with the next one. */
static int avmm_vring_push(struct avmm_vring *ring, uint16_t head, uint32_t written, int more)
{
    uint8_t *used = vring_used(ring);
    if (!used)
        return -AVMM_VRING_PLACE;
    avmm_vring_mark(ring, head);
    pthread_mutex_lock(&ring->giving);
    uint8_t *entry = used + 4 + 8 * (ring->next_used & (ring->size - 1));
    store32(entry, head);
    store32(entry + 4, written);
    ring->next_used++;
    if (!more)
        store16_release(used + 2, ring->next_used);
    pthread_mutex_unlock(&ring->giving);
    used_was_written(ring);
    return 0;
}

/* Should the guest be interrupted for the chains pushed since the last call (2.7.7)? 1, 0, or
 * error. Pushed chains must be visible before this reads what the guest wants, because the guest
 * writes what it wants first and then looks for pushed chains. */
static int avmm_vring_wants_interrupt(struct avmm_vring *ring)
{
    const uint8_t *avail = vring_avail(ring);
    if (!avail)
        return -AVMM_VRING_PLACE;
    pthread_mutex_lock(&ring->giving);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint16_t before = ring->signalled, now = ring->next_used;
    int first = !ring->signalled_once;
    ring->signalled = now;
    ring->signalled_once = 1;
    pthread_mutex_unlock(&ring->giving);
    if (!ring->event_idx)
        return !(load16(avail) & AVAIL_NO_INTERRUPT);
    uint16_t event = load16(avail + 4 + 2 * ring->size);
    return first || (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

/* Ask the guest to notify, or not to (2.7.10). Returns 1 if there is already a chain, 0, or an
 * error. The same two steps as above, with the sides exchanged. */
static int avmm_vring_listen(struct avmm_vring *ring, int wanted)
{
    const uint8_t *avail = vring_avail(ring);
    uint8_t *used = vring_used(ring);
    if (!avail || !used)
        return -AVMM_VRING_PLACE;
    if (!ring->event_idx)
        store16_release(used, wanted ? 0 : USED_NO_NOTIFY);
    else if (wanted)
        store16_release(used + 4 + 8 * ring->size, ring->next_avail);
    used_was_written(ring);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return load16_acquire(avail + 2) != ring->next_avail;
}

/* Write the readable parts of the chain that was walked last, at most `most` bytes. Returns how
 * many bytes were written: 0 if `fd` accepts none at once or has failed. */
static uint32_t vring_send_one(const struct avmm_vring *ring, int fd, int is_socket, uint32_t most)
{
    struct iovec parts[AVMM_VRING_PARTS];
    struct msghdr message = { .msg_iov = parts };
    for (uint32_t i = 0; i < ring->readable && most; i++) {
        const struct avmm_part *part = &ring->parts[i];
        uint32_t length = part->length < most ? part->length : most;
        parts[i] = (struct iovec){ ram_byte(ring->ram, part->offset), length };
        most -= length;
        message.msg_iovlen++;
    }
    ssize_t sent;
    do
        sent = is_socket ? sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
                         : writev(fd, parts, message.msg_iovlen);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? 0 : sent;
}

/* Write the readable parts of the next chains to `fd`, and return each chain that it accepts whole
 * at once to the guest. Returns 0 when there are no more chains or `most` bytes were written, 1
 * when `fd` has accepted only `sent` bytes of the chain that was walked last (it is full, or has
 * failed), or a negative error. Takes at most as many chains as the queue has entries, because the
 * guest may refill it forever. */
static int avmm_vring_send(struct avmm_vring *ring, int fd, int is_socket, uint32_t most)
{
    uint64_t total = 0;
    for (uint32_t taken = 0; taken < ring->size && total < most; taken++) {
        int answer = avmm_vring_pop(ring);
        if (answer <= 0)
            return answer;
        uint64_t length = 0;
        for (uint32_t i = 0; i < ring->readable; i++)
            length += ring->parts[i].length;
        ring->sent = length ? vring_send_one(ring, fd, is_socket, most) : 0;
        if (ring->sent < length)
            return 1;
        answer = avmm_vring_push(ring, ring->head, 0, 0);
        if (answer < 0)
            return answer;
        total += length;
    }
    return 0;
}
