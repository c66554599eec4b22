/*
 * How a guest ends.
 */
#pragma once

#include <stdint.h>

/* Ends the guest. The VMM ends with this status if it has one of the two ports. */
_Noreturn void finish(uint32_t status);

_Noreturn void reboot(void);
_Noreturn void triple_fault(void);
