/* The two 8259A interrupt controllers, the second one at pin 2 of the first.
 *
 * Two things are KVM's rather than the datasheet's, so that state and behaviour are the same: an
 * edge that has been seen stays in IRR although its line falls, and a request of the slave is
 * latched in the master's IRR as if it were an edge. Special mask mode is the datasheet's (KVM
 * stores it and does nothing). */

#include "inside.h"

enum { CASCADE = 2, NONE = -1 };

static const uint8_t elcr_masks[2] = { 0xf8, 0xde };    /* 0, 1, 2, 8 and 13 are always edges */

static void set_pin(struct kvm_pic_state *s, int pin, int level)
{
    uint8_t bit = 1 << pin;
    int edge = !(s->elcr & bit);
    if (level && (!edge || !(s->last_irr & bit)))
        s->irr |= bit;
    if (!level && !edge)
        s->irr &= ~bit;
    s->last_irr = level ? s->last_irr | bit : s->last_irr & ~bit;
}

/* How far down the order of priorities the first of these pins is; 8 if there is none. */
static int rank(const struct kvm_pic_state *s, uint8_t pins)
{
    int i = 0;
    while (i < 8 && !(pins >> ((i + s->priority_add) & 7) & 1))
        i++;
    return i;
}

/* The pin that asks for the CPU, or NONE. */
static int request(struct soft_chips *c, int chip)
{
    const struct kvm_pic_state *s = &c->pics[chip];
    uint8_t serving = s->isr;
    if (s->special_fully_nested_mode && chip == 0)
        serving &= ~(1 << CASCADE);
    if (s->special_mask)
        serving &= ~s->imr;
    int asks = rank(s, s->irr & ~s->imr);
    return asks < rank(s, serving) ? (asks + s->priority_add) & 7 : NONE;
}

void chips_pic_update(struct soft_chips *c)
{
    if (request(c, 1) != NONE) {
        set_pin(&c->pics[0], CASCADE, 1);
        set_pin(&c->pics[0], CASCADE, 0);
    }
    c->dirty = 1;
}

static void end_of_interrupt(struct soft_chips *c, int chip, int pin)
{
    c->pics[chip].isr &= ~(1 << pin);
    chips_acked(c, chip, 8 * chip + pin);
}

static void acknowledge(struct soft_chips *c, int chip, int pin)
{
    struct kvm_pic_state *s = &c->pics[chip];
    s->isr |= 1 << pin;
    if (!(s->elcr >> pin & 1))
        s->irr &= ~(1 << pin);
    if (s->auto_eoi) {
        if (s->rotate_on_auto_eoi)
            s->priority_add = (pin + 1) & 7;
        end_of_interrupt(c, chip, pin);
    }
}

int chips_pic_pends(struct soft_chips *c)
{
    return request(c, 0) != NONE;
}

/* Both INTA cycles. A request that has gone gives pin 7: spurious, and nothing is in service. */
int chips_pic_take(struct soft_chips *c)
{
    int pin = request(c, 0), vector;
    if (pin == NONE) {
        vector = c->pics[0].irq_base + 7;
    } else {
        acknowledge(c, 0, pin);
        vector = c->pics[0].irq_base + pin;
        if (pin == CASCADE) {
            pin = request(c, 1);
            if (pin != NONE)
                acknowledge(c, 1, pin);
            vector = c->pics[1].irq_base + (pin == NONE ? 7 : pin);
        }
    }
    chips_pic_update(c);
    return vector & 0xff;
}

/* 1: it is new. 0: it was there already. -1: the pin is masked. */
int chips_pic_set(struct soft_chips *c, int pin, int source, int level)
{
    struct kvm_pic_state *s = &c->pics[pin >> 3];
    uint8_t bit = 1 << (pin & 7), *held = &c->pic_sources[pin], was = s->irr, seen = s->last_irr;
    *held = level ? *held | 1 << source : *held & ~(1 << source);
    set_pin(s, pin & 7, *held != 0);
    int answer = *held && was & bit && (s->elcr & bit || !(seen & bit)) ? 0 : 1;
    if (s->imr & bit)
        answer = -1;
    chips_pic_update(c);
    return answer;
}

static void initialise(struct soft_chips *c, int chip, uint8_t icw1)
{
    struct kvm_pic_state *s = &c->pics[chip];
    uint8_t edges = s->irr & ~s->elcr;
    s->irr &= s->elcr;
    s->last_irr = s->imr = s->priority_add = s->special_mask = s->read_reg_select = 0;
    s->isr = s->poll = 0;
    s->init4 = icw1 & 1;
    if (!s->init4)
        s->special_fully_nested_mode = s->auto_eoi = 0;
    s->init_state = 1;
    for (int pin = 0; pin < 8; pin++)
        if (edges >> pin & 1)
            end_of_interrupt(c, chip, pin);
}

static void ocw2(struct soft_chips *c, int chip, uint8_t value)
{
    struct kvm_pic_state *s = &c->pics[chip];
    int rotates = value >> 7, specific = value >> 6 & 1, ends = value >> 5 & 1, pin = value & 7;
    if (!ends && !specific) {
        s->rotate_on_auto_eoi = rotates;
        return;
    }
    if (!specific) {
        int first = rank(s, s->special_mask ? s->isr & ~s->imr : s->isr);
        if (first == 8)
            return;
        pin = (first + s->priority_add) & 7;
    }
    if (rotates)
        s->priority_add = (pin + 1) & 7;
    if (ends)
        end_of_interrupt(c, chip, pin);
}

static void command(struct soft_chips *c, int chip, uint8_t value)
{
    struct kvm_pic_state *s = &c->pics[chip];
    if (value & 0x10) {
        initialise(c, chip, value);
    } else if (value & 8) {             /* OCW3 */
        if (value & 4)
            s->poll = 1;
        if (value & 2)
            s->read_reg_select = value & 1;
        if (value & 0x40)
            s->special_mask = value >> 5 & 1;
    } else {
        ocw2(c, chip, value);
    }
}

static void data(struct kvm_pic_state *s, uint8_t value)
{
    switch (s->init_state) {
    case 1:                             /* ICW2 */
        s->irq_base = value & 0xf8;
        s->init_state = 2;
        break;
    case 2:                             /* ICW3: how the two are wired is fixed */
        s->init_state = s->init4 ? 3 : 0;
        break;
    case 3:                             /* ICW4 */
        s->special_fully_nested_mode = value >> 4 & 1;
        s->auto_eoi = value >> 1 & 1;
        s->init_state = 0;
        break;
    default:
        s->imr = value;
    }
}

/* A read in poll mode is the acknowledgement, as if the CPU had taken the interrupt. (KVM ends the
 * interrupt at once, and does not set bit 7.) */
static uint8_t poll(struct soft_chips *c, int chip)
{
    int pin = request(c, chip);
    c->pics[chip].poll = 0;
    if (pin == NONE)
        return 0;
    acknowledge(c, chip, pin);
    if (chip == 1)                      /* it was latched there, and is not the CPU's any more */
        c->pics[0].irr &= ~(1 << CASCADE);
    return pin | 0x80;
}

void chips_pic_io(struct soft_chips *c, int write, uint16_t port, uint8_t *value)
{
    int chip = port >= 0x400 ? port & 1 : port >> 7;
    struct kvm_pic_state *s = &c->pics[chip];
    if (port >= 0x400) {
        if (write)
            s->elcr = *value & s->elcr_mask;
        else
            *value = s->elcr;
        return;
    }
    if (write) {
        if (port & 1)
            data(s, *value);
        else
            command(c, chip, *value);
    } else if (s->poll) {
        *value = poll(c, chip);
    } else {
        *value = port & 1 ? s->imr : s->read_reg_select ? s->isr : s->irr;
        return;
    }
    chips_pic_update(c);
}

void chips_pic_load(struct soft_chips *c, int chip, const struct kvm_pic_state *state)
{
    c->pics[chip] = *state;
    c->pics[chip].elcr_mask = elcr_masks[chip];
    chips_pic_update(c);
}

void chips_pic_init(struct soft_chips *c)
{
    for (int i = 0; i < 2; i++)
        c->pics[i] = (struct kvm_pic_state) { .elcr_mask = elcr_masks[i] };
}
