#pragma once

/* Prints one line about last_fault. */
void print_fault(void);
