/* A TCG plugin for qemu-user: instructions executed and bytes loaded or stored so far, printed whenever the program
   seeks in file -1, with the offset that it names. Threads other than the first count, too, without locks: count with
   one thread. Debian ships no header for plugins: what is used of qemu's interface (version 1) is declared here. */

#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define EXECUTED_INLINE_ADD 0
#define NO_REGISTERS 0
#define LOADS_AND_STORES 3
#define LSEEK 62 /* on 64-bit Arm */

struct block;
struct instruction;

void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t, void (*)(uint64_t, struct block *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct block *, int, void *, uint64_t);
size_t qemu_plugin_tb_n_insns(const struct block *);
struct instruction *qemu_plugin_tb_get_insn(const struct block *, size_t);
void qemu_plugin_register_vcpu_mem_cb(struct instruction *, void (*)(unsigned, uint32_t, uint64_t, void *), int, int,
                                      void *);
unsigned qemu_plugin_mem_size_shift(uint32_t);
void qemu_plugin_register_vcpu_syscall_cb(uint64_t, void (*)(uint64_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t,
                                                             uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));

int qemu_plugin_version = 1;

static uint64_t instructions, bytes;

static void accessed(unsigned cpu, uint32_t access, uint64_t address, void *data) {
    bytes += UINT64_C(1) << qemu_plugin_mem_size_shift(access);
}

static void translated(uint64_t id, struct block *block) {
    size_t count = qemu_plugin_tb_n_insns(block);
    qemu_plugin_register_vcpu_tb_exec_inline(block, EXECUTED_INLINE_ADD, &instructions, count);
    for (size_t i = 0; i < count; i++)
        qemu_plugin_register_vcpu_mem_cb(qemu_plugin_tb_get_insn(block, i), accessed, NO_REGISTERS, LOADS_AND_STORES,
                                         NULL);
}

static void called(uint64_t id, unsigned cpu, int64_t number, uint64_t file, uint64_t offset, uint64_t a3, uint64_t a4,
                   uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
    if (number == LSEEK && (int32_t)file == -1)
        fprintf(stderr, "\ncounted %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", offset, instructions, bytes);
}

int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv) {
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
