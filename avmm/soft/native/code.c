/* The instruction at RIP, as it stands in guest memory. */

#include "engine.h"

#include <string.h>

/* The code byte at RIP + `offset`. Nonzero if it is not in memory. */
int soft_code(struct vcpu *v, int offset, uint8_t *byte)
{
    void *env = v->vm->env;
    uint64_t at = AT(env, ENV_EIP, uint64_t) + offset;
    uint32_t attrs = 0;
    if (!(AT(env, ENV_HFLAGS, uint32_t) & HF_CS64))
        at = (uint32_t)(at + AT(env, ENV_SEGS + SEG_SIZE + SEG_BASE, uint64_t));
    uint64_t physical = lib.debug_physical(v->vm->cpu, at, &attrs);
    struct slot *s = physical == ~0ULL ? NULL : soft_slot_at(v->vm, physical);
    if (!s)
        return -1;
    /* The page's address is what is told. */
    *byte = s->host[(physical & ~(uint64_t)(PAGE - 1)) - s->gpa + at % PAGE];
    return 0;
}

/* How many bytes of prefixes stand before the opcode, or -1 if there is none within the 15 bytes of
 * the longest instruction. */
int soft_opcode_offset(struct vcpu *v)
{
    static const uint8_t prefixes[] = { 0x66, 0x67, 0xf2, 0xf3, 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65 };
    int has_rex = AT(v->vm->env, ENV_HFLAGS, uint32_t) & HF_CS64;
    uint8_t byte;
    for (int i = 0; i < 15; i++) {
        if (soft_code(v, i, &byte))
            return -1;
        if (!(has_rex && byte >> 4 == 4) && !memchr(prefixes, byte, sizeof prefixes))
            return i;
    }
    return -1;
}
