/*
 * The ways to end a guest. Those that tell the VMM more come first.
 */
#include "finish.h"

#include "console.h"
#include "cpu.h"

#define AVMM_EXIT       0xf8    /* avmm ends with exactly this status */
#define QEMU_EXIT       0xf4    /* isa-debug-exit: QEMU ends with status << 1 | 1 */
#define I8042_COMMAND   0x64
#define I8042_RESET     0xfe

_Noreturn void triple_fault(void)
{
        /*
         * Without an IDT neither the page fault nor the resulting double fault can be delivered.
         */
        const struct {
                uint16_t limit;
                uint64_t base;
        } __attribute__((packed)) nowhere = { 0, 0 };

        asm volatile("cli; lidt %0" : : "m"(nowhere));
        for (;;)
                asm volatile("mov (%0), %%al" : : "r"(1ull << 40) : "rax");
}

_Noreturn void reboot(void)
{
        console_drain();
        out8(I8042_COMMAND, I8042_RESET);
        triple_fault();
}

_Noreturn void finish(uint32_t status)
{
        console_drain();
        out32(AVMM_EXIT, status);
        out32(QEMU_EXIT, status);
        reboot();
}
