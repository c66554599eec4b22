#include "clock.h"

#include "cpu.h"
#include "input.h"
#include "irq.h"
#include "layout.h"
#include "trap.h"

#define IRQ_PIT         0
#define PIT_CHANNEL_0   0x40
#define PIT_COMMAND     0x43
#define RATE_GENERATOR  0x34            /* channel 0, low byte then high, mode 2 */
#define PIT_HZ          1193182

#define PATIENCE        (1ull << 31)    /* TSC cycles: many ticks at any rate a CPU has */
#define TICKS_TO_TRUST  10

volatile uint64_t clock_ticks;
static volatile uint64_t first_tsc, last_tsc;

static void on_tick(void)
{
        last_tsc = tsc();
        if (clock_ticks++ == 0)
                first_tsc = last_tsc;
        irq_acknowledge(IRQ_PIT);
}

void clock_init(void)
{
        const uint16_t divisor = PIT_HZ / CLOCK_HZ;

        on_interrupt(VECTOR_IRQ + IRQ_PIT, on_tick);
        out8(PIT_COMMAND, RATE_GENERATOR);
        out8(PIT_CHANNEL_0, divisor & 0xff);
        out8(PIT_CHANNEL_0, divisor >> 8);
        irq_enable(IRQ_PIT);
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

        while (clock_ticks <= TICKS_TO_TRUST)
                if (!clock_runs())
                        return 0;
        interrupts_off();
        per_tick = (last_tsc - first_tsc) / (clock_ticks - 1);
        interrupts_on();
        return per_tick ? cycles * (1000000 / CLOCK_HZ) / per_tick : 0;
}
