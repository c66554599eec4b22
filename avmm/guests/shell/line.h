/*
 * A line editor for a VT100: insert and delete anywhere, history, completion.
 */
#pragma once

#include <stdbool.h>

#define LINE_SIZE 256

/* False on Ctrl-D in an empty line. Ctrl-C makes the line empty. */
bool read_line(const char *prompt, char line[LINE_SIZE]);
