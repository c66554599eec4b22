/*
 * The local APIC, through its registers at 0xfee00000.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/* Exactly one CPU, the boot processor, takes the interrupts of the two 8259s. */
void lapic_init(bool takes_pic_interrupts);

uint8_t lapic_id(void);
void lapic_acknowledge(void);

void lapic_send_interrupt(uint8_t id, uint8_t vector);
void lapic_send_init(uint8_t id);
void lapic_send_startup(uint8_t id, uint32_t address);
