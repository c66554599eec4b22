/*
 * Exceptions, interrupts, and the two ways in which a guest may survive a fault on purpose:
 * an excursion to ring 3 (ring3.S) and a guarded access (guarded.S).
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* Loads IDT and TSS. Interrupts stay off. */
void trap_init(void);

/* Loads the same IDT on an application processor, which never leaves ring 0 and needs no TSS. */
void trap_init_ap(void);

/* The handler acknowledges the interrupt itself; it runs with interrupts off. */
void on_interrupt(int vector, void (*handler)(void));

/*
 * Calls function(argument) in ring 3 with access to all memory and ports, on a stack of its own.
 * False if it ended with a fault; last_fault then says which. Not reentrant, and for the boot
 * processor only. If the host interprets ring 0, this is a thousand times as fast as a direct
 * call.
 */
bool ring3_call(void (*function)(void *), void *argument);

struct access {
        uint64_t value;
        uint64_t faulted;       /* then last_fault says why */
};

struct fault {
        uint64_t vector, error, address;
};

extern struct fault last_fault;

/* Loads and stores of 1, 2, 4 or 8 bytes that report a fault instead of ending the guest. */
struct access guarded_load(uint64_t address, int width);
struct access guarded_store(uint64_t address, int width, uint64_t value);

const char *exception_name(uint64_t vector);
