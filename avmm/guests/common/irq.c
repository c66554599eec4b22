#include "irq.h"

#include "cpu.h"
#include "layout.h"

#define FIRST           0x20            /* command; data is one above */
#define SECOND          0xa0
#define INIT            0x11            /* edge triggered, cascaded, ICW4 follows */
#define ICW4_8086       0x01
#define CASCADE         2
#define END_OF_IRQ      0x20

static uint16_t masked = 0xffff & ~(1 << CASCADE);

static void write_masks(void)
{
        out8(FIRST + 1, masked);
        out8(SECOND + 1, masked >> 8);
}

void irq_init(void)
{
        out8(FIRST, INIT);
        out8(SECOND, INIT);
        out8(FIRST + 1, VECTOR_IRQ);
        out8(SECOND + 1, VECTOR_IRQ + 8);
        out8(FIRST + 1, 1 << CASCADE);
        out8(SECOND + 1, CASCADE);
        out8(FIRST + 1, ICW4_8086);
        out8(SECOND + 1, ICW4_8086);
        write_masks();
}

void irq_enable(int irq)
{
        masked &= ~(1 << irq);
        write_masks();
}

void irq_acknowledge(int irq)
{
        if (irq >= 8)
                out8(SECOND, END_OF_IRQ);
        out8(FIRST, END_OF_IRQ);
}
