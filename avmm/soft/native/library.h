/* The library: PyPI's libunicorn.so.2 of unicorn 2.1.4, and what of its insides the engine uses.
 *
 * The wheel exports every internal symbol, and binds its own calls to them at load time. So a
 * definition that is loaded earlier and globally replaces the wheel's (overrides.c), and dlsym on
 * the wheel's own handle finds the original. All of that is private to exactly one binary: offsets
 * are facts about it, and soft_load refuses any other. */

#ifndef AVMM_SOFT_LIBRARY_H
#define AVMM_SOFT_LIBRARY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Offsets in the structure of a CPU's registers ("env"). All that is a guest's state lies below
 * ENV_STATE, so a vCPU is swapped by copying these bytes. */
enum {
    ENV_REGS = 0, ENV_EIP = 128, ENV_EFLAGS = 136, ENV_CC_DST = 144, ENV_CC_SRC = 152,
    ENV_CC_SRC2 = 160, ENV_CC_OP = 168, ENV_DF = 172, ENV_HFLAGS = 176, ENV_HFLAGS2 = 180,
    ENV_SEGS = 184, ENV_LDT = 328, ENV_TR = 352, ENV_GDT = 376, ENV_IDT = 400, ENV_CR = 424,
    ENV_A20 = 496, ENV_EFER = 592, ENV_FPSTT = 604, ENV_FPUS = 608, ENV_FPUC = 610,
    ENV_FPTAGS = 612, ENV_FPREGS = 624, ENV_FPOP = 752, ENV_FPIP = 760, ENV_FPDP = 768,
    ENV_FP_STATUS = 776, ENV_SSE_STATUS = 808, ENV_MXCSR = 816, ENV_XMM = 824,
    ENV_SYSENTER_CS = 4800, ENV_SYSENTER_ESP = 4808,
    ENV_SYSENTER_EIP = 4816, ENV_STAR = 4824, ENV_LSTAR = 4840, ENV_CSTAR = 4848,
    ENV_FMASK = 4856, ENV_KERNELGS = 4864, ENV_TSC_AUX = 4896, ENV_XCR0 = 4904, ENV_PAT = 5280,
    ENV_ERROR_CODE = 5384, ENV_IS_INT = 5388, ENV_DR = 5400,
    ENV_OLD_EXCEPTION = 5496, ENV_STATE = 5568, ENV_CPUID_VENDOR = 5616,
    ENV_FEATURES = 5632, ENV_UC = 7000,
    SEG_SELECTOR = 0, SEG_BASE = 8, SEG_LIMIT = 16, SEG_FLAGS = 20, SEG_SIZE = 24,
    XMM_SIZE = 64, FPREG_SIZE = 16, STATUS_FTZ = 4, STATUS_DAZ = 5,
};
/* In the CPU's own structure, and in the engine's. */
enum {
    CPU_STOP = 17, CPU_STOPPED = 18, CPU_EXIT_REQUEST = 21, CPU_CFLAGS_NEXT = 24,
    CPU_INTERRUPT_REQUEST = 28, CPU_MEM_IO_PC = 33144, CPU_HALTED = 33176,
    CPU_EXCEPTION_INDEX = 33184, CPU_TCG_EXIT = 33208, CPU_ENV_PTR = 296, CPU_ENV = 35408,
    UC_CPU = 440, UC_MEMORY_MAPPING = 288, UC_SIZE_RECUR = 1384, UC_STOP_REQUEST = 1389,
    UC_QUIT_REQUEST = 1390, UC_INVALID_ERROR = 1424, UC_NESTED = 14840,
    REGION_PERMS = 136, REGION_SIZE = 160,
};
enum { EXCP_INTERRUPT = 0x10000, INTERRUPT_HARD = 2, CC_OP_EFLAGS = 1,
       CC_ALL = 0x8d5, CC_Z = 0x40, MXCSR_DAZ = 0x40 };
enum { FEATURE_1_EDX = 0, FEATURE_1_ECX = 1, FEATURE_7_EBX = 2, FEATURE_7_ECX = 3,
       FEATURE_7_EDX = 4, FEATURE_81_EDX = 6, FEATURE_81_ECX = 7, FEATURE_XSAVE = 19 };
enum { HF_CPL = 3, HF_INHIBIT_IRQ = 1 << 3, HF_CS32 = 1 << 4, HF_SS32 = 1 << 5,
       HF_ADDSEG = 1 << 6, HF_PE = 1 << 7, HF_LMA = 1 << 14, HF_CS64 = 1 << 15,
       HF_OSFXSR = 1 << 22, HF_SMAP = 1 << 23, HF2_GIF = 1, HF2_NMI = 4 };

#define AT(base, offset, type) (*(type *)((char *)(base) + (offset)))
#define REG(n) AT(env, ENV_REGS + 8 * (n), uint64_t)

/* Of a definition that replaces the library's: it must be visible to the library, and this is its
 * return address into the translated block. */
#define OVERRIDE __attribute__((visibility("default")))
#define FROM ((uintptr_t)__builtin_return_address(0))

/* What is called in the library. X(result, name, symbol, arguments). */
#define LIBRARY_CALLS(X) \
    X(int, uc_open, "uc_open", (int arch, int mode, void **uc)) \
    X(int, uc_close, "uc_close", (void *uc)) \
    X(unsigned, uc_version, "uc_version", (unsigned *major, unsigned *minor)) \
    X(int, uc_ctl, "uc_ctl", (void *uc, int control, ...)) \
    X(int, uc_reg_read, "uc_reg_read", (void *uc, int id, void *value)) \
    X(int, uc_reg_write, "uc_reg_write", (void *uc, int id, const void *value)) \
    X(int, uc_mem_map_ptr, "uc_mem_map_ptr", \
      (void *uc, uint64_t at, uint64_t size, uint32_t perms, void *host)) \
    X(int, uc_mem_protect, "uc_mem_protect", \
      (void *uc, uint64_t at, uint64_t size, uint32_t perms)) \
    X(int, uc_mem_unmap, "uc_mem_unmap", (void *uc, uint64_t at, uint64_t size)) \
    X(int, uc_hook_add, "uc_hook_add", (void *uc, size_t *hook, int type, void *callback, \
      void *data, uint64_t begin, uint64_t end, ...)) \
    X(int, uc_hook_del, "uc_hook_del", (void *uc, size_t hook)) \
    X(int, uc_emu_start, "uc_emu_start", \
      (void *uc, uint64_t begin, uint64_t until, uint64_t timeout, size_t count)) \
    X(int, cpu_exec, "cpu_exec_x86_64", (void *uc, void *cpu)) \
    X(void, cpu_loop_exit, "cpu_loop_exit_x86_64", (void *cpu) __attribute__((noreturn))) \
    X(void, cpu_loop_exit_restore, "cpu_loop_exit_restore_x86_64", \
      (void *cpu, uintptr_t from) __attribute__((noreturn))) \
    X(void, restore_state, "restore_state_to_opc_x86_64", \
      (void *env, void *block, uint64_t *data)) \
    X(bool, cpu_restore_state, "cpu_restore_state_x86_64", (void *cpu, uintptr_t from, bool)) \
    X(void, do_interrupt, "x86_cpu_do_interrupt_x86_64", (void *cpu)) \
    X(void, do_hardware_interrupt, "do_interrupt_x86_hardirq_x86_64", \
      (void *env, int vector, int hardware)) \
    X(void, raise, "raise_exception_err_ra_x86_64", \
      (void *env, int vector, int error, uintptr_t from) __attribute__((noreturn))) \
    X(unsigned, compute_flags, "cpu_cc_compute_all_x86_64", (void *env, int op)) \
    X(void, update_fp_status, "update_fp_status_x86_64", (void *env)) \
    X(void, update_mxcsr_status, "update_mxcsr_status_x86_64", (void *env)) \
    X(void, update_cr0, "cpu_x86_update_cr0_x86_64", (void *env, uint32_t value)) \
    X(void, update_cr3, "cpu_x86_update_cr3_x86_64", (void *env, uint64_t value)) \
    X(void, update_cr4, "cpu_x86_update_cr4_x86_64", (void *env, uint32_t value)) \
    X(void, tlb_flush, "tlb_flush_x86_64", (void *cpu)) \
    X(void, tlb_reset_dirty, "tlb_reset_dirty_x86_64", \
      (void *cpu, uint64_t host, uint64_t length)) \
    X(void, tlb_reset_dirty_by_vaddr, "tlb_reset_dirty_by_vaddr_x86_64", \
      (void *cpu, uint64_t start, uint64_t length)) \
    X(void, tlb_set_dirty, "tlb_set_dirty_x86_64", (void *cpu, uint64_t address)) \
    X(void, tlb_protect_code, "tlb_protect_code_x86_64", (void *uc, uint64_t ram)) \
    X(void, tlb_unprotect_code, "tlb_unprotect_code_x86_64", (void *uc, uint64_t ram)) \
    X(void, invalidate_fast, "tb_invalidate_phys_page_fast_x86_64", \
      (void *uc, void *pages, uint64_t ram, int length, uintptr_t from)) \
    X(void, invalidate_range, "tb_invalidate_phys_range_x86_64", \
      (void *uc, uint64_t start, uint64_t end)) \
    X(uint64_t, ram_from_host, "qemu_ram_addr_from_host_x86_64", (void *uc, void *host)) \
    X(void *, find_mapping, "find_memory_mapping_x86_64", (void *uc, uint64_t at)) \
    X(bool, to_physical, "tlb_vaddr_to_paddr_x86_64", \
      (void *env, uint64_t at, int access, int mmu, uint64_t *physical)) \
    X(uint64_t, debug_physical, "x86_cpu_get_phys_page_attrs_debug_x86_64", \
      (void *cpu, uint64_t at, void *attrs)) \
    X(void, store_phys, "x86_stl_phys_notdirty_x86_64", \
      (void *cpu, uint64_t at, uint32_t value)) \
    X(int, dispatch_read, "memory_region_dispatch_read_x86_64", \
      (void *uc, void *region, uint64_t at, uint64_t *value, int op, uint64_t attrs)) \
    X(int, dispatch_write, "memory_region_dispatch_write_x86_64", \
      (void *uc, void *region, uint64_t at, uint64_t value, int op, uint64_t attrs)) \
    X(void, generate_check, "check_exit_request_x86_64", (void *context)) \
    X(void, check, "helper_check_exit_request_x86_64", (void *uc, uint32_t delay)) \
    X(bool, exec_interrupt, "x86_cpu_exec_interrupt_x86_64", (void *cpu, int request)) \
    X(void, resume_all, "resume_all_vcpus_x86_64", (void *uc)) \
    X(void, reset_request, "qemu_system_reset_request", (void *uc)) \
    X(uint64_t, load1, "helper_ret_ldub_mmu_x86_64", LOAD) \
    X(uint64_t, load2, "helper_le_lduw_mmu_x86_64", LOAD) \
    X(uint64_t, load4, "helper_le_ldul_mmu_x86_64", LOAD) \
    X(uint64_t, load8, "helper_le_ldq_mmu_x86_64", LOAD) \
    X(void, store1, "helper_ret_stb_mmu_x86_64", STORE) \
    X(void, store2, "helper_le_stw_mmu_x86_64", STORE) \
    X(void, store4, "helper_le_stl_mmu_x86_64", STORE) \
    X(void, store8, "helper_le_stq_mmu_x86_64", STORE) \
    X(unsigned, load2_at, "cpu_lduw_mmuidx_ra_x86_64", \
      (void *env, uint64_t at, int mmu, uintptr_t from)) \
    X(void, tlb_flush_modes, "tlb_flush_by_mmuidx_x86_64", (void *cpu, uint16_t modes)) \
    X(void, tlb_flush_page_modes, "tlb_flush_page_by_mmuidx_x86_64", \
      (void *cpu, uint64_t at, uint16_t modes)) \
    X(uint64_t, rdrand, "helper_rdrand_x86_64", (void *env)) \
    X(void, cmpxchg8b, "helper_cmpxchg8b_unlocked_x86_64", (void *env, uint64_t at)) \
    X(void, cmpxchg16b, "helper_cmpxchg16b_unlocked_x86_64", (void *env, uint64_t at)) \
    X(void, phaddw_mmx, "helper_phaddw_mmx_x86_64", TWO) \
    X(void, phaddw_xmm, "helper_phaddw_xmm_x86_64", TWO) \
    X(void, phaddd_mmx, "helper_phaddd_mmx_x86_64", TWO) \
    X(void, phaddd_xmm, "helper_phaddd_xmm_x86_64", TWO) \
    X(void, phaddsw_mmx, "helper_phaddsw_mmx_x86_64", TWO) \
    X(void, phaddsw_xmm, "helper_phaddsw_xmm_x86_64", TWO) \
    X(void, phsubw_mmx, "helper_phsubw_mmx_x86_64", TWO) \
    X(void, phsubw_xmm, "helper_phsubw_xmm_x86_64", TWO) \
    X(void, phsubd_mmx, "helper_phsubd_mmx_x86_64", TWO) \
    X(void, phsubd_xmm, "helper_phsubd_xmm_x86_64", TWO) \
    X(void, phsubsw_mmx, "helper_phsubsw_mmx_x86_64", TWO) \
    X(void, phsubsw_xmm, "helper_phsubsw_xmm_x86_64", TWO) \
    X(uint32_t, multiply32, "float32_mul_x86_64", (uint32_t a, uint32_t b, void *status)) \
    X(uint32_t, add32, "float32_add_x86_64", (uint32_t a, uint32_t b, void *status)) \
    X(void, minps, "helper_minps_x86_64", TWO) \
    X(void, maxps, "helper_maxps_x86_64", TWO) \
    X(void, minss, "helper_minss_x86_64", TWO) \
    X(void, maxss, "helper_maxss_x86_64", TWO) \
    X(void, minpd, "helper_minpd_x86_64", TWO) \
    X(void, maxpd, "helper_maxpd_x86_64", TWO) \
    X(void, minsd, "helper_minsd_x86_64", TWO) \
    X(void, maxsd, "helper_maxsd_x86_64", TWO) \
    X(uint64_t, multiply64, "float64_mul_x86_64", (uint64_t a, uint64_t b, void *status)) \
    X(uint64_t, add64, "float64_add_x86_64", (uint64_t a, uint64_t b, void *status)) \
    X(void, flds, "helper_flds_ST0_x86_64", (void *env, uint32_t value)) \
    X(void, fldl, "helper_fldl_ST0_x86_64", (void *env, uint64_t value)) \
    X(void, raise_int, "helper_raise_interrupt_x86_64", (void *env, int vector, int addend)) \
    X(void, into, "helper_into_x86_64", (void *env, int addend))
#define TWO (void *env, void *to, void *from)
#define LOAD (void *env, uint64_t at, uint32_t oi, uintptr_t from)
#define STORE (void *env, uint64_t at, uint64_t value, uint32_t oi, uintptr_t from)

struct library {
#define X(result, name, symbol, arguments) result (*name) arguments;
    LIBRARY_CALLS(X)
#undef X
};
extern struct library lib;

int soft_library_ready(void);

#endif
