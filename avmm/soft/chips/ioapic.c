/* The I/O APIC: 24 pins, each with an entry that says which LAPICs an interrupt goes to.
 *
 * `irr` is the lines' levels. An edge is delivered when its line rises; while it is masked, it is
 * kept in `irr` and in no other place, so that saved state has it (and KVM raises it when that
 * state is loaded). A level is delivered while `remote_irr` is 0; a LAPIC that takes it sets
 * `remote_irr`, and the end of the interrupt clears it. */

#include "inside.h"

enum { SELECT = 0x00, WINDOW = 0x10, REG_ID = 0, REG_VERSION = 1, REG_ARBITRATION = 2,
       REG_TABLE = 0x10 };

static int serve(struct soft_chips *c, int pin)
{
    __typeof__(c->ioapic.redirtbl[0]) *e = &c->ioapic.redirtbl[pin];
    if (e->fields.mask || (e->fields.trig_mode && e->fields.remote_irr))
        return -1;
    if (!e->fields.trig_mode)
        c->ioapic_delivered |= 1 << pin;
    struct message m = {
        .dest = e->fields.dest_id, .vector = e->fields.vector, .mode = e->fields.delivery_mode,
        .logical = e->fields.dest_mode, .level = 1, .trigger = e->fields.trig_mode,
    };
    int taken = chips_deliver(c, -1, &m);
    /* -1, nobody was there, counts as taken for KVM, and stays for ever. It does not here. */
    if (taken > 0 && e->fields.trig_mode)
        e->fields.remote_irr = 1;
    return taken;
}

static int set_level(struct soft_chips *c, int pin, int level)
{
    uint32_t bit = 1u << pin, was = c->ioapic.irr;
    if (!level) {
        c->ioapic.irr &= ~bit;
        return 1;
    }
    c->ioapic.irr |= bit;
    if (!c->ioapic.redirtbl[pin].fields.trig_mode) {
        c->ioapic_delivered &= ~bit;
        if (was & bit)
            return 0;
    }
    return serve(c, pin);
}

int chips_ioapic_set(struct soft_chips *c, int pin, int source, int level)
{
    uint8_t *held = &c->ioapic_sources[pin];
    *held = level ? *held | 1 << source : *held & ~(1 << source);
    return set_level(c, pin, *held != 0);
}

static int waits(struct soft_chips *c, int pin)
{
    __typeof__(c->ioapic.redirtbl[0]) *e = &c->ioapic.redirtbl[pin];
    return e->fields.trig_mode && !e->fields.mask && !e->fields.remote_irr
           && c->ioapic.irr >> pin & 1;
}

void chips_ioapic_again(struct soft_chips *c)
{
    for (int pin = 0; pin < PINS; pin++)
        if (waits(c, pin))
            serve(c, pin);
}

/* A LAPIC has ended an interrupt. `directed`: it does not tell the I/O APICs (SPIV bit 12). */
void chips_ioapic_eoi(struct soft_chips *c, int vector, int level, int directed)
{
    for (int pin = 0; pin < PINS; pin++) {
        if (c->ioapic.redirtbl[pin].fields.vector != vector)
            continue;
        chips_acked(c, KVM_IRQCHIP_IOAPIC, pin);
        if (!level || directed)
            continue;
        c->ioapic.redirtbl[pin].fields.remote_irr = 0;
        if (waits(c, pin))
            serve(c, pin);
    }
}

static uint32_t read_register(struct soft_chips *c)
{
    uint32_t reg = c->ioapic.ioregsel;
    switch (reg) {
    case REG_VERSION: return (PINS - 1) << 16 | 0x11;
    case REG_ID: case REG_ARBITRATION: return (c->ioapic.id & 0xf) << 24;
    }
    uint32_t pin = (reg - REG_TABLE) >> 1;
    uint64_t bits = pin < PINS ? c->ioapic.redirtbl[pin].bits : ~0ULL;
    return reg & 1 ? bits >> 32 : bits;
}

static void write_entry(struct soft_chips *c, uint32_t pin, int high, uint32_t value)
{
    __typeof__(c->ioapic.redirtbl[0]) *e = &c->ioapic.redirtbl[pin], was = *e;
    e->bits = high ? (uint64_t)value << 32 | (uint32_t)e->bits
                   : (e->bits >> 32) << 32 | value;
    e->fields.delivery_status = was.fields.delivery_status;
    /* Guests end a level interrupt by making it an edge for a moment. */
    e->fields.remote_irr = e->fields.trig_mode ? was.fields.remote_irr : 0;
    if (waits(c, pin)) {
        /* The line may be high only because nobody has asked its device while it was masked. */
        chips_acked(c, KVM_IRQCHIP_IOAPIC, pin);
        if (waits(c, pin))
            serve(c, pin);
    }
}

static void write_register(struct soft_chips *c, uint32_t value)
{
    uint32_t reg = c->ioapic.ioregsel, pin = (reg - REG_TABLE) >> 1;
    if (reg == REG_ID)
        c->ioapic.id = value >> 24 & 0xf;
    else if (reg >= REG_TABLE && pin < PINS)
        write_entry(c, pin, reg & 1, value);
}

void chips_ioapic_mmio(struct soft_chips *c, int write, uint32_t offset, uint32_t *value)
{
    c->dirty |= write;
    if (offset == SELECT && write)
        c->ioapic.ioregsel = *value & 0xff;
    else if (offset == WINDOW && write)
        write_register(c, *value);
    else if (!write)
        *value = offset == SELECT ? c->ioapic.ioregsel : offset == WINDOW ? read_register(c) : 0;
}

void chips_ioapic_save(struct soft_chips *c, struct kvm_ioapic_state *state)
{
    *state = c->ioapic;
    state->irr &= ~c->ioapic_delivered;
}

void chips_ioapic_load(struct soft_chips *c, const struct kvm_ioapic_state *state)
{
    c->ioapic = *state;
    c->ioapic.irr = 0;
    c->ioapic.pad = 0;
    c->ioapic_delivered = 0;
    for (int pin = 0; pin < PINS; pin++)
        if (state->irr >> pin & 1)
            set_level(c, pin, 1);
    c->dirty = 1;
}

void chips_ioapic_init(struct soft_chips *c)
{
    memset(&c->ioapic, 0, sizeof c->ioapic);
    c->ioapic.base_address = 0xfec00000;
    for (int pin = 0; pin < PINS; pin++)
        c->ioapic.redirtbl[pin].fields.mask = 1;
}
