/*
 * Application processors.
 */
#pragma once

#include <stdbool.h>

/*
 * Starts CPU number `cpu` (an index into boot.apic_ids) in main(), on a small stack of its own
 * and with interrupts off. False if it does not come up in a few seconds, or if Ctrl-C is hit.
 */
bool start_cpu(int cpu, void (*main)(int cpu));

/* Starts all but the boot processor, of `count`; if one does not come up, the guest ends. */
void start_cpus(int count, void (*main)(int cpu));
