/*
 * Time: ticks of the PIT for long times, the TSC for short ones.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define CLOCK_HZ        100

extern volatile uint64_t clock_ticks;

void clock_init(void);

/* Waits up to a tenth of a second or so for the next tick. */
bool clock_runs(void);

/* Sleeps until the next tick, or until a key is pressed. Only if the clock runs. */
void clock_wait(void);

/*
 * TSC cycles in microseconds, at the rate seen since boot. Within a tenth of a second of boot it
 * waits for that to pass. 0 if the clock does not run.
 */
uint64_t clock_microseconds(uint64_t cycles);
