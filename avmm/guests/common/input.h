/*
 * Characters from the console, through its receive interrupt and a queue.
 */
#pragma once

#include <stdbool.h>

#define CTRL_C  3

void input_init(void);

/* Sleeps in HLT until there is a character. "\r\n" counts as one "\r". */
int get_char(void);

bool key_pressed(void);

/* For the receiver, with interrupts off: adds a character that has come in, if there is room. */
bool input_has_room(void);
void input_put(char c);

/*
 * The number of Ctrl-C in the queue. If there is one, the running command should stop. get_char()
 * decrements the number when it returns one.
 */
extern volatile unsigned interrupted;
