/* Guest memory: the slots, which pages hold translated code, and which were written.
 *
 * The library takes the slow way for a store to a page whose TLB entry is not marked dirty. Two
 * things rest on that: a store to code throws the code away, and a store is noted in the dirty log.
 * The library itself marks entries dirty while the page still holds code, and protects a page that
 * gets code only under one virtual address (trap 2 of docs/engines.md). So `code` holds here which
 * pages have code, and no entry of such a page becomes dirty under any address.
 *
 * What is no memory has no region in the library; `soft_memory_mapping` says that everything is
 * mapped, so that an access goes to the library's "unassigned" region, whose offsets are physical
 * addresses, and from there to access.c. A store to read-only memory goes to the hook. */

#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct slot *soft_slot_at(struct vm *vm, uint64_t gpa)
{
    struct slot *s = vm->last;
    if (gpa - s->gpa < s->size)
        return s;
    for (int i = 0; i < MOST_SLOTS; i++)
        if (gpa - vm->slots[i].gpa < vm->slots[i].size)
            return vm->last = &vm->slots[i];
    return NULL;
}

struct slot *soft_slot_of_ram(struct vm *vm, uint64_t ram)
{
    struct slot *s = vm->last;
    if (ram - s->ram < s->size)
        return s;
    for (int i = 0; i < MOST_SLOTS; i++)
        if (ram - vm->slots[i].ram < vm->slots[i].size)
            return vm->last = &vm->slots[i];
    return NULL;
}

void *soft_memory_mapping(void *uc, uint64_t at)
{
    struct vcpu *v = now;
    if (!v || v->vm->uc != uc)
        return lib.find_mapping(uc, at);
    struct slot *s = soft_slot_at(v->vm, at);
    return s && s->flags & KVM_MEM_READONLY ? v->vm->mapping_rom : v->vm->mapping_ram;
}

static size_t bitmap_size(uint64_t size)
{
    return (size / PAGE + 63) / 64 * 8;
}

static struct slot *find(struct vm *vm, uint32_t id)
{
    struct slot *free = NULL;
    for (int i = 0; i < MOST_SLOTS; i++) {
        if (vm->slots[i].size && vm->slots[i].id == id)
            return &vm->slots[i];
        if (!vm->slots[i].size && !free)
            free = &vm->slots[i];
    }
    return free;
}

static void drop(struct vm *vm, struct slot *s)
{
    lib.uc_mem_unmap(vm->uc, s->gpa, s->size);
    if (s->hook)
        lib.uc_hook_del(vm->uc, s->hook);
    free(s->code);
    free(s->stale);
    free(s->dirty);
    memset(s, 0, sizeof *s);
}

int soft_memory_set(struct vm *vm, const struct kvm_userspace_memory_region *r)
{
    uint32_t known = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;
    if (r->flags & ~known || (r->guest_phys_addr | r->memory_size | r->userspace_addr) % PAGE
        || r->guest_phys_addr + r->memory_size < r->guest_phys_addr || r->slot >> 16)
        return -EINVAL;
    struct slot *s = find(vm, r->slot);
    if (!s)
        return -ENOMEM;
    if (!r->memory_size) {
        if (!s->size)
            return -EINVAL;
        drop(vm, s);
        return 0;
    }
    int same = s->size == r->memory_size && s->host == (uint8_t *)r->userspace_addr
               && s->gpa == r->guest_phys_addr
               && (s->flags & KVM_MEM_READONLY) == (r->flags & KVM_MEM_READONLY);
    if (s->size && !same && s->size != r->memory_size)
        return -EINVAL;
    for (int i = 0; i < MOST_SLOTS; i++) {
        struct slot *other = &vm->slots[i];
        if (other != s && other->size && r->guest_phys_addr < other->gpa + other->size
            && other->gpa < r->guest_phys_addr + r->memory_size)
            return -EEXIST;
    }
    if (!same) {
        if (s->size)
            drop(vm, s);
        uint64_t *code = calloc(1, bitmap_size(r->memory_size));
        uint64_t *stale = calloc(1, bitmap_size(r->memory_size));
        if (!code || !stale || lib.uc_mem_map_ptr(vm->uc, r->guest_phys_addr, r->memory_size, UC_ALL,
                                        (void *)r->userspace_addr)
            || (r->flags & KVM_MEM_READONLY
                && lib.uc_mem_protect(vm->uc, r->guest_phys_addr, r->memory_size, 5))) {
            free(code);
            free(stale);
            return -ENOMEM;
        }
        *s = (struct slot){ .gpa = r->guest_phys_addr, .size = r->memory_size, .id = r->slot,
                            .host = (uint8_t *)r->userspace_addr, .code = code, .stale = stale };
        s->ram = lib.ram_from_host(vm->uc, s->host);
        /* A hook makes all stores in its range slow, so it has no other range than this. */
        if (r->flags & KVM_MEM_READONLY)
            lib.uc_hook_add(vm->uc, &s->hook, UC_HOOK_WRITE_PROT, soft_store_to_rom, vm, s->gpa,
                            s->gpa + s->size - 1);
    }
    s->flags = r->flags;
    if (!(r->flags & KVM_MEM_LOG_DIRTY_PAGES)) {
        free(s->dirty);
        s->dirty = NULL;
    } else if (!s->dirty && !(s->dirty = calloc(1, bitmap_size(s->size)))) {
        return -ENOMEM;
    }
    lib.tlb_flush(vm->cpu);     /* what is logged must not be dirty in the TLB */
    return 0;
}

int soft_memory_dirty(struct vm *vm, const struct kvm_dirty_log *log)
{
    struct slot *s = find(vm, log->slot);
    if (!s || !s->size || !s->dirty)
        return -ENOENT;
    memcpy(log->dirty_bitmap, s->dirty, bitmap_size(s->size));
    memset(s->dirty, 0, bitmap_size(s->size));
    lib.tlb_flush(vm->cpu);
    return 0;
}

void soft_memory_free(struct vm *vm)
{
    for (int i = 0; i < MOST_SLOTS; i++) {
        free(vm->slots[i].code);
        free(vm->slots[i].stale);
        free(vm->slots[i].dirty);
    }
}

/* Note in the dirty log that these bytes were written. */
void soft_memory_mark(struct slot *s, uint64_t offset, uint64_t length)
{
    for (uint64_t page = offset / PAGE; s->dirty && page <= (offset + length - 1) / PAGE; page++)
        s->dirty[page / 64] |= 1ULL << page % 64;
}

/* Any thread. What is written into a page without code needs nothing: a block that is translated
 * later is made of it. */
void soft_memory_wrote(struct vm *vm, const uint8_t *host, uint64_t length)
{
    for (int i = 0; i < MOST_SLOTS; i++) {
        struct slot *s = &vm->slots[i];
        uint64_t offset = host - s->host;
        if (!s->size || offset >= s->size)
            continue;
        if (length > s->size - offset)
            length = s->size - offset;
        int found = 0;
        for (uint64_t page = offset / PAGE; page <= (offset + length - 1) / PAGE; page++) {
            uint64_t bit = 1ULL << page % 64;
            if (!(__atomic_load_n(&s->code[page / 64], __ATOMIC_SEQ_CST) & bit))
                continue;
            __atomic_fetch_or(&s->stale[page / 64], bit, __ATOMIC_SEQ_CST);
            found = 1;
        }
        if (found) {
            atomic_store(&vm->has_stale, 1);
            soft_attend(vm);
        }
        return;
    }
}

/* Throw the blocks of such pages away. With the turn, between two blocks. */
void soft_memory_refresh(struct vm *vm)
{
    atomic_store(&vm->has_stale, 0);
    for (int i = 0; i < MOST_SLOTS; i++) {
        struct slot *s = &vm->slots[i];
        for (uint64_t word = 0; word < (s->size / PAGE + 63) / 64; word++) {
            uint64_t bits = __atomic_load_n(&s->stale[word], __ATOMIC_RELAXED)
                            ? __atomic_exchange_n(&s->stale[word], 0, __ATOMIC_SEQ_CST) : 0;
            for (; bits; bits &= bits - 1) {
                uint64_t ram = s->ram + (64 * word + __builtin_ctzll(bits)) * PAGE;
                lib.invalidate_range(vm->uc, ram, ram + PAGE);
            }
        }
    }
}
