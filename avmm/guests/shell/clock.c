#include "clock.h"

#include "cpu.h"
#include "input.h"
#include "irq.h"
#include "kvmclock.h"
#include "layout.h"
#include "trap.h"

#define IRQ_PIT         0
#define PIT_CHANNEL_0   0x40
#define PIT_COMMAND     0x43
#define RATE_GENERATOR  0x34            /* channel 0, low byte then high, mode 2 */
#define ONCE            0x30            /* the same in mode 0: a last tick, at the latest in 55 ms */
#define PIT_HZ          1193182

#define PATIENCE        (1ull << 31)    /* TSC cycles: many ticks at any rate a CPU has */
#define TICKS_TO_TRUST  10

volatile uint64_t clock_ticks;
static volatile uint64_t first_tsc, last_tsc;
static uint64_t boot_tsc;
static uint64_t tsc_khz;                /* 0: nobody has told it */

static void on_tick(void)
{
        last_tsc = tsc();
        if (clock_ticks++ == 0)
                first_tsc = last_tsc;
        irq_acknowledge(IRQ_PIT);
}

static void program(uint8_t mode, uint16_t count)
{
        out8(PIT_COMMAND, mode);
        out8(PIT_CHANNEL_0, count & 0xff);
        out8(PIT_CHANNEL_0, count >> 8);
}

void clock_init(void)
{
        boot_tsc = tsc();
        tsc_khz = kvm_tsc_khz();
        on_interrupt(VECTOR_IRQ + IRQ_PIT, on_tick);
        clock_start();
        irq_enable(IRQ_PIT);
}

void clock_start(void)
{
        program(RATE_GENERATOR, PIT_HZ / CLOCK_HZ);
}

void clock_stop(void)
{
        if (tsc_khz)
                program(ONCE, 0);
}

uint64_t clock_uptime(void)
{
        return tsc_khz ? (tsc() - boot_tsc) / (tsc_khz * 1000 / CLOCK_HZ) : clock_ticks;
}

bool clock_runs(void)
{
        const uint64_t ticks = clock_ticks, begin = tsc();

        while (clock_ticks == ticks)
                if (tsc() - begin > PATIENCE)
                        return false;
        return true;
}

void clock_wait(void)
{
        const uint64_t ticks = clock_ticks;

        interrupts_off();
        while (clock_ticks == ticks && !key_pressed()) {
                interrupts_on_and_wait();
                interrupts_off();
        }
        interrupts_on();
}

uint64_t clock_microseconds(uint64_t cycles)
{
        uint64_t per_tick;

        if (tsc_khz)
                return cycles * 1000 / tsc_khz;
        while (clock_ticks <= TICKS_TO_TRUST)
                if (!clock_runs())
                        return 0;
        interrupts_off();
        per_tick = (last_tsc - first_tsc) / (clock_ticks - 1);
        interrupts_on();
        return per_tick ? cycles * (1000000 / CLOCK_HZ) / per_tick : 0;
}
