/* Runs in a Linux guest: `finish STATUS` ends avmm's run with that status, through the exit port
 * (avmm/devices/pc/exit.py). Without such a port, or without the right to use it, nothing happens.
 * Before, and with `finish sent` only, it waits until the console's output has been sent.
 * It does not use /dev/port, which distributions' cloud kernels lack. */

#include <stdint.h>

enum { SYS_ioctl = 16, SYS_nanosleep = 35, SYS_exit = 60, SYS_ioperm = 173, TIOCOUTQ = 0x5411 };
enum { EXIT_STATUS_PORT = 0xf8, PORTS = 4 };
enum { PAUSE_NS = 5000000, PAUSES = 400 };

static long syscall3(long number, long a, long b, long c)
{
    long answer;
    __asm__ volatile("syscall" : "=a"(answer) : "a"(number), "D"(a), "S"(b), "d"(c)
                     : "rcx", "r11", "memory");
    return answer;
}

/* What was written to the console may still be in the kernel, which sends it from an interrupt. Wait
 * for that, but not for ever: perhaps nobody reads it. */
static void wait_until_sent(void)
{
    const long pause[] = { 0, PAUSE_NS };
    int left, pauses = 0;
    for (int fd = 0; fd < 3; fd++)
        while (pauses++ < PAUSES && syscall3(SYS_ioctl, fd, TIOCOUTQ, (long)&left) == 0 && left > 0)
            syscall3(SYS_nanosleep, (long)pause, 0, 0);
}

__attribute__((noreturn, used)) static void finish(const long *stack)
{
    const char *text = stack[0] > 1 ? (const char *)stack[2] : "1";
    uint32_t status = 0;
    int ends = *text >= '0' && *text <= '9';
    while (*text >= '0' && *text <= '9')
        status = status * 10 + (uint32_t)(*text++ - '0');
    wait_until_sent();
    if (ends && syscall3(SYS_ioperm, EXIT_STATUS_PORT, PORTS, 1) == 0)
        __asm__ volatile("outl %0, %1" : : "a"(status), "Nd"((uint16_t)EXIT_STATUS_PORT));
    for (;;)
        syscall3(SYS_exit, 0, 0, 0);
}

__attribute__((naked, noreturn)) void _start(void)
{
    __asm__("mov %rsp, %rdi\n\tand $-16, %rsp\n\tcall finish");
}
