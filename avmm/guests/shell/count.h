/*
 * A channel to which `count` counts. It never gets the same number twice, even if the guest
 * continues from a saved state: either the device has the number, or its ring in memory has it.
 * (Connections of vsock end then, so vsock has to ask the host what has arrived.)
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum progress { GOES_ON, DONE, FAILED };

struct channel {
        const char *name;

        /* May be NULL. Returns false, and prints why, if for example there is no such device. */
        bool (*open)(void);

        /*
         * Sends one more number, if it can do so now. Returns DONE when the last one has arrived.
         * If it returns FAILED, it has printed why. `given` is the latest number, at first 0.
         */
        enum progress (*step)(uint64_t *given, uint64_t last);

        /* May be NULL. Finishes what was begun. */
        void (*close)(void);
};

/* Writes a number as a line, without a zero at its end, and returns the line's length. */
#define COUNT_LINE      24
uint32_t count_line(char line[COUNT_LINE], uint64_t number);

extern const struct channel count_on_disk, count_on_vsock;
