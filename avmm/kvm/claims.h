/* Which accesses only a task can answer.
 *
 * A device whose handler is a coroutine function can only answer in its machine's task. So a vCPU's
 * thread hands such an exit over without asking for the GIL, and the task calls the handler. The
 * claims of a machine never change. They are sorted, and do not overlap. */

#include <linux/kvm.h>

struct avmm_claim {
    uint64_t first, end;
    uint8_t reads, writes;      /* only by a task? */
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

/* Can only a task answer the exit in `run`? */
static int is_tasks(const struct avmm_claims *claims, const struct kvm_run *run)
{
    const struct avmm_claim *claim;
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        claim = claim_of(claims->pio, claims->pio_count, run->io.port, run->io.size);
        return claim && (run->io.direction == KVM_EXIT_IO_IN ? claim->reads : claim->writes);
    case KVM_EXIT_MMIO:
        claim = claim_of(claims->mmio, claims->mmio_count, run->mmio.phys_addr, run->mmio.len);
        return claim && (run->mmio.is_write ? claim->writes : claim->reads);
    default:
        return 0;
    }
}
