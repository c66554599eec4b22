/*
 * Single instructions that C cannot express.
 */
#pragma once

#include <stdint.h>

static inline void out8(uint16_t port, uint8_t value)
{
        asm volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void out16(uint16_t port, uint16_t value)
{
        asm volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void out32(uint16_t port, uint32_t value)
{
        asm volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t in8(uint16_t port)
{
        uint8_t value;

        asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
        return value;
}

static inline uint16_t in16(uint16_t port)
{
        uint16_t value;

        asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
        return value;
}

static inline uint32_t in32(uint16_t port)
{
        uint32_t value;

        asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
        return value;
}

struct cpuid {
        uint32_t eax, ebx, ecx, edx;
};

static inline struct cpuid cpuid(uint32_t leaf)
{
        struct cpuid is;

        asm volatile("cpuid"
                     : "=a"(is.eax), "=b"(is.ebx), "=c"(is.ecx), "=d"(is.edx)
                     : "a"(leaf), "c"(0));
        return is;
}

static inline void wrmsr(uint32_t number, uint64_t value)
{
        asm volatile("wrmsr"
                     : : "c"(number), "a"((uint32_t)value), "d"((uint32_t)(value >> 32))
                     : "memory");
}

/*
 * Ring 0 and ring 3 may see different counters (a host that interprets ring 0 offsets only that
 * one), so only differences of readings taken in one ring mean anything.
 */
static inline uint64_t tsc(void)
{
        uint32_t low, high;

        asm volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
        return (uint64_t)high << 32 | low;
}

static inline void pause(void)
{
        asm volatile("pause" : : : "memory");
}

static inline void interrupts_off(void)
{
        asm volatile("cli" : : : "memory");
}

static inline void interrupts_on(void)
{
        asm volatile("sti" : : : "memory");
}

/* STI takes effect one instruction late, so no interrupt can come before HLT and be missed. */
static inline void interrupts_on_and_wait(void)
{
        asm volatile("sti; hlt" : : : "memory");
}
