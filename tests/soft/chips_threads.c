/* All entries of the chips, by many threads at once, for a sanitizer to watch. */

#include "chips.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { CPUS = 3, ROUNDS = 3000 };

static struct soft_chips *c;
static uint8_t ram[CPUS][64];
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;        /* a vCPU that runs has it */

static void kick(void *owner, int cpu)
{
    __atomic_fetch_or((unsigned *)owner, 1u << cpu, __ATOMIC_SEQ_CST);
}

static int write_guest(void *owner, uint64_t gpa, const void *data, size_t size)
{
    (void)owner;
    memcpy(&ram[gpa >> 12][gpa & 63], data, size);
    return 0;
}

static void *vcpu(void *argument)
{
    int cpu = (int)(long)argument;
    uint64_t v;
    uint8_t vector;
    for (int i = 0; i < ROUNDS; i++) {
        pthread_mutex_lock(&turn);
        soft_chips_run_timers(c);
        soft_chips_attention(c, cpu);
        if (soft_chips_take_interrupt(c, cpu) >= 0) {
            v = 0;
            soft_chips_mmio(c, cpu, 1, 0xfee000b0, 4, &v);
            v = 0x20;
            soft_chips_pio(c, cpu, 1, 0x20, 1, &v);
        }
        soft_chips_take_nmi(c, cpu);
        soft_chips_take_startup(c, cpu, SOFT_CHIPS_INIT | SOFT_CHIPS_SIPI, &vector);
        v = 0x1ff;
        soft_chips_mmio(c, cpu, 1, 0xfee000f0, 4, &v);
        v = 0x400ee;
        soft_chips_mmio(c, cpu, 1, 0xfee00320, 4, &v);
        soft_chips_msr_set(c, cpu, 0x6e0, soft_chips_tsc(c, cpu) + i * 50, 0);
        v = 0xc4500 | 0x40 | (i & 7) << 8;
        soft_chips_mmio(c, cpu, 1, 0xfee00300, 4, &v);
        v = i;
        soft_chips_pio(c, cpu, 1, 0x40 + (i & 3), 1, &v);
        soft_chips_pio(c, cpu, 0, 0x61, 1, &v);
        soft_chips_msr_set(c, cpu, 0x4b564d01, cpu << 12 | (i & 1), 0);
        pthread_mutex_unlock(&turn);
    }
    return NULL;
}

static void *device(void *argument)
{
    int fd = eventfd(0, 0), again = eventfd(0, EFD_NONBLOCK), gsi = 20 + (int)(long)argument;
    for (int i = 0; i < ROUNDS; i++) {
        struct kvm_irqfd f = { .fd = fd, .gsi = gsi, .flags = i & 1 ? KVM_IRQFD_FLAG_RESAMPLE : 0,
                               .resamplefd = again };
        struct kvm_irq_level line = { .irq = i % 24, .level = i >> 3 & 1 };
        struct kvm_msi msi = { .address_lo = 0xfee00000 | (i & 3) << 12, .data = 0x30 + i % 200 };
        uint64_t one = 1;
        if (soft_chips_vm_ioctl(c, KVM_IRQFD, &f))
            abort();
        if (write(fd, &one, 8) != 8)
            abort();
        soft_chips_vm_ioctl(c, KVM_IRQ_LINE, &line);
        soft_chips_vm_ioctl(c, KVM_SIGNAL_MSI, &msi);
        f.flags = KVM_IRQFD_FLAG_DEASSIGN;
        soft_chips_vm_ioctl(c, KVM_IRQFD, &f);
    }
    close(fd);
    close(again);
    return NULL;
}

static void *reader(void *argument)
{
    (void)argument;
    for (int i = 0; i < ROUNDS; i++) {
        struct kvm_irqchip chip = { .chip_id = i % 3 };
        struct kvm_lapic_state lapic;
        struct kvm_pit_state2 pit;
        struct kvm_clock_data clock;
        soft_chips_vm_ioctl(c, KVM_GET_IRQCHIP, &chip);
        soft_chips_vm_ioctl(c, KVM_SET_IRQCHIP, &chip);
        soft_chips_cpu_ioctl(c, i % CPUS, KVM_GET_LAPIC, &lapic);
        soft_chips_cpu_ioctl(c, i % CPUS, KVM_SET_LAPIC, &lapic);
        soft_chips_vm_ioctl(c, KVM_GET_PIT2, &pit);
        soft_chips_vm_ioctl(c, KVM_SET_PIT2, &pit);
        soft_chips_vm_ioctl(c, KVM_GET_CLOCK, &clock);
        clock.flags = 0;
        soft_chips_vm_ioctl(c, KVM_SET_CLOCK, &clock);
        soft_chips_set_tsc(c, i % CPUS, 2000000, i);
        soft_chips_next_deadline(c, -1);
        soft_chips_sweep(c);
    }
    return NULL;
}

int main(void)
{
    static unsigned kicks;
    struct soft_chips_host host = { .owner = &kicks, .tsc_khz = 2000000, .kick = kick,
                                    .write_guest = write_guest, .runs_timers = 1 };
    struct kvm_pit_config config = { .flags = KVM_PIT_SPEAKER_DUMMY };
    pthread_t threads[CPUS + 3];
    c = soft_chips_create(&host);
    soft_chips_vm_ioctl(c, KVM_CREATE_IRQCHIP, NULL);
    soft_chips_vm_ioctl(c, KVM_CREATE_PIT2, &config);
    for (int i = 0; i < CPUS; i++)
        soft_chips_add_cpu(c, i);
    for (long i = 0; i < CPUS; i++)
        pthread_create(&threads[i], NULL, vcpu, (void *)i);
    pthread_create(&threads[CPUS], NULL, device, (void *)0);
    pthread_create(&threads[CPUS + 1], NULL, device, (void *)1);
    pthread_create(&threads[CPUS + 2], NULL, reader, NULL);
    for (int i = 0; i < CPUS + 3; i++)
        pthread_join(threads[i], NULL);
    soft_chips_destroy(c);
    puts("done");
    return 0;
}
