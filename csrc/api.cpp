// The C functions that Python calls through moesaic/ops/_calls.py.
//
// moesaic/ops/__init__.py checks shapes, dtypes and devices before it chooses a backend. The functions here check
// only the expert ids, which are data. All other arguments are trusted.

#include <cstring>
#include <new>

#if defined(MOESAIC_HAS_amx) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(MOESAIC_HAS_neon)
#include <sys/auxv.h>
#endif

#include "feedback.h"
#include "kernels.h"
#include "packing.h"
#include "pool.h"

using namespace moesaic;

namespace {

#if defined(MOESAIC_HAS_amx)
// Ask Linux for permission to use the tile registers: they add 8 KiB to the state that it saves for each thread.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif

// The instruction sets of this processor, from the smallest to the largest.
struct InstructionSets {
    const Kernels* tables[6];
    int count;

    void add(const Kernels* table) { tables[count++] = table; }

    InstructionSets() : tables{&portable::kernels}, count(1) {
#if defined(__x86_64__)
        __builtin_cpu_init();
#if defined(MOESAIC_HAS_avx2)
        if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return;
        add(&avx2::kernels);
#endif
#if defined(MOESAIC_HAS_avxvnni)
        if (__builtin_cpu_supports("avxvnni")) add(&avxvnni::kernels);
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
#elif defined(MOESAIC_HAS_neon)
        if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) add(&neon::kernels);
#endif
    }
};

const InstructionSets instruction_sets;
const Kernels* kernels = instruction_sets.tables[instruction_sets.count - 1];

template <class Args>
bool valid(const Args&) {
    return true;
}

// Every id must be in range: it selects the memory that is read.
bool in_range(const int64_t* ids, int64_t count, int64_t end) {
    for (int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= end) return false;
    }
    return true;
}
bool valid(const ExpertsArgs& a) { return in_range(a.ids, a.tokens * a.choices, a.experts); }
bool valid(const EmbeddingArgs& a) { return in_range(a.ids, a.tokens, a.rows); }

// Ops return one of these; moesaic/ops/_calls.py raises an error for each but OK.
enum Status : int { OK, OUT_OF_MEMORY, ID_OUT_OF_RANGE };

enum Op : int64_t {
#define MOESAIC_NUMBER(op, Args) OP_##op,
    MOESAIC_OPS(MOESAIC_NUMBER)
#undef MOESAIC_NUMBER
};

// Run a call of any op.
Status run(const Call& call) {
    switch (call.op) {
#define MOESAIC_CASE(op, Args)                                     \
    case OP_##op: {                                                \
        const Args& a = *static_cast<const Args*>(call.arguments); \
        if (!valid(a)) return ID_OUT_OF_RANGE;                     \
        kernels->op(a);                                            \
        return OK;                                                 \
    }
        MOESAIC_OPS(MOESAIC_CASE)
#undef MOESAIC_CASE
    }
    return OK;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* moesaic_isa() { return kernels->name; }

// Return the names of the weight formats in the order of their numbers, each followed by a space.
const char* moesaic_formats() {
    return
#define MOESAIC_FORMAT(name, Type) #name " "
#include "formats/formats.def"
        ;
}

// Use another instruction set. Return 0 if this processor does not have it. For tests and benchmarks.
int moesaic_set_isa(const char* name) {
    for (int i = 0; i < instruction_sets.count; ++i) {
        if (strcmp(instruction_sets.tables[i]->name, name) == 0) {
            OpLock lock;
            kernels = instruction_sets.tables[i];
            return 1;
        }
    }
    return 0;
}

int moesaic_threads() {
    OpLock lock;
    return threads();
}

void moesaic_set_threads(int count) {
    OpLock lock;
    set_threads(count);
}

// Return the names of the ops in the order of their numbers, each followed by a space.
const char* moesaic_ops() {
    return
#define MOESAIC_NAME_OF(op, Args) #op " "
        MOESAIC_OPS(MOESAIC_NAME_OF)
#undef MOESAIC_NAME_OF
        ;
}

// Run calls one after another. Return the status of the first that fails; those after it are not run.
int moesaic_run(const Call* calls, int64_t count) {
    OpLock lock;
    try {
        for (int64_t i = 0; i < count; ++i) {
            if (const Status status = run(calls[i])) return status;
        }
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
    return OK;
}

int moesaic_feed_back(const FeedBackArgs* a) {
    OpLock lock;
    try {
        feed_back(*a);
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
    return OK;
}

int moesaic_store_codes(const StoreCodesArgs* a) {
    OpLock lock;
    store_codes(*a);
    return OK;
}

void moesaic_read(const uint8_t* memory, int64_t bytes, int streams, int ahead) {
    OpLock lock;
    kernels->read(memory, bytes, streams, ahead);
}

int64_t moesaic_multiply(int64_t rounds) {
    OpLock lock;
    return kernels->multiply(rounds);
}

int64_t moesaic_multiply_bf16(int64_t rounds) {
    OpLock lock;
    return kernels->multiply_bf16(rounds);
}

}  // extern "C"
#pragma GCC visibility pop
