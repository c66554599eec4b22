/*
 * What happens at each vector. A fault that somebody expects becomes a result. An interrupt goes
 * to its handler. Anything else ends the guest with a message on the console.
 */
#include "trap.h"

#include <stddef.h>

#include "console.h"
#include "cpu.h"
#include "finish.h"

/* Exactly what vectors.S and the CPU have pushed, lowest address first. */
struct trap_frame {
        uint64_t r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
        uint64_t vector, error;
        uint64_t rip, cs, rflags, rsp, ss;
};

struct gate {
        uint16_t offset_low, selector;
        uint8_t stack, type;
        uint16_t offset_middle;
        uint32_t offset_high, reserved;
};

/*
 * Ring 3 may use every port, by IOPL and by the bitmap: kvm_pvm runs ring 3 with its own IOPL,
 * whatever IRETQ has loaded, and so it consults the bitmap.
 */
struct task_state {
        uint32_t reserved;
        uint64_t rsp[3];
        uint64_t unused[9];
        uint16_t reserved_too, io_map;
        uint8_t io_bitmap[65536 / 8 + 1];       /* the CPU may read one byte past the end */
} __attribute__((packed));

struct table_pointer {
        uint16_t limit;
        uint64_t base;
} __attribute__((packed));

extern const char vectors[], ring3_done[], ring3_return[];
extern const char guarded_begin[], guarded_end[], guarded_fault[];
extern uint64_t gdt[], ring3_kernel_stack;

struct task_state task_state;
struct fault last_fault;

static struct gate idt[VECTORS];
static void (*handlers[VECTORS])(void);

void on_interrupt(int vector, void (*handler)(void))
{
        handlers[vector] = handler;
}

void trap_init_ap(void)
{
        const struct table_pointer pointer = { sizeof(idt) - 1, (uint64_t)idt };

        asm volatile("lidt %0" : : "m"(pointer));
}

void trap_init(void)
{
        const uint64_t base = (uint64_t)&task_state;

        for (int i = 0; i < VECTORS; i++) {
                const uint64_t stub = (uint64_t)vectors + 16 * i;

                idt[i] = (struct gate){
                        .offset_low = stub,
                        .offset_middle = stub >> 16,
                        .selector = KERNEL_CODE,
                        .type = 0x8e,   /* interrupt gate: interrupts off inside */
                };
        }
        trap_init_ap();

        task_state.io_map = offsetof(struct task_state, io_bitmap);
        gdt[TASK_STATE / 8] = (sizeof(task_state) - 1) | (base & 0xffffff) << 16 |
                              0x89ull << 40 | (base >> 24 & 0xff) << 56;
        gdt[TASK_STATE / 8 + 1] = base >> 32;
        asm volatile("ltr %w0" : : "r"(TASK_STATE));
}

const char *exception_name(uint64_t vector)
{
        switch (vector) {
        case 0: return "divide error";
        case 6: return "invalid opcode";
        case 8: return "double fault";
        case 12: return "stack fault";
        case 13: return "general protection";
        case 14: return "page fault";
        case 17: return "alignment check";
        case 18: return "machine check";
        default: return "exception";
        }
}

static uint64_t fault_address(void)
{
        uint64_t address;

        asm volatile("mov %%cr2, %0" : "=r"(address));
        return address;
}

static void remember(const struct trap_frame *frame)
{
        last_fault = (struct fault){ frame->vector, frame->error, fault_address() };
}

static _Noreturn void panic(const struct trap_frame *frame)
{
        print("\npanic: %s, vector %lu, rip 0x%lx, cs 0x%lx, error 0x%lx, cr2 0x%lx\n",
              exception_name(frame->vector), frame->vector, frame->rip, frame->cs, frame->error,
              fault_address());
        finish(100 + frame->vector);
}

static void exception(struct trap_frame *frame)
{
        const uint64_t rip = frame->rip;

        if (frame->cs == USER_CODE) {
                frame->rax = rip == (uint64_t)ring3_done;
                remember(frame);
                frame->rip = (uint64_t)ring3_return;
                frame->cs = KERNEL_CODE;
                frame->ss = KERNEL_DATA;
                frame->rsp = ring3_kernel_stack;
        } else if (rip >= (uint64_t)guarded_begin && rip < (uint64_t)guarded_end) {
                remember(frame);
                frame->rip = (uint64_t)guarded_fault;
        } else {
                panic(frame);
        }
}

/* Called by vectors.S. A change to the frame changes where the interrupted code continues. */
void trap(struct trap_frame *frame)
{
        if (frame->vector < VECTOR_IRQ)
                exception(frame);
        else if (handlers[frame->vector])
                handlers[frame->vector]();
        /* An interrupt without a handler is spurious, and must not be acknowledged. */
}
