/* Numbers newer than the oldest <linux/kvm.h> that avmm builds with (Linux 5.10). They are part of
 * the kernel's stable interface; a newer header's own definition wins. */

#ifndef AVMM_KVM_NEWER_H
#define AVMM_KVM_NEWER_H

#include <linux/kvm.h>
#include <linux/kvm_para.h>

#ifndef KVM_CAP_EXIT_HYPERCALL
#define KVM_CAP_EXIT_HYPERCALL 201
#endif
#ifndef KVM_CAP_XSAVE2
#define KVM_CAP_XSAVE2 208
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif
#ifndef KVM_HC_MAP_GPA_RANGE
#define KVM_HC_MAP_GPA_RANGE 12
#endif
#ifndef KVM_GET_XSAVE2
#define KVM_GET_XSAVE2 _IOR(KVMIO, 0xcf, struct kvm_xsave)
#endif
#ifndef KVM_VCPU_TSC_CTRL
#define KVM_VCPU_TSC_CTRL 0
#define KVM_VCPU_TSC_OFFSET 0
#endif
#ifndef KVM_EXIT_AP_RESET_HOLD
#define KVM_EXIT_AP_RESET_HOLD 32
#endif
#ifndef KVM_EXIT_X86_BUS_LOCK
#define KVM_EXIT_X86_BUS_LOCK 33
#endif
#ifndef KVM_EXIT_XEN
#define KVM_EXIT_XEN 34
#endif
#ifndef KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL
#define KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL (1 << 1)
#endif
#ifndef KVM_EXIT_NOTIFY
#define KVM_EXIT_NOTIFY 37
#endif
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif
#ifndef KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
#define KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES (1ULL << 0)
#endif

#endif
