/*
 * What KVM tells of the TSC.
 */
#pragma once

#include <stdint.h>

/* The TSC's frequency in kHz. 0 if the host does not tell it. */
uint64_t kvm_tsc_khz(void);
