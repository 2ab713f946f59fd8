// The C functions that Python calls. They check nothing: moesaic/ops/native.py does.

#include <cstring>
#include <new>

#if defined(MOESAIC_HAS_amx) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "pool.h"

using namespace moesaic;

namespace {

#if defined(MOESAIC_HAS_amx)
// The system must be asked before a process may use tile registers: they make what it saves 8 KiB larger.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif

// The instruction sets that this processor has, from the least on.
struct Levels {
    const Kernels* all[5];
    int count;

    void add(const Kernels* one) { all[count++] = one; }

    Levels() : all{&portable::kernels}, count(1) {
#if defined(__x86_64__)
        __builtin_cpu_init();
#if defined(MOESAIC_HAS_avx2)
        if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return;
        add(&avx2::kernels);
#endif
#if defined(MOESAIC_HAS_avx512)
        if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bw") ||
            !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) return;
        add(&avx512::kernels);
#endif
#if defined(MOESAIC_HAS_avx512bf16)
        if (!__builtin_cpu_supports("avx512bf16")) return;
        add(&avx512bf16::kernels);
#endif
#if defined(MOESAIC_HAS_amx)
        if (!__builtin_cpu_supports("amx-int8") || !__builtin_cpu_supports("amx-bf16") || !may_use_tiles()) return;
        add(&amx::kernels);
#endif
#endif
    }
};

const Levels levels;
const Kernels* kernels = levels.all[levels.count - 1];

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* moesaic_isa() { return kernels->name; }

// Use another instruction set; 0 if this processor does not have it. For tests and comparisons.
int moesaic_set_isa(const char* name) {
    for (int i = 0; i < levels.count; ++i) {
        if (strcmp(levels.all[i]->name, name) == 0) {
            Turn turn;
            kernels = levels.all[i];
            return 1;
        }
    }
    return 0;
}

int moesaic_threads() {
    Turn turn;
    return threads();
}

void moesaic_set_threads(int count) {
    Turn turn;
    set_threads(count);
}

// The ops return 0, or 1 where there was no memory.
#define MOESAIC_OP(op, Args)                      \
    int moesaic_##op(const Args* a) {             \
        Turn turn;                                \
        try {                                     \
            kernels->op(*a);                      \
        } catch (const std::bad_alloc&) {         \
            return 1;                             \
        }                                         \
        return 0;                                 \
    }
MOESAIC_OP(linear, LinearArgs)
MOESAIC_OP(experts, ExpertsArgs)
MOESAIC_OP(attention, AttentionArgs)
MOESAIC_OP(rms_norm, NormArgs)
MOESAIC_OP(rope, RopeArgs)
MOESAIC_OP(truncate, TruncateArgs)
MOESAIC_OP(draw, DrawArgs)

void moesaic_read(const uint8_t* memory, int64_t bytes, int streams, int ahead) {
    Turn turn;
    kernels->read(memory, bytes, streams, ahead);
}

int64_t moesaic_multiply(int64_t rounds) {
    Turn turn;
    return kernels->multiply(rounds);
}

int64_t moesaic_multiply_bf16(int64_t rounds) {
    Turn turn;
    return kernels->multiply_bf16(rounds);
}

}  // extern "C"
#pragma GCC visibility pop
