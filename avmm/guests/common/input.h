/*
 * Characters from the console, through its receive interrupt and a queue.
 */
#pragma once

#include <stdbool.h>

#define CTRL_C  3

void input_init(void);

/* Sleeps in HLT until there is one. "\r\n" counts as one "\r". */
int get_char(void);

bool key_pressed(void);

/* For whoever receives, with interrupts off: a character that has come in, where there is room. */
bool input_has_room(void);
void input_put(char c);

/*
 * How many Ctrl-C are in the queue, that is: whether to stop what is being done. get_char()
 * counts down as it returns them.
 */
extern volatile unsigned interrupted;
