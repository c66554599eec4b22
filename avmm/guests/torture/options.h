/*
 * The command line of the torture guest: words key=value, all optional.
 *
 *   loops=N          how often to do all of it                                 (1)
 *   cpus=N           how many CPUs do it, at once                              (1)
 *   long=0|1         also string accesses of more than KVM does in one exit    (0)
 *   sse=0|1          also accesses of 16 bytes                                 (1)
 *   msr=N            also RDMSR and WRMSR of MSR N + cpu; 0: of none           (0)
 *   hypercall=0|1    also a hypercall                                          (0)
 *   verbose=0|1      print each CPU's sum after each loop                      (0)
 */
#pragma once

#include <stdint.h>

struct options {
        uint64_t loops, cpus, long_strings, sse, msr, hypercall, verbose;
};

/* Changes the text. If the text makes no sense, prints an error line and ends the guest. */
struct options parse_options(char *command_line);
