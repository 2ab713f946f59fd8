// The C functions that Python calls. They check nothing: moesaic/ops/native.py does.

#include <new>

#include "kernels.h"
#include "pool.h"

using namespace moesaic;

namespace {

const Kernels* best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        return &avx512::kernels;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        return &avx2::kernels;
    }
#endif
    return &portable::kernels;
}

const Kernels* kernels = best();

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* moesaic_isa() { return kernels->name; }

// Use another instruction set; 0 if this processor does not have it. For tests and comparisons.
int moesaic_set_isa(int level) {
    const Kernels* const top = best();
#if defined(__x86_64__)
    const Kernels* const all[] = {&portable::kernels, &avx2::kernels, &avx512::kernels};
    const int highest = top == all[2] ? 2 : top == all[1] ? 1 : 0;
#else
    const Kernels* const all[] = {&portable::kernels};
    const int highest = 0;
#endif
    if (level < 0 || level > highest) return 0;
    Turn turn;
    kernels = all[level];
    return 1;
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

void moesaic_read(const uint8_t* memory, int64_t bytes, int streams, int ahead) {
    Turn turn;
    kernels->read(memory, bytes, streams, ahead);
}

int64_t moesaic_multiply(int64_t rounds) {
    Turn turn;
    return kernels->multiply(rounds);
}

}  // extern "C"
#pragma GCC visibility pop
