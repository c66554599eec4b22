/*
 * The two 8259 interrupt controllers.
 */
#pragma once

#include <stdint.h>

/* Moves the 8259s to VECTOR_IRQ with everything masked. */
void irq_init(void);
void irq_enable(int irq);
void irq_acknowledge(int irq);
