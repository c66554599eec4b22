/* What the vCPUs' threads know of a machine's devices: which accesses they can answer without the
 * GIL.
 *
 * Some registers are served by C (registers.h). And a device whose handler is a coroutine function
 * can only answer in its machine's task. So a vCPU's thread hands such an exit over without asking
 * for the GIL, and the task calls the handler. The claims of a machine never change. They are
 * sorted, and do not overlap. An access that is in no claim, or not in one alone, is served in
 * Python, as are accesses that are wider than the device or have an odd size. */

#include <linux/kvm.h>

#include "registers.h"

/* One way, reads or writes, into a device. */
struct avmm_way {
    uint8_t tasks;              /* can only a task answer? */
    uint8_t how;                /* what C does with writes (registers.h) */
    struct avmm_register *of;   /* NULL: none */
    uint32_t at;                /* where in the register the claim begins */
};

struct avmm_claim {
    uint64_t first, end;
    uint32_t width;             /* the widest access that the device decodes */
    struct avmm_way reads, writes;
};

struct avmm_claims {
    int pio_count, mmio_count;
    struct avmm_claim *pio, *mmio;
};

static const struct avmm_claim *claim_of(
    const struct avmm_claim *of, int count, uint64_t address, uint32_t size)
{
    int low = 0, high = count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (of[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == count || address < of[low].first || size > of[low].end - address)
        return NULL;
    return &of[low];
}

/* The claim to which the access in `run` belongs, or NULL. */
static const struct avmm_claim *claim_of_exit(
    const struct avmm_claims *claims, const struct kvm_run *run)
{
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        return claim_of(claims->pio, claims->pio_count, run->io.port, run->io.size);
    case KVM_EXIT_MMIO:
        return claim_of(claims->mmio, claims->mmio_count, run->mmio.phys_addr, run->mmio.len);
    default:
        return NULL;
    }
}

/* The access in `run`, which is one to a port or to memory, in the terms of both. */
struct access {
    uint64_t address;
    uint32_t size;
    int is_write;
    void *data;
};

static struct access access_of(struct kvm_run *run)
{
    if (run->exit_reason == KVM_EXIT_IO)
        return (struct access){
            .address = run->io.port,
            .size = run->io.size,
            .is_write = run->io.direction == KVM_EXIT_IO_OUT,
            .data = (char *)run + run->io.data_offset,
        };
    return (struct access){
        .address = run->mmio.phys_addr,
        .size = run->mmio.len,
        .is_write = run->mmio.is_write,
        .data = run->mmio.data,
    };
}

/* Serve the access in `run`, if C can. */
static int serve_register(const struct avmm_claim *claim, struct kvm_run *run)
{
    struct access access = access_of(run);
    const struct avmm_way *way = access.is_write ? &claim->writes : &claim->reads;
    uint32_t at = way->at + (uint32_t)(access.address - claim->first);
    uint64_t value = 0;
    if (!way->of || access.size > claim->width || (access.size & (access.size - 1))
        || (run->exit_reason == KVM_EXIT_IO && run->io.count != 1))
        return 0;
    if (access.is_write) {
        memcpy(&value, access.data, access.size);
        return avmm_register_write(way->of, way->how, at, access.size, value);
    }
    if (!avmm_register_read(way->of, at, access.size, &value))
        return 0;
    memcpy(access.data, &value, access.size);
    return 1;
}

/* Can only a task answer the access in `run`? */
static int is_tasks(const struct avmm_claim *claim, struct kvm_run *run)
{
    return access_of(run).is_write ? claim->writes.tasks : claim->reads.tasks;
}
