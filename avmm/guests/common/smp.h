/*
 * Application processors.
 */
#pragma once

#include <stdbool.h>

/*
 * Starts CPU number `cpu` (an index into boot.apic_ids) in main(), on a small stack of its own and
 * with interrupts off. False if it does not come up in half a minute, or if Ctrl-C is typed.
 */
bool start_cpu(int cpu, void (*main)(int cpu));

/* Starts `count` CPUs except the boot processor. If one does not come up, the guest ends. */
void start_cpus(int count, void (*main)(int cpu));
