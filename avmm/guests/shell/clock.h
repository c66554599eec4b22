/*
 * Time: ticks of the PIT for long times, the TSC for short ones.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define CLOCK_HZ        100

extern volatile uint64_t clock_ticks;

void clock_init(void);

/*
 * While nothing waits for a tick, the clock may stop, so that an idle guest costs its host nothing.
 * It does not stop if nobody has told how fast the TSC is.
 */
void clock_stop(void);
void clock_start(void);

/* Since boot, in ticks, whether the clock has stopped meanwhile or not. */
uint64_t clock_uptime(void);

/* Waits up to a tenth of a second or so for the next tick. */
bool clock_runs(void);

/* Sleeps until the next tick, or until a key is pressed. Only if the clock runs. */
void clock_wait(void);

/*
 * TSC cycles in microseconds. If nobody has told how fast the TSC is, at the rate seen since boot:
 * within a tenth of a second of boot it waits for that to pass. 0 if the clock does not run.
 */
uint64_t clock_microseconds(uint64_t cycles);
