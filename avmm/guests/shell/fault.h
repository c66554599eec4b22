#pragma once

/* One line about last_fault. */
void print_fault(void);
