/* A vCPU's registers, in KVM's structures and in the library's.
 *
 * The library keeps some of them in another form, for speed: the flags in four fields, the mode in
 * `hflags`, a segment's attributes as the upper half of its descriptor. */

#include "engine.h"
#include "chips_glue.h"

#include <errno.h>
#include <string.h>

enum { CC = 0x8d5, DF = 0x400, ES = 0, CS, SS, DS, FS, GS };

#define SEG(n) (ENV_SEGS + SEG_SIZE * (n))
#define CR(n) AT(env, ENV_CR + 8 * (n), uint64_t)

uint64_t soft_get_rflags(void *env)
{
    uint64_t flags = AT(env, ENV_EFLAGS, uint64_t) & ~(uint64_t)(CC | DF);
    flags |= lib.compute_flags(env, AT(env, ENV_CC_OP, uint32_t)) & CC;
    return flags | (AT(env, ENV_DF, int32_t) < 0 ? DF : 0) | 2;
}

void soft_set_rflags(void *env, uint64_t flags)
{
    AT(env, ENV_CC_SRC, uint64_t) = flags & CC;
    AT(env, ENV_CC_DST, uint64_t) = AT(env, ENV_CC_SRC2, uint64_t) = 0;
    AT(env, ENV_CC_OP, uint32_t) = CC_OP_EFLAGS;
    AT(env, ENV_DF, int32_t) = flags & DF ? -1 : 1;
    flags = (flags & 0x3f7fd7) | 2;
    /* On its way in the library takes them from here, and leaves them here on its way out. */
    AT(env, ENV_EFLAGS, uint64_t) = now ? flags & ~(uint64_t)(CC | DF) : flags;
}

void soft_update_hflags(void *env)
{
    uint32_t cs = AT(env, SEG(CS) + SEG_FLAGS, uint32_t);
    uint32_t ss = AT(env, SEG(SS) + SEG_FLAGS, uint32_t);
    uint64_t cr0 = CR(0), cr4 = CR(4), flags = AT(env, ENV_EFLAGS, uint64_t);
    uint32_t h = AT(env, ENV_HFLAGS, uint32_t) & HF_INHIBIT_IRQ;
    int vm86 = flags >> 17 & 1;
    if (cr0 & 1)
        h |= HF_PE | (vm86 ? 3 : ss >> 13 & 3);
    h |= (cr0 & 0xe) << 8;
    if (cr4 >> 9 & 1)
        h |= HF_OSFXSR;
    if (cr4 >> 21 & 1)
        h |= HF_SMAP;
    if (AT(env, ENV_EFER, uint64_t) >> 10 & 1)
        h |= HF_LMA;
    if (h & HF_LMA && cs >> 21 & 1) {
        h |= HF_CS32 | HF_SS32 | HF_CS64;
    } else {
        h |= (cs >> 22 & 1 ? HF_CS32 : 0) | (ss >> 22 & 1 ? HF_SS32 : 0);
        if (!(cr0 & 1) || vm86 || !(h & HF_CS32)
            || AT(env, SEG(DS) + SEG_BASE, uint64_t) | AT(env, SEG(ES) + SEG_BASE, uint64_t)
                   | AT(env, SEG(SS) + SEG_BASE, uint64_t))
            h |= HF_ADDSEG;
    }
    AT(env, ENV_HFLAGS, uint32_t) = h;
    AT(env, ENV_HFLAGS2, uint32_t) |= HF2_GIF;
}

void soft_load_segment(void *env, int index, uint16_t selector, uint64_t base, uint32_t limit,
                       uint32_t flags)
{
    AT(env, SEG(index) + SEG_SELECTOR, uint32_t) = selector;
    AT(env, SEG(index) + SEG_BASE, uint64_t) = base;
    AT(env, SEG(index) + SEG_LIMIT, uint32_t) = limit;
    AT(env, SEG(index) + SEG_FLAGS, uint32_t) = flags;
}

/* ---- general registers ---- */

void soft_get_regs(struct vcpu *v, struct kvm_regs *r)
{
    void *env = env_of(v);
    uint64_t *g = &AT(env, ENV_REGS, uint64_t);
    *r = (struct kvm_regs){ .rax = g[0], .rcx = g[1], .rdx = g[2], .rbx = g[3], .rsp = g[4],
        .rbp = g[5], .rsi = g[6], .rdi = g[7], .r8 = g[8], .r9 = g[9], .r10 = g[10],
        .r11 = g[11], .r12 = g[12], .r13 = g[13], .r14 = g[14], .r15 = g[15],
        .rip = AT(env, ENV_EIP, uint64_t), .rflags = soft_get_rflags(env) };
}

void soft_set_regs(struct vcpu *v, const struct kvm_regs *r)
{
    void *env = env_of(v);
    uint64_t g[] = { r->rax, r->rcx, r->rdx, r->rbx, r->rsp, r->rbp, r->rsi, r->rdi,
                     r->r8, r->r9, r->r10, r->r11, r->r12, r->r13, r->r14, r->r15 };
    memcpy(&AT(env, ENV_REGS, uint64_t), g, sizeof g);
    AT(env, ENV_EIP, uint64_t) = r->rip;
    soft_set_rflags(env, r->rflags);
    soft_update_hflags(env);
    memset(&v->injected.exception, 0, sizeof v->injected.exception);
}

/* ---- segments and control registers ---- */

static struct kvm_segment get_segment(void *env, int at)
{
    uint32_t f = AT(env, at + SEG_FLAGS, uint32_t);
    return (struct kvm_segment){
        .base = AT(env, at + SEG_BASE, uint64_t), .limit = AT(env, at + SEG_LIMIT, uint32_t),
        .selector = AT(env, at + SEG_SELECTOR, uint32_t), .type = f >> 8 & 15, .s = f >> 12 & 1,
        .dpl = f >> 13 & 3, .present = f >> 15 & 1, .avl = f >> 20 & 1, .l = f >> 21 & 1,
        .db = f >> 22 & 1, .g = f >> 23 & 1, .unusable = !(f >> 15 & 1) };
}

static void set_segment(void *env, int at, const struct kvm_segment *s)
{
    uint32_t present = s->present && !s->unusable;
    AT(env, at + SEG_SELECTOR, uint32_t) = s->selector;
    AT(env, at + SEG_BASE, uint64_t) = s->base;
    AT(env, at + SEG_LIMIT, uint32_t) = s->limit;
    AT(env, at + SEG_FLAGS, uint32_t) =
        (s->type & 15u) << 8 | (s->s & 1u) << 12 | (s->dpl & 3u) << 13 | present << 15
        | (s->avl & 1u) << 20 | (s->l & 1u) << 21 | (s->db & 1u) << 22 | (s->g & 1u) << 23;
}

void soft_get_sregs(struct vcpu *v, struct kvm_sregs *s)
{
    void *env = env_of(v);
    memset(s, 0, sizeof *s);
    s->es = get_segment(env, SEG(ES));
    s->cs = get_segment(env, SEG(CS));
    s->ss = get_segment(env, SEG(SS));
    s->ds = get_segment(env, SEG(DS));
    s->fs = get_segment(env, SEG(FS));
    s->gs = get_segment(env, SEG(GS));
    s->tr = get_segment(env, ENV_TR);
    s->ldt = get_segment(env, ENV_LDT);
    if (s->tr.s == 0 && s->tr.type == 3)
        s->tr.unusable = 0;
    s->gdt.base = AT(env, ENV_GDT + SEG_BASE, uint64_t);
    s->gdt.limit = AT(env, ENV_GDT + SEG_LIMIT, uint32_t);
    s->idt.base = AT(env, ENV_IDT + SEG_BASE, uint64_t);
    s->idt.limit = AT(env, ENV_IDT + SEG_LIMIT, uint32_t);
    s->cr0 = CR(0);
    s->cr2 = CR(2);
    s->cr3 = CR(3);
    s->cr4 = CR(4);
    s->cr8 = soft_get_cr8(v);
    s->efer = AT(env, ENV_EFER, uint64_t);
    s->apic_base = soft_glue_base(v);
    if (v->injected.interrupt.injected)
        s->interrupt_bitmap[v->injected.interrupt.nr / 64] |= 1ULL << v->injected.interrupt.nr % 64;
}

int soft_set_sregs(struct vcpu *v, const struct kvm_sregs *s)
{
    void *env = env_of(v);
    if ((s->efer >> 10 & 1 && !(s->cr4 >> 5 & 1 && s->cr0 >> 31)) || s->cr4 & ~0x3507ffULL
        || s->cr0 >> 32)
        return -EINVAL;
    set_segment(env, SEG(ES), &s->es);
    set_segment(env, SEG(CS), &s->cs);
    set_segment(env, SEG(SS), &s->ss);
    set_segment(env, SEG(DS), &s->ds);
    set_segment(env, SEG(FS), &s->fs);
    set_segment(env, SEG(GS), &s->gs);
    set_segment(env, ENV_TR, &s->tr);
    set_segment(env, ENV_LDT, &s->ldt);
    AT(env, ENV_GDT + SEG_BASE, uint64_t) = s->gdt.base;
    AT(env, ENV_GDT + SEG_LIMIT, uint32_t) = s->gdt.limit;
    AT(env, ENV_IDT + SEG_BASE, uint64_t) = s->idt.base;
    AT(env, ENV_IDT + SEG_LIMIT, uint32_t) = s->idt.limit;
    CR(0) = s->cr0 | 0x10;
    CR(2) = s->cr2;
    CR(3) = s->cr3;
    CR(4) = s->cr4;
    AT(env, ENV_EFER, uint64_t) = s->efer;
    soft_set_cr8(v, s->cr8);
    if (soft_glue_base_set(v, s->apic_base, 1))
        return -EINVAL;
    soft_update_hflags(env);
    if (v->vm->loaded == v)
        lib.tlb_flush(v->vm->cpu);
    memset(&v->injected.interrupt, 0, sizeof v->injected.interrupt);
    for (int i = 0; i < 256; i++)
        if (s->interrupt_bitmap[i / 64] >> i % 64 & 1) {
            v->injected.interrupt.injected = 1;
            v->injected.interrupt.nr = i;
        }
    return 0;
}

/* ---- x87 and SSE: the layout of FXSAVE (Intel SDM 1, 10.5.1) ---- */

static void get_fxsave(void *env, uint8_t *a)
{
    uint32_t top = AT(env, ENV_FPSTT, uint32_t) & 7;
    memset(a, 0, 512);
    AT(a, 0, uint16_t) = AT(env, ENV_FPUC, uint16_t);
    AT(a, 2, uint16_t) = (AT(env, ENV_FPUS, uint16_t) & ~0x3800) | top << 11;
    for (int i = 0; i < 8; i++) {
        a[4] |= !AT(env, ENV_FPTAGS + i, uint8_t) << i;
        memcpy(a + 32 + 16 * i, &AT(env, ENV_FPREGS + FPREG_SIZE * ((top + i) & 7), uint8_t), 10);
    }
    AT(a, 6, uint16_t) = AT(env, ENV_FPOP, uint16_t);
    AT(a, 8, uint64_t) = AT(env, ENV_FPIP, uint64_t);
    AT(a, 16, uint64_t) = AT(env, ENV_FPDP, uint64_t);
    AT(a, 24, uint32_t) = AT(env, ENV_MXCSR, uint32_t);
    AT(a, 28, uint32_t) = 0xffff;
    for (int i = 0; i < 16; i++)
        memcpy(a + 160 + 16 * i, &AT(env, ENV_XMM + XMM_SIZE * i, uint8_t), 16);
}

static void set_fxsave(void *env, const uint8_t *a)
{
    uint32_t top = AT(a, 2, uint16_t) >> 11 & 7;
    AT(env, ENV_FPUC, uint16_t) = AT(a, 0, uint16_t);
    AT(env, ENV_FPUS, uint16_t) = AT(a, 2, uint16_t) & ~0x3800;
    AT(env, ENV_FPSTT, uint32_t) = top;
    for (int i = 0; i < 8; i++) {
        AT(env, ENV_FPTAGS + i, uint8_t) = !(a[4] >> i & 1);
        memcpy(&AT(env, ENV_FPREGS + FPREG_SIZE * ((top + i) & 7), uint8_t), a + 32 + 16 * i, 10);
    }
    AT(env, ENV_FPOP, uint16_t) = AT(a, 6, uint16_t);
    AT(env, ENV_FPIP, uint64_t) = AT(a, 8, uint64_t);
    AT(env, ENV_FPDP, uint64_t) = AT(a, 16, uint64_t);
    AT(env, ENV_MXCSR, uint32_t) = AT(a, 24, uint32_t);
    for (int i = 0; i < 16; i++)
        memcpy(&AT(env, ENV_XMM + XMM_SIZE * i, uint8_t), a + 160 + 16 * i, 16);
    lib.update_fp_status(env);
    update_mxcsr_status_x86_64(env);
}

void soft_get_xsave(struct vcpu *v, uint8_t *area)
{
    memset(area, 0, sizeof(struct kvm_xsave));
    get_fxsave(env_of(v), area);
    AT(area, 512, uint64_t) = 3;        /* both components are there */
}

int soft_set_xsave(struct vcpu *v, const uint8_t *area)
{
    uint8_t empty[512] = { 0 };
    uint64_t present = AT(area, 512, uint64_t);
    if (present & ~3ULL || AT(area, 24, uint32_t) & ~0xffffu)
        return -EINVAL;
    memcpy(empty, area, 512);
    if (!(present & 1)) {               /* the components' initial states */
        memset(empty, 0, 24);
        memset(empty + 32, 0, 128);
        AT(empty, 0, uint16_t) = 0x37f;
    }
    if (!(present & 2)) {
        memset(empty + 160, 0, 256);
        AT(empty, 24, uint32_t) = 0x1f80;
    }
    set_fxsave(env_of(v), empty);
    return 0;
}

void soft_get_fpu(struct vcpu *v, struct kvm_fpu *f)
{
    uint8_t a[512];
    get_fxsave(env_of(v), a);
    memset(f, 0, sizeof *f);
    for (int i = 0; i < 8; i++)
        memcpy(f->fpr[i], a + 32 + 16 * i, 16);
    f->fcw = AT(a, 0, uint16_t);
    f->fsw = AT(a, 2, uint16_t);
    f->ftwx = a[4];
    f->last_opcode = AT(a, 6, uint16_t);
    f->last_ip = AT(a, 8, uint64_t);
    f->last_dp = AT(a, 16, uint64_t);
    memcpy(f->xmm, a + 160, 256);
    f->mxcsr = AT(a, 24, uint32_t);
}

void soft_set_fpu(struct vcpu *v, const struct kvm_fpu *f)
{
    uint8_t a[512] = { 0 };
    for (int i = 0; i < 8; i++)
        memcpy(a + 32 + 16 * i, f->fpr[i], 16);
    AT(a, 0, uint16_t) = f->fcw;
    AT(a, 2, uint16_t) = f->fsw;
    a[4] = f->ftwx;
    AT(a, 6, uint16_t) = f->last_opcode;
    AT(a, 8, uint64_t) = f->last_ip;
    AT(a, 16, uint64_t) = f->last_dp;
    memcpy(a + 160, f->xmm, 256);
    AT(a, 24, uint32_t) = f->mxcsr;
    set_fxsave(env_of(v), a);
}

/* ---- RESET, INIT and SIPI (Intel SDM 3A, 9.1.1) ---- */

void soft_reset(struct vcpu *v)
{
    void *env = env_of(v);
    memcpy(env, v->vm->fresh, ENV_STATE);
    memset(&AT(env, ENV_REGS, uint8_t), 0, 16 * 8);
    AT(env, ENV_REGS + 8 * 2, uint64_t) = 0x60fb1;
    AT(env, ENV_EIP, uint64_t) = 0xfff0;
    soft_set_rflags(env, 2);
    for (int i = ES; i <= GS; i++)
        soft_load_segment(env, i, 0, 0, 0xffff, 0x9300);
    soft_load_segment(env, CS, 0xf000, 0xffff0000, 0xffff, 0x9b00);
    AT(env, ENV_GDT + SEG_BASE, uint64_t) = AT(env, ENV_IDT + SEG_BASE, uint64_t) = 0;
    AT(env, ENV_GDT + SEG_LIMIT, uint32_t) = AT(env, ENV_IDT + SEG_LIMIT, uint32_t) = 0xffff;
    AT(env, ENV_LDT + SEG_LIMIT, uint32_t) = AT(env, ENV_TR + SEG_LIMIT, uint32_t) = 0xffff;
    AT(env, ENV_LDT + SEG_FLAGS, uint32_t) = 0x8200;
    AT(env, ENV_TR + SEG_FLAGS, uint32_t) = 0x8b00;
    for (int i = 0; i < 9; i++)
        CR(i) = 0;
    CR(0) = 0x60000010;
    AT(env, ENV_EFER, uint64_t) = 0;
    AT(env, ENV_A20, int32_t) = -1;
    AT(env, ENV_XCR0, uint64_t) = 1;
    AT(env, ENV_PAT, uint64_t) = 0x0007040600070406;
    AT(env, ENV_OLD_EXCEPTION, int) = -1;
    AT(env, ENV_DR + 48, uint64_t) = 0xffff0ff0;
    AT(env, ENV_DR + 56, uint64_t) = 0x400;
    AT(env, ENV_FPUC, uint16_t) = 0x37f;
    memset(&AT(env, ENV_FPTAGS, uint8_t), 1, 8);
    AT(env, ENV_MXCSR, uint32_t) = 0x1f80;
    AT(env, ENV_HFLAGS, uint32_t) = AT(env, ENV_HFLAGS2, uint32_t) = 0;
    lib.update_fp_status(env);
    update_mxcsr_status_x86_64(env);
    soft_update_hflags(env);
    memset(&v->injected, 0, sizeof v->injected);
    if (v->vm->loaded == v)
        lib.tlb_flush(v->vm->cpu);
}

/* Where a startup interrupt lets an application processor begin. */
void soft_set_cs_ip(struct vcpu *v, uint32_t vector)
{
    void *env = env_of(v);
    soft_load_segment(env, CS, vector << 8, vector << 12, 0xffff, 0x9b00);
    AT(env, ENV_EIP, uint64_t) = 0;
    soft_update_hflags(env);
}
