/* Where interrupts go: from a GSI by the table to pins and messages, from a message to LAPICs. */

#include "inside.h"

#include <stdlib.h>

/* ---- to the LAPICs ---- */

static int is_everyone(struct soft_chips *c, int from, const struct lapic *to,
                       const struct message *m)
{
    if (m->dest == 0xffffffff)
        return chips_lapic_is_x2(to) || from >= 0;
    if (m->dest != 0xff)
        return 0;
    /* A message or a pin has 8 bits of destination: all ones mean everyone, in whichever mode. An
     * IPI's sender in x2APIC mode has 32. */
    return from < 0 || (!chips_lapic_is_x2(to) && !chips_lapic_is_x2(&c->cpus[from].lapic));
}

static int matches(struct soft_chips *c, int from, int cpu, const struct message *m)
{
    const struct lapic *l = &c->cpus[cpu].lapic;
    switch (m->shorthand) {
    case SELF: return cpu == from;
    case ALL: return 1;
    case OTHERS: return cpu != from;
    }
    if (is_everyone(c, from, l, m))
        return 1;
    uint32_t logical = l->regs[R_LDR / 4];
    if (chips_lapic_is_x2(l))
        return m->logical ? logical >> 16 == m->dest >> 16 && logical & m->dest & 0xffff
                          : m->dest == (uint32_t)cpu;
    if (!m->logical)
        return m->dest == (m->dest > 0xff ? (uint32_t)cpu : l->regs[R_ID / 4] >> 24);
    logical >>= 24;
    switch (l->regs[R_DFR / 4] >> 28) {
    case 0xf: return !!(logical & m->dest);
    case 0: return logical >> 4 == m->dest >> 4 && logical & m->dest & 0xf;
    default: return 0;
    }
}

/* How many have taken it; -1 if there was nobody for a broadcast. With lowest priority one of those
 * who match takes it: which one depends on the vector, so that vectors are spread over the CPUs. */
int chips_deliver(struct soft_chips *c, int from, const struct message *m)
{
    int candidates[SOFT_CHIPS_CPUS], count = 0, taken = 0, mode = m->mode;
    int broadcast = m->shorthand || (m->dest == 0xff && from < 0) || m->dest == 0xffffffff;
    int one = (mode == LOWEST || m->lowest_hint) && m->shorthand != SELF;
    if (one && !m->logical && m->dest == 0xff && !m->shorthand) {
        one = m->lowest_hint;           /* as KVM */
        mode = FIXED;
    }
    for (int i = 0; i < c->count; i++) {
        struct lapic *l = &c->cpus[i].lapic;
        if (c->cpus[i].exists && chips_lapic_is_on(l) && matches(c, from, i, m)
            && (!one || l->regs[R_SPIV / 4] & 1 << 8))
            candidates[count++] = i;
    }
    if (!count)
        return broadcast ? -1 : 0;
    if (one) {
        candidates[0] = candidates[m->vector % count];
        count = 1;
    }
    for (int i = 0; i < count; i++)
        taken += chips_lapic_accept(c, &c->cpus[candidates[i]].lapic, mode, m->vector, m->level,
                                    m->trigger);
    return taken;
}

int chips_msi(struct soft_chips *c, uint64_t address, uint32_t data)
{
    struct message m = {
        .dest = address >> 12 & 0xff, .logical = address >> 2 & 1, .lowest_hint = address >> 3 & 1,
        .vector = data, .mode = data >> 8 & 7, .trigger = data >> 15 & 1, .level = 1,
    };
    return chips_deliver(c, -1, &m);
}

/* ---- from GSIs ---- */

static int set_one(struct soft_chips *c, const struct route *r, int source, int level)
{
    if (r->type == KVM_IRQ_ROUTING_MSI)
        return level ? chips_msi(c, r->address, r->data) : -1;
    if (r->chip == KVM_IRQCHIP_IOAPIC)
        return chips_ioapic_set(c, r->pin, source, level);
    return chips_pic_set(c, r->pin, source, level);
}

/* KVM's answer for KVM_IRQ_LINE_STATUS: the sum of those that were not negative. */
int chips_gsi(struct soft_chips *c, uint32_t gsi, int source, int level)
{
    int answer = -1;
    for (uint32_t i = 0; i < c->route_count; i++) {
        if (c->routes[i].gsi != gsi)
            continue;
        int one = set_one(c, &c->routes[i], source, level);
        if (one >= 0)
            answer = one + (answer < 0 ? 0 : answer);
    }
    c->dirty = 1;
    return answer;
}

int chips_gsi_of(struct soft_chips *c, uint32_t chip, uint32_t pin)
{
    for (uint32_t i = 0; i < c->route_count; i++) {
        const struct route *r = &c->routes[i];
        if (r->type == KVM_IRQ_ROUTING_IRQCHIP && r->chip == chip && r->pin == pin)
            return r->gsi;
    }
    return -1;
}

/* ---- the table ---- */

int chips_routes_default(struct soft_chips *c)
{
    struct route *table = calloc(PIC_PINS + PINS, sizeof *table);
    if (!table)
        return -ENOMEM;
    uint32_t n = 0;
    for (uint32_t i = 0; i < PINS; i++) {
        table[n++] = (struct route) { i, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, i, 0, 0 };
        if (i < PIC_PINS)
            table[n++] = (struct route) { i, KVM_IRQ_ROUTING_IRQCHIP, i >> 3, i, 0, 0 };
    }
    free(c->routes);
    c->routes = table;
    c->route_count = n;
    return 0;
}

static int convert(struct route *r, const struct kvm_irq_routing_entry *e)
{
    *r = (struct route) { .gsi = e->gsi, .type = e->type };
    if (e->gsi >= GSIS || e->flags)
        return -EINVAL;
    switch (e->type) {
    case KVM_IRQ_ROUTING_IRQCHIP:
        r->chip = e->u.irqchip.irqchip;
        r->pin = e->u.irqchip.pin;
        if (r->chip > KVM_IRQCHIP_IOAPIC || r->pin >= (r->chip == KVM_IRQCHIP_IOAPIC ? PINS : 8))
            return -EINVAL;
        if (r->chip == KVM_IRQCHIP_PIC_SLAVE)
            r->pin += 8;
        return 0;
    case KVM_IRQ_ROUTING_MSI:
        r->address = (uint64_t)e->u.msi.address_hi << 32 | e->u.msi.address_lo;
        r->data = e->u.msi.data;
        return 0;
    }
    return -EINVAL;
}

/* A GSI leads to at most one pin of each chip, or to one message and nothing else. */
static int agree(const struct route *a, const struct route *b)
{
    return a->gsi != b->gsi || (a->type == KVM_IRQ_ROUTING_IRQCHIP
                                && b->type == KVM_IRQ_ROUTING_IRQCHIP && a->chip != b->chip);
}

int chips_routes_set(struct soft_chips *c, const struct kvm_irq_routing *table)
{
    if (table->nr > ROUTES || table->flags)
        return -EINVAL;
    struct route *routes = calloc(table->nr + 1, sizeof *routes);
    if (!routes)
        return -ENOMEM;
    for (uint32_t i = 0; i < table->nr; i++) {
        int bad = convert(&routes[i], &table->entries[i]);
        for (uint32_t j = 0; j < i && !bad; j++)
            bad = agree(&routes[j], &routes[i]) ? 0 : -EINVAL;
        if (bad) {
            free(routes);
            return bad;
        }
    }
    free(c->routes);
    c->routes = routes;
    c->route_count = table->nr;
    return 0;
}
