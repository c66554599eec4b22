/* Pages of guest RAM on their way into a file or to a peer, and back out of it.
 *
 * RAM is one mapping without its hole. A set of pages is a bitmap over it: 64-bit words with one
 * bit for each page, in order of address. Pages travel as runs of neighbours, of two kinds: runs
 * of zeros, and runs whose contents follow behind all runs, in order. A run has the same layout in
 * memory and on its way. It is little endian, as are all CPUs on which avmm has guests.
 *
 * The guest may write while its pages are read here. That does no harm: a write after the page was
 * taken out of the dirty log is logged again, and the page is sent again.
 */

#include <fcntl.h>
#include <sys/mman.h>

enum { AVMM_PAGE = 4096 };
enum avmm_run_kind { AVMM_RUN_ZERO = 0, AVMM_RUN_DATA = 1 };

struct avmm_run {
    uint64_t page;
    uint32_t count, kind;
};

static int page_is_zero(const uint8_t *page)
{
    uint64_t first;
    memcpy(&first, page, sizeof first);
    return !first && !memcmp(page, page + sizeof first, AVMM_PAGE - sizeof first);
}

/* The first page from `page` on that is in the bitmap, or `pages`. */
static uint64_t next_page(const uint64_t *bitmap, uint64_t page, uint64_t pages)
{
    while (page < pages) {
        uint64_t word = bitmap[page / 64] >> (page % 64);
        if (word)
            return page + (uint64_t)__builtin_ctzll(word);
        page = (page / 64 + 1) * 64;
    }
    return pages;
}

/* The run of neighbours in the bitmap that begins at or after `page`: its first page, or `pages`
 * if there is none. `*end` is the page after its last. */
static uint64_t avmm_pages_run(const uint64_t *bitmap, uint64_t page, uint64_t pages,
                               uint64_t *end)
{
    uint64_t first = next_page(bitmap, page, pages), last = first;
    while (last < pages && bitmap[last / 64] & 1ull << (last % 64))
        last++;
    *end = last;
    return first;
}

/* Take pages out of the bitmap, from `*cursor` on, until runs or room for contents are used up.
 * Copies contents to `data`. If that is NULL, only the runs are returned. With `skip_zeros`, zero
 * pages are left out. Returns how many pages are in `data`'s runs; `*cursor` is `pages` at the
 * end. */
static uint32_t avmm_pages_pack(const uint8_t *ram, uint64_t *bitmap, uint64_t pages,
                                uint64_t *cursor, struct avmm_run *runs, uint32_t most_runs,
                                uint8_t *data, uint32_t most_data, int skip_zeros,
                                uint32_t *run_count)
{
    uint32_t count = 0, copied = 0;
    struct avmm_run *last = NULL;
    uint64_t page = next_page(bitmap, *cursor, pages);
    while (page < pages) {
        const uint8_t *from = ram + page * AVMM_PAGE;
        int kind = page_is_zero(from) ? AVMM_RUN_ZERO : AVMM_RUN_DATA;
        if (kind == AVMM_RUN_DATA || !skip_zeros) {
            if (kind == AVMM_RUN_DATA && copied == most_data)
                break;
            if (last && last->kind == (uint32_t)kind && last->page + last->count == page) {
                last->count++;
            } else {
                if (count == most_runs)
                    break;
                last = &runs[count++];
                last->page = page;
                last->count = 1;
                last->kind = kind;
            }
            if (kind == AVMM_RUN_DATA) {
                if (data)
                    memcpy(data + (uint64_t)copied * AVMM_PAGE, from, AVMM_PAGE);
                copied++;
            }
        }
        bitmap[page / 64] &= ~(1ull << (page % 64));
        page = next_page(bitmap, page + 1, pages);
    }
    *cursor = page;
    *run_count = count;
    return copied;
}

static int write_fully(int fd, const uint8_t *data, uint64_t length, uint64_t offset)
{
    while (length) {
        ssize_t done = pwrite(fd, data, length, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done ? -errno : -EIO;
        data += done, offset += (uint64_t)done, length -= (uint64_t)done;
    }
    return 0;
}

/* Put runs into RAM, which is a shared mapping of the file `fd` from its beginning. Returns 0.
 * Returns -EINVAL, and writes nothing, if the runs do not lie within RAM or do not match
 * `data_pages`. Returns -errno if the host has no memory left.
 *
 * Contents are written to the file, not to the mapping: a page that RAM has not had yet is then
 * neither cleared first nor faulted in. */
static int avmm_pages_unpack(uint8_t *ram, uint64_t pages, int fd, const struct avmm_run *runs,
                             uint32_t count, const uint8_t *data, uint64_t data_pages)
{
    uint64_t wanted = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (runs[i].kind > AVMM_RUN_DATA || !runs[i].count || runs[i].page >= pages
            || runs[i].count > pages - runs[i].page)
            return -EINVAL;
        if (runs[i].kind == AVMM_RUN_DATA)
            wanted += runs[i].count;
    }
    if (wanted != data_pages)
        return -EINVAL;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t at = runs[i].page * AVMM_PAGE, length = (uint64_t)runs[i].count * AVMM_PAGE;
        if (runs[i].kind == AVMM_RUN_ZERO) {
            /* Make a hole, because pages that the guest has given back must not take memory
             * here. */
            if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, length) < 0)
                memset(ram + at, 0, length);
            continue;
        }
        int error = write_fully(fd, data, length, at);
        if (error)
            return error;
        data += length;
    }
    return 0;
}

/* ---- which pages are written ---- */

/* Note that the host has written `length` bytes at `offset` of RAM. Any thread. */
static void avmm_dirty_mark(uint64_t *dirty, uint64_t offset, uint64_t length)
{
    if (!dirty || !length)
        return;
    for (uint64_t page = offset / AVMM_PAGE; page <= (offset + length - 1) / AVMM_PAGE; page++)
        __atomic_fetch_or(&dirty[page / 64], 1ull << (page % 64), __ATOMIC_RELEASE);
}

/* Move what is in `from` into `into`, while others may mark pages in it. */
static void avmm_dirty_take(uint64_t *from, uint64_t *into, uint64_t words)
{
    for (uint64_t i = 0; i < words; i++)
        if (__atomic_load_n(&from[i], __ATOMIC_RELAXED))
            into[i] |= __atomic_exchange_n(&from[i], 0, __ATOMIC_ACQUIRE);
}

static void avmm_pages_add(const uint64_t *from, uint64_t *into, uint64_t words)
{
    for (uint64_t i = 0; i < words; i++)
        into[i] |= from[i];
}

static uint64_t avmm_pages_count(const uint64_t *bitmap, uint64_t words)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < words; i++)
        count += __builtin_popcountll(bitmap[i]);
    return count;
}

/* ---- copy-on-write RAM ---- */

/* Map the file over the `length` bytes at `address`, copy-on-write: 0 or -errno. */
static int avmm_map_private(uint64_t address, uint64_t length, int fd, int64_t offset)
{
    void *at = mmap((void *)(uintptr_t)address, length, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, offset);
    return at == MAP_FAILED ? -errno : 0;
}

/* Documentation/admin-guide/mm/pagemap.rst: add to the bitmap the pages that belong to the mapping
 * and not to the file: those that are anonymous, in memory or in swap. */
static void avmm_pagemap_own(const uint64_t *entries, uint64_t first, uint64_t count,
                             uint64_t *bitmap)
{
    const uint64_t PRESENT = 1ull << 63, SWAPPED = 1ull << 62, OF_FILE = 1ull << 61;
    for (uint64_t i = 0; i < count; i++)
        if (entries[i] & (PRESENT | SWAPPED) && !(entries[i] & OF_FILE))
            bitmap[(first + i) / 64] |= 1ull << ((first + i) % 64);
}
