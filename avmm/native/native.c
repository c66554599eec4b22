/* The C that cffi compiles into avmm.native._native: code that does not concern KVM. Virtqueues,
 * pages of RAM, and system calls that Python lacks. */

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "pages.h"
#include "vring.h"
