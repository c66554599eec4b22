/* VMCALL and VMMCALL, answered as KVM answers them. The library takes both for #UD. */

#include "engine.h"
#include "chips_glue.h"
#include "newer.h"

#include <errno.h>

enum { LENGTH = 3 };

static int is_call(struct vcpu *v)
{
    uint8_t bytes[LENGTH];
    for (int i = 0; i < LENGTH; i++)
        if (soft_code(v, i, &bytes[i]))
            return 0;
    return bytes[0] == 0x0f && bytes[1] == 0x01 && (bytes[2] == 0xc1 || bytes[2] == 0xd9);
}

static void finish(struct vcpu *v, uint64_t result)
{
    void *env = env_of(v);
    AT(env, ENV_REGS, uint64_t) =
        AT(env, ENV_HFLAGS, uint32_t) & HF_CS64 ? result : (uint32_t)result;
    AT(env, ENV_EIP, uint64_t) += LENGTH;
}

int soft_hypercall(struct vcpu *v)
{
    void *env = v->vm->env;
    uint32_t hflags = AT(env, ENV_HFLAGS, uint32_t);
    uint64_t *g = &AT(env, ENV_REGS, uint64_t), mask = hflags & HF_CS64 ? ~0ULL : 0xffffffff;
    uint64_t number = g[0] & mask;
    if (!is_call(v))
        return 0;
    if (hflags & HF_CPL) {
        finish(v, -KVM_EPERM);
    } else if (number == KVM_HC_VAPIC_POLL_IRQ) {
        finish(v, 0);
    } else if (number == KVM_HC_MAP_GPA_RANGE && v->vm->hypercall_exits >> KVM_HC_MAP_GPA_RANGE & 1) {
        struct kvm_run *run = v->run;
        run->flags = 0;
        run->hypercall.nr = number;
        run->hypercall.args[0] = g[3] & mask;
        run->hypercall.args[1] = g[1] & mask;
        run->hypercall.args[2] = g[2] & mask;
        run->hypercall.ret = 0;
        run->hypercall.longmode = hflags & HF_CS64 ? 1 : 0;
        v->pending = HYPERCALL_PENDING;
        v->exit_reason = KVM_EXIT_HYPERCALL;
        soft_attend(v->vm);
    } else {
        finish(v, -KVM_ENOSYS);
    }
    return 1;
}

void soft_hypercall_answered(struct vcpu *v)
{
    v->pending = NOTHING;
    finish(v, v->run->hypercall.ret);
}
