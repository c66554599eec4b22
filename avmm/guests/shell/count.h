/*
 * Where `count` counts to. A number that a channel was given is never given to it again, wherever
 * the guest goes on from a state that was taken of it: the device has it, or its ring in memory.
 * (vsock, whose connections end there, is the one that must ask what has arrived.)
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum progress { GOES_ON, DONE, FAILED };

struct channel {
        const char *name;

        /* Or NULL. False, and it says why: there is no such device, say. */
        bool (*open)(void);

        /*
         * Gives one number more, if it can just now, or is DONE where it has the last one. FAILED:
         * it says why. `given` is the latest, 0 at first.
         */
        enum progress (*step)(uint64_t *given, uint64_t last);

        /* Or NULL. Brings to its end what was begun. */
        void (*close)(void);
};

/* A number as a line, and how long that is; it does not end with a zero. */
#define COUNT_LINE      24
uint32_t count_line(char line[COUNT_LINE], uint64_t number);

extern const struct channel count_on_disk, count_on_vsock;
