/* The C that cffi compiles into avmm.native._native: what is not KVM's. Virtqueues, pages of RAM,
 * and calls of Linux that Python lacks. */

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "pages.h"
#include "vring.h"
