/*
 * Intel's MultiProcessor Specification 1.4, as far as it lists processors.
 */
#include <stddef.h>

#include "boot.h"
#include "lapic.h"

#define POINTER_MAGIC   0x5f504d5f      /* "_MP_" */
#define TABLE_MAGIC     0x504d4350      /* "PCMP" */

#define ENTRY_PROCESSOR 0
#define CPU_ENABLED     1

struct floating_pointer {
        uint32_t magic, table;
        uint8_t rest[8];
};

struct table {
        uint32_t magic;
        uint16_t length;
        uint8_t revision, checksum;
        char names[20];
        uint32_t oem_table;
        uint16_t oem_size, entry_count;
        uint32_t lapic, extended;
        uint8_t entries[];
};

static const struct table *search(uint64_t start, uint64_t end)
{
        for (; start < end; start += sizeof(struct floating_pointer)) {
                const struct floating_pointer *pointer = (void *)start;
                const struct table *table;

                if (pointer->magic != POINTER_MAGIC)
                        continue;
                table = (void *)(uint64_t)pointer->table;
                if (table && table->magic == TABLE_MAGIC)
                        return table;
        }
        return NULL;
}

void read_mp_table(void)
{
        const struct table *table = search(0x9fc00, 0xa0000);
        const uint8_t *entry;

        boot.apic_ids[0] = lapic_id();
        boot.cpu_count = 1;
        if (!table)
                table = search(0xf0000, 0x100000);
        if (!table)
                return;

        entry = table->entries;
        for (int i = 0; i < table->entry_count; i++) {
                const uint8_t id = entry[1], flags = entry[3];

                if (entry[0] != ENTRY_PROCESSOR) {
                        entry += 8;     /* all entries except processors have this size */
                        continue;
                }
                if (flags & CPU_ENABLED && id != boot.apic_ids[0] && boot.cpu_count < MAX_CPUS)
                        boot.apic_ids[boot.cpu_count++] = id;
                entry += 20;
        }
}
