/* The part of native.c that Python calls, in the form that cffi's API mode reads: names only.
 * "..." leaves every layout and every number to the C compiler. */

/* ---- virtqueues (vring.h) ------------------------------------------------------------- */

#define AVMM_RAM_REGIONS ...
#define AVMM_VRING_SHAPE ...
#define AVMM_VRING_PLACE ...
#define AVMM_VRING_AHEAD ...
#define AVMM_VRING_INDEX ...
#define AVMM_VRING_LOOP ...
#define AVMM_VRING_OUTSIDE ...
#define AVMM_VRING_ORDER ...
#define AVMM_VRING_LENGTH ...
#define AVMM_VRING_PARTS_MAX ...
#define AVMM_VRING_INDIRECT ...
#define AVMM_VRING_TABLE ...

struct avmm_ram_region { uint64_t gpa, size, offset; uint8_t *host; ...; };
struct avmm_ram { uint32_t count; uint64_t *dirty; struct avmm_ram_region regions[...]; ...; };
struct avmm_part { uint64_t offset, length; ...; };
struct avmm_vring {
    const struct avmm_ram *ram;
    uint64_t desc, avail, used;
    uint32_t size;
    uint8_t event_idx, indirect, signalled_once;
    uint16_t next_avail, next_used, signalled, head;
    uint32_t readable, writable, sent;
    struct avmm_part parts[...];
    ...;
};
void avmm_ram_log(struct avmm_ram *ram, uint64_t *dirty);
void avmm_ram_watch(struct avmm_ram *ram, uint64_t watcher, int watching);
void avmm_ram_wrote(const struct avmm_ram *ram, uint64_t offset, uint64_t length);
int avmm_vring_check(const struct avmm_vring *ring);
int avmm_vring_walk(struct avmm_vring *ring, uint16_t head);
void avmm_vring_mark(const struct avmm_vring *ring, uint16_t head);
int avmm_vring_pop(struct avmm_vring *ring);
int avmm_vring_push(struct avmm_vring *ring, uint16_t head, uint32_t written, int more);
int avmm_vring_wants_interrupt(struct avmm_vring *ring);
int avmm_vring_listen(struct avmm_vring *ring, int wanted);
int avmm_vring_send(struct avmm_vring *ring, int fd, int is_socket, uint32_t most);

/* ---- files ------------------------------------------------------------------------------ */

/* fallocate(2), whose modes Python does not offer. */
#define FALLOC_FL_KEEP_SIZE ...
#define FALLOC_FL_PUNCH_HOLE ...
#define FALLOC_FL_ZERO_RANGE ...
int fallocate(int fd, int mode, int64_t offset, int64_t length);

/* ---- pages of RAM (pages.h) ------------------------------------------------------------ */

#define MAP_NORESERVE ...
#define AVMM_PAGE ...
#define AVMM_RUN_ZERO ...
#define AVMM_RUN_DATA ...
struct avmm_run { uint64_t page; uint32_t count, kind; ...; };
uint64_t avmm_pages_run(const uint64_t *bitmap, uint64_t page, uint64_t pages, uint64_t *end);
uint32_t avmm_pages_pack(const uint8_t *ram, uint64_t *bitmap, uint64_t pages, uint64_t *cursor,
                         struct avmm_run *runs, uint32_t most_runs, uint8_t *data,
                         uint32_t most_data, int skip_zeros, uint32_t *run_count);
int avmm_pages_unpack(uint8_t *ram, uint64_t pages, int fd, const struct avmm_run *runs,
                      uint32_t count, const uint8_t *data, uint64_t data_pages);
void avmm_dirty_mark(uint64_t *dirty, uint64_t offset, uint64_t length);
void avmm_dirty_take(uint64_t *from, uint64_t *into, uint64_t words);
void avmm_pages_add(const uint64_t *from, uint64_t *into, uint64_t words);
uint64_t avmm_pages_count(const uint64_t *bitmap, uint64_t words);
int avmm_map_private(uint64_t address, uint64_t length, int fd, int64_t offset);
void avmm_pagemap_own(const uint64_t *entries, uint64_t first, uint64_t count, uint64_t *bitmap);
