#include "lapic.h"

#include "cpu.h"
#include "layout.h"

#define LAPIC           0xfee00000ul

enum lapic_register {
        ID = 0x20,
        TASK_PRIORITY = 0x80,
        ACKNOWLEDGE = 0xb0,
        SPURIOUS = 0xf0,
        COMMAND = 0x300,
        COMMAND_TARGET = 0x310,
        LINT0 = 0x350,
};

#define SPURIOUS_ENABLE 0x100
#define LVT_EXTINT      0x700           /* virtual wire: vectors come from the 8259s */
#define LVT_MASKED      0x10000

#define ICR_FIXED       0x0000
#define ICR_INIT        0x0500
#define ICR_STARTUP     0x0600
#define ICR_PENDING     0x1000
#define ICR_ASSERT      0x4000

/* Each is one plain MOV, because the compiler must not choose another kind of access. */
static uint32_t read(enum lapic_register which)
{
        uint32_t value;

        asm volatile("movl (%1), %0" : "=r"(value) : "r"(LAPIC + which) : "memory");
        return value;
}

static void write(enum lapic_register which, uint32_t value)
{
        asm volatile("movl %0, (%1)" : : "r"(value), "r"(LAPIC + which) : "memory");
}

static void send(uint8_t id, uint32_t command)
{
        write(COMMAND_TARGET, (uint32_t)id << 24);
        write(COMMAND, command);
        while (read(COMMAND) & ICR_PENDING)
                pause();
}

void lapic_init(bool takes_pic_interrupts)
{
        write(TASK_PRIORITY, 0);
        write(SPURIOUS, SPURIOUS_ENABLE | VECTOR_SPURIOUS);
        write(LINT0, takes_pic_interrupts ? LVT_EXTINT : LVT_EXTINT | LVT_MASKED);
}

uint8_t lapic_id(void)
{
        return read(ID) >> 24;
}

void lapic_acknowledge(void)
{
        write(ACKNOWLEDGE, 0);
}

void lapic_send_interrupt(uint8_t id, uint8_t vector)
{
        send(id, ICR_ASSERT | ICR_FIXED | vector);
}

void lapic_send_init(uint8_t id)
{
        send(id, ICR_ASSERT | ICR_INIT);
}

void lapic_send_startup(uint8_t id, uint32_t address)
{
        send(id, ICR_ASSERT | ICR_STARTUP | address >> 12);
}
