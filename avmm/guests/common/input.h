/*
 * Characters from the serial console, through the receive interrupt and a queue.
 */
#pragma once

#include <stdbool.h>

#define CTRL_C  3

void input_init(void);

/* Sleeps in HLT until there is one. "\r\n" counts as one "\r". */
int get_char(void);

bool key_pressed(void);

/*
 * How many Ctrl-C are in the queue, that is: whether to stop what is being done. get_char()
 * counts down as it returns them.
 */
extern volatile unsigned interrupted;
