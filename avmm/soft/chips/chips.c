/* The chips' door: the lock, what each entry does under it, and what follows its release. */

#include "inside.h"

#include <stdlib.h>

enum { M_APIC_BASE = 0x1b, M_DEADLINE = 0x6e0, M_X2APIC = 0x800, M_X2APIC_END = 0x900 };

/* ---- the lock ---- */

static uint32_t attention_of(struct soft_chips *c, int cpu)
{
    struct cpu *v = &c->cpus[cpu];
    struct lapic *l = &v->lapic;
    uint32_t a = l->events | (l->nmis ? SOFT_CHIPS_NMI : 0);
    if (v->timer_due || v->clock_stale || c->wall_stale)
        a |= SOFT_CHIPS_TIMER;
    if (c->irqchip && (chips_lapic_pends(l) >= 0
                       || (chips_lapic_accepts_pic(l) && chips_pic_pends(c))))
        a |= SOFT_CHIPS_INTERRUPT;
    return a;
}

void chips_lock(struct soft_chips *c)
{
    pthread_mutex_lock(&c->lock);
}

void chips_unlock(struct soft_chips *c)
{
    uint64_t kicks = 0;
    if (c->dirty) {
        c->dirty = 0;
        for (int i = 0; i < c->count; i++) {
            if (!c->cpus[i].exists)
                continue;
            uint32_t now = attention_of(c, i);
            uint32_t was = atomic_exchange(&c->cpus[i].attention, now);
            if (now & ~was)
                kicks |= 1ULL << i;
        }
        chips_thread_arm(c);
    }
    pthread_mutex_unlock(&c->lock);
    for (; kicks; kicks &= kicks - 1)
        if (c->host.kick)
            c->host.kick(c->host.owner, __builtin_ctzll(kicks));
}

/* ---- life ---- */

struct soft_chips *soft_chips_create(const struct soft_chips_host *host)
{
    struct soft_chips *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->host = *host;
    pthread_mutex_init(&c->lock, NULL);
    pthread_mutex_init(&c->pages, NULL);
    c->epoll = c->timer = c->stop = -1;
    c->armed = NEVER;
    c->told = INT64_MIN;
    c->pit.next = NEVER;
    chips_clock_init(c);
    return c;
}

void soft_chips_destroy(struct soft_chips *c)
{
    if (!c)
        return;
    chips_thread_end(c);
    pthread_mutex_destroy(&c->lock);
    pthread_mutex_destroy(&c->pages);
    free(c->routes);
    free(c);
}

int soft_chips_add_cpu(struct soft_chips *c, int cpu)
{
    if (cpu < 0 || cpu >= SOFT_CHIPS_CPUS)
        return -EINVAL;
    chips_lock(c);
    struct cpu *v = &c->cpus[cpu];
    int answer = v->exists ? -EEXIST : 0;
    if (!answer) {
        v->tsc_khz = c->host.tsc_khz;
        chips_lapic_reset(c, cpu, 0);
        chips_clock_add(c, v);
        v->exists = 1;
        if (cpu >= c->count)
            c->count = cpu + 1;
    }
    chips_unlock(c);
    return answer;
}

int soft_chips_has_irqchip(struct soft_chips *c)
{
    chips_lock(c);
    int answer = c->irqchip;
    chips_unlock(c);
    return answer;
}

static int create_irqchip(struct soft_chips *c)
{
    if (c->irqchip)
        return -EEXIST;
    if (c->count)
        return -EINVAL;
    int answer = chips_routes_default(c);
    if (!answer && c->host.runs_timers)
        answer = chips_thread_start(c);
    if (answer)
        return answer;
    chips_pic_init(c);
    chips_ioapic_init(c);
    c->irqchip = 1;
    return 0;
}

static int create_pit(struct soft_chips *c, const struct kvm_pit_config *config)
{
    if (config->flags & ~KVM_PIT_SPEAKER_DUMMY)
        return -EINVAL;
    if (c->pit.exists)
        return -EEXIST;
    if (!c->irqchip)
        return -ENOENT;
    chips_pit_init(c);
    c->pit.has_speaker = config->flags & KVM_PIT_SPEAKER_DUMMY;
    return 0;
}

/* ---- ioctls ---- */

int soft_chips_check_extension(long capability)
{
    switch (capability) {
    case KVM_CAP_IRQ_ROUTING: return ROUTES;
    case KVM_CAP_ADJUST_CLOCK:
        return KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
    case KVM_CAP_IRQCHIP: case KVM_CAP_PIT: case KVM_CAP_PIT2: case KVM_CAP_PIT_STATE2:
    case KVM_CAP_IRQFD: case KVM_CAP_IRQFD_RESAMPLE: case KVM_CAP_SIGNAL_MSI:
    case KVM_CAP_IRQ_INJECT_STATUS: case KVM_CAP_CLOCKSOURCE: case KVM_CAP_KVMCLOCK_CTRL:
    case KVM_CAP_USER_NMI: case KVM_CAP_TSC_DEADLINE_TIMER: case KVM_CAP_REINJECT_CONTROL:
        return 1;
    }
    return -ENOTTY;
}

static int get_irqchip(struct soft_chips *c, struct kvm_irqchip *chip)
{
    chips_sweep(c);
    switch (chip->chip_id) {
    case KVM_IRQCHIP_PIC_MASTER: case KVM_IRQCHIP_PIC_SLAVE:
        chip->chip.pic = c->pics[chip->chip_id];
        return 0;
    case KVM_IRQCHIP_IOAPIC: chips_ioapic_save(c, &chip->chip.ioapic); return 0;
    }
    return -EINVAL;
}

static int set_irqchip(struct soft_chips *c, const struct kvm_irqchip *chip)
{
    switch (chip->chip_id) {
    case KVM_IRQCHIP_PIC_MASTER: case KVM_IRQCHIP_PIC_SLAVE:
        chips_pic_load(c, chip->chip_id, &chip->chip.pic);
        return 0;
    case KVM_IRQCHIP_IOAPIC:
        chips_ioapic_load(c, &chip->chip.ioapic);
        chips_pic_update(c);            /* as KVM, whichever chip it is */
        return 0;
    }
    return -EINVAL;
}

static int irq_line(struct soft_chips *c, unsigned long request, struct kvm_irq_level *line)
{
    int status = chips_gsi(c, line->irq, BY_USER, !!line->level);
    if (request == KVM_IRQ_LINE_STATUS)
        line->status = status;
    return 0;
}

static int vm_ioctl(struct soft_chips *c, unsigned long request, void *argument)
{
    const struct kvm_msi *msi = argument;
    int taken;
    switch (request) {
    case KVM_CREATE_IRQCHIP: return create_irqchip(c);
    case KVM_CREATE_PIT2: return create_pit(c, argument);
    case KVM_GET_CLOCK: return chips_clock_get(c, argument);
    case KVM_SET_CLOCK: return chips_clock_set(c, argument);
    case KVM_GET_IRQCHIP: return c->irqchip ? get_irqchip(c, argument) : -ENXIO;
    case KVM_SET_IRQCHIP: return c->irqchip ? set_irqchip(c, argument) : -ENXIO;
    case KVM_GET_PIT2:
        if (!c->pit.exists)
            return -ENXIO;
        chips_pit_save(c, argument);
        return 0;
    case KVM_SET_PIT2: return c->pit.exists ? chips_pit_load(c, argument) : -ENXIO;
    case KVM_REINJECT_CONTROL: return c->pit.exists ? 0 : -ENXIO;
    case KVM_IRQ_LINE: case KVM_IRQ_LINE_STATUS:
        return c->irqchip ? irq_line(c, request, argument) : -ENXIO;
    case KVM_SIGNAL_MSI:
        if (!c->irqchip || msi->flags)
            return -EINVAL;
        taken = chips_msi(c, (uint64_t)msi->address_hi << 32 | msi->address_lo, msi->data);
        return taken > 0 ? taken : 0;   /* KVM may say -1 as well, which looks like -EPERM */
    case KVM_SET_GSI_ROUTING: return c->irqchip ? chips_routes_set(c, argument) : -EINVAL;
    case KVM_IRQFD: return c->irqchip ? chips_irqfd(c, argument) : -EINVAL;
    }
    return -ENOTTY;
}

int soft_chips_vm_ioctl(struct soft_chips *c, unsigned long request, void *argument)
{
    chips_lock(c);
    int answer = vm_ioctl(c, (uint32_t)request, argument);
    c->dirty = 1;
    chips_unlock(c);
    return answer;
}

/* A LAPIC's own timer is run when its state is read, so that IRR has what is due. Other timers are
 * not: they could change a LAPIC that has been read already. */
static int cpu_ioctl(struct soft_chips *c, int cpu, unsigned long request, void *argument)
{
    struct soft_chips_time now;
    switch (request) {
    case KVM_GET_LAPIC:
        if (!c->irqchip)
            return -EINVAL;
        chips_sweep(c);
        now = chips_now(c);
        chips_timer_run(c, cpu, &now);
        chips_lapic_save(c, cpu, argument);
        return 0;
    case KVM_SET_LAPIC:
        if (!c->irqchip)
            return -EINVAL;
        chips_lapic_load(c, cpu, argument);
        chips_ioapic_again(c);
        return 0;
    case KVM_KVMCLOCK_CTRL: return chips_clock_ctrl(c, &c->cpus[cpu]);
    case KVM_NMI: chips_lapic_accept(c, &c->cpus[cpu].lapic, NMI, 0, 1, 0); return 0;
    }
    return -ENOTTY;
}

int soft_chips_cpu_ioctl(struct soft_chips *c, int cpu, unsigned long request, void *argument)
{
    chips_lock(c);
    int answer = cpu_ioctl(c, cpu, (uint32_t)request, argument);
    c->dirty = 1;
    chips_unlock(c);
    return answer;
}

/* ---- ports and memory ---- */

static uint64_t low_bytes(uint32_t size)
{
    return size >= 8 ? ~0ULL : (1ULL << 8 * size) - 1;
}

int soft_chips_pio(struct soft_chips *c, int cpu, int write, uint16_t port, uint32_t size,
                   uint64_t *value)
{
    int mine = 1;
    uint8_t byte = *value;
    (void)cpu;
    chips_lock(c);
    switch (c->irqchip ? port : 0) {
    case 0x20: case 0x21: case 0xa0: case 0xa1: case 0x4d0: case 0x4d1:
        if (size == 1)
            chips_pic_io(c, write, port, &byte);
        else
            byte = 0;
        break;
    case 0x40: case 0x41: case 0x42: case 0x43: case 0x61:
        mine = c->pit.exists && (port != 0x61 || c->pit.has_speaker);
        if (mine)
            chips_pit_io(c, write, port, &byte);
        break;
    default: mine = 0;
    }
    chips_unlock(c);
    if (mine && !write)
        *value = byte;
    return mine;
}

static int is_lapic_page(struct soft_chips *c, int cpu, uint64_t gpa)
{
    return (c->cpus[cpu].lapic.base ^ gpa) >> 12 == 0;
}

static int is_ioapic(struct soft_chips *c, uint64_t gpa)
{
    return gpa - c->ioapic.base_address < 0x100;
}

static void lapic_mmio(struct soft_chips *c, int cpu, int write, uint32_t offset, uint32_t size,
                       uint64_t *value)
{
    struct lapic *l = &c->cpus[cpu].lapic;
    int known;
    if (!chips_lapic_is_on(l) || chips_lapic_is_x2(l)) {
        if (!write)
            *value = low_bytes(size);
    } else if (write) {
        if (size == 4 && !(offset & 0xf) && offset != R_SELF_IPI)
            chips_lapic_write(c, cpu, offset, *value);
    } else {
        uint32_t v = chips_lapic_read(c, cpu, offset & ~0xfu, &known), at = offset & 0xf;
        *value = at + size <= 4 ? v >> 8 * at & low_bytes(size) : 0;
    }
}

static void ioapic_mmio(struct soft_chips *c, int write, uint32_t offset, uint32_t size,
                        uint64_t *value)
{
    uint32_t v = write ? *value & low_bytes(size) : 0;
    if (offset & 0xf)
        offset = 0xff;                  /* no register */
    chips_ioapic_mmio(c, write, offset, &v);
    if (!write)
        *value = v & low_bytes(size);
}

int soft_chips_mmio(struct soft_chips *c, int cpu, int write, uint64_t gpa, uint32_t size,
                    uint64_t *value)
{
    int mine = 1;
    chips_lock(c);
    if (!c->irqchip)
        mine = 0;
    else if (is_lapic_page(c, cpu, gpa))
        lapic_mmio(c, cpu, write, gpa & 0xfff, size, value);
    else if (is_ioapic(c, gpa))
        ioapic_mmio(c, write, gpa - c->ioapic.base_address, size, value);
    else
        mine = 0;
    chips_unlock(c);
    return mine;
}

/* ---- MSRs ---- */

static int get_msr(struct soft_chips *c, int cpu, uint32_t index, uint64_t *value, int host)
{
    struct cpu *v = &c->cpus[cpu];
    struct lapic *l = &v->lapic;
    int known;
    if (index == M_APIC_BASE) {
        *value = l->base;
        return 0;
    }
    if (index == M_DEADLINE) {
        struct soft_chips_time now = chips_now(c);
        if (!host)
            chips_timer_run(c, cpu, &now);
        c->dirty |= !host;
        *value = chips_lapic_is_on(l) && l->mode == MODE_DEADLINE ? l->deadline : 0;
        return 0;
    }
    if (index < M_X2APIC || index >= M_X2APIC_END)
        return chips_clock_msr_get(c, v, index, value);
    if (!c->irqchip || !chips_lapic_is_x2(l) || index >= M_X2APIC + 0x40)
        return -EINVAL;
    uint32_t offset = (index - M_X2APIC) << 4;
    *value = chips_lapic_read(c, cpu, offset, &known);
    if (offset == R_ICR)
        *value |= (uint64_t)l->regs[R_ICR2 / 4] << 32;
    return known ? 0 : -EINVAL;
}

int soft_chips_msr_get(struct soft_chips *c, int cpu, uint32_t index, uint64_t *value, int host)
{
    chips_lock(c);
    int answer = get_msr(c, cpu, index, value, host);
    chips_unlock(c);
    return answer;
}

static int set_msr(struct soft_chips *c, int cpu, uint32_t index, uint64_t value, int host)
{
    struct cpu *v = &c->cpus[cpu];
    c->dirty = 1;
    if (index == M_APIC_BASE)
        return chips_lapic_set_base(c, cpu, value, host);
    if (index == M_DEADLINE) {
        chips_timer_deadline(c, cpu, value);
        return 0;
    }
    if (index < M_X2APIC || index >= M_X2APIC_END)
        return chips_clock_msr_set(c, v, index, value);
    if (!c->irqchip || !chips_lapic_is_x2(&v->lapic) || index >= M_X2APIC + 0x40)
        return -EINVAL;
    uint32_t offset = (index - M_X2APIC) << 4;
    if (offset == R_ICR)
        return chips_lapic_icr(c, cpu, value);
    return value >> 32 ? -EINVAL : chips_lapic_write(c, cpu, offset, value);
}

int soft_chips_msr_set(struct soft_chips *c, int cpu, uint32_t index, uint64_t value, int host)
{
    chips_lock(c);
    int answer = set_msr(c, cpu, index, value, host);
    chips_unlock(c);
    if (!host && !answer)
        chips_clock_write(c);
    return answer;
}

uint32_t soft_chips_msr_list(uint32_t *indices, uint32_t room)
{
    static const uint32_t all[] = { 0x11, 0x12, 0x4b564d00, 0x4b564d01, M_DEADLINE };
    uint32_t count = sizeof all / sizeof *all;
    memcpy(indices, all, (room < count ? room : count) * sizeof *all);
    return count;
}

uint32_t soft_chips_kvm_features(void)
{
    return 1 << 0 | 1 << 3 | 1 << 24;   /* CLOCKSOURCE, CLOCKSOURCE2, CLOCKSOURCE_STABLE_BIT */
}

uint64_t soft_chips_apic_base(struct soft_chips *c, int cpu)
{
    chips_lock(c);
    uint64_t answer = c->cpus[cpu].lapic.base;
    chips_unlock(c);
    return answer;
}

int soft_chips_set_apic_base(struct soft_chips *c, int cpu, uint64_t value)
{
    chips_lock(c);
    int answer = chips_lapic_set_base(c, cpu, value, 1);
    chips_unlock(c);
    return answer;
}

uint8_t soft_chips_cr8(struct soft_chips *c, int cpu)
{
    chips_lock(c);
    uint8_t answer = c->cpus[cpu].lapic.regs[R_TPR / 4] >> 4 & 0xf;
    chips_unlock(c);
    return answer;
}

void soft_chips_set_cr8(struct soft_chips *c, int cpu, uint8_t value)
{
    chips_lock(c);
    chips_lapic_set_tpr(c, cpu, (value & 0xf) << 4);
    chips_unlock(c);
}

/* ---- what a vCPU has to do ---- */

uint32_t soft_chips_attention(struct soft_chips *c, int cpu)
{
    return atomic_load(&c->cpus[cpu].attention);
}

int soft_chips_take_interrupt(struct soft_chips *c, int cpu)
{
    struct lapic *l = &c->cpus[cpu].lapic;
    int vector = -1;
    chips_lock(c);
    if (c->irqchip && chips_lapic_accepts_pic(l) && chips_pic_pends(c))
        vector = chips_pic_take(c);
    else if (c->irqchip && (vector = chips_lapic_pends(l)) >= 0)
        chips_lapic_take(c, l, vector);
    chips_unlock(c);
    return vector;
}

int soft_chips_take_nmi(struct soft_chips *c, int cpu)
{
    chips_lock(c);
    struct lapic *l = &c->cpus[cpu].lapic;
    int answer = l->nmis > 0;
    l->nmis -= answer;
    c->dirty = 1;
    chips_unlock(c);
    return answer;
}

int soft_chips_nmi_pending(struct soft_chips *c, int cpu)
{
    chips_lock(c);
    chips_sweep(c);
    int answer = c->cpus[cpu].lapic.nmis;
    chips_unlock(c);
    return answer;
}

void soft_chips_set_nmi_pending(struct soft_chips *c, int cpu, int count)
{
    chips_lock(c);
    c->cpus[cpu].lapic.nmis = count < 0 ? 0 : count > 2 ? 2 : count;
    c->dirty = 1;
    chips_unlock(c);
}

uint32_t soft_chips_take_startup(struct soft_chips *c, int cpu, uint32_t mask, uint8_t *vector)
{
    chips_lock(c);
    struct lapic *l = &c->cpus[cpu].lapic;
    uint32_t taken = l->events & mask;
    l->events &= ~taken;
    if (taken & SOFT_CHIPS_INIT) {
        chips_lapic_reset(c, cpu, 1);
        l->nmis = 0;
    }
    if (taken & SOFT_CHIPS_SIPI)
        *vector = l->sipi_vector;
    c->dirty = 1;
    chips_unlock(c);
    return taken;
}

uint8_t soft_chips_sipi_vector(struct soft_chips *c, int cpu)
{
    chips_lock(c);
    uint8_t answer = c->cpus[cpu].lapic.sipi_vector;
    chips_unlock(c);
    return answer;
}

void soft_chips_set_sipi_vector(struct soft_chips *c, int cpu, uint8_t vector)
{
    chips_lock(c);
    c->cpus[cpu].lapic.sipi_vector = vector;
    chips_unlock(c);
}

/* ---- time ---- */

void soft_chips_set_tsc(struct soft_chips *c, int cpu, uint64_t khz, uint64_t offset)
{
    chips_lock(c);
    struct cpu *v = &c->cpus[cpu];
    if (khz && (v->tsc_khz != khz || v->tsc_offset != offset)) {
        v->tsc_khz = khz;
        v->tsc_offset = offset;
        chips_timer_tsc_changed(c, cpu);
        chips_clock_all_stale(c);
        c->dirty = 1;
    }
    chips_unlock(c);
}

uint64_t soft_chips_tsc(struct soft_chips *c, int cpu)
{
    chips_lock(c);
    uint64_t answer = chips_tsc_at(c, &c->cpus[cpu], chips_now(c).tsc);
    chips_unlock(c);
    return answer;
}

int64_t soft_chips_next_deadline(struct soft_chips *c, int cpu)
{
    chips_lock(c);
    int64_t answer = chips_next(c, cpu);
    chips_unlock(c);
    return answer;
}

void soft_chips_run_timers(struct soft_chips *c)
{
    chips_lock(c);
    chips_run(c);
    for (int i = 0; i < c->count; i++) {
        c->dirty |= c->cpus[i].timer_due;
        c->cpus[i].timer_due = 0;
    }
    chips_unlock(c);
    chips_clock_write(c);
}

void soft_chips_sweep(struct soft_chips *c)
{
    chips_lock(c);
    chips_sweep(c);
    chips_unlock(c);
}
