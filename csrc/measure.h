// The limits of the machine: how fast it reads memory, and how fast it multiplies.
#pragma once

#include "amx.h"
#include "pool.h"
#include "vec.h"

namespace moesaic::MOESAIC_ISA {

inline volatile int32_t sink;  // Results are stored here, so that the compiler keeps the computation.

constexpr int64_t READ_BYTES = 4 << 20;

// Read all of the memory once, with all threads. Each chunk of 4 MiB is read as `streams` parallel streams with a
// prefetch distance of `ahead` bytes (0: only the hardware prefetcher).
inline void read_memory(const uint8_t* memory, int64_t bytes, int streams, int ahead) {
    parallel_for(bytes / READ_BYTES, [&](int64_t chunk, int) {
        const uint8_t* p = memory + chunk * READ_BYTES;
        const int64_t length = READ_BYTES / streams;
        I sum[8];
        for (auto& each : sum) each = set(0);
        for (int64_t at = 0; at < length; at += 128) {
            for (int s = 0; s < streams; ++s) {
                const uint8_t* line = p + s * length + at;
                if (ahead) {
                    prefetch(line + ahead);
                    prefetch(line + ahead + 64);
                }
                sum[2 * s] = add(sum[2 * s], load(line));
                sum[2 * s + 1] = add(sum[2 * s + 1], load(line + 64));
            }
        }
        for (int i = 1; i < 8; ++i) sum[0] = add(sum[0], sum[i]);
        sink = largest(sum[0]);
    });
}

// Multiply and add bytes in registers, with all threads. Return the number of multiplications plus additions.
inline int64_t multiply(int64_t rounds) {
    constexpr int TASKS = 64;
#if MOESAIC_AMX
    constexpr int SUMS = 4, WORTH = 16 * 16 * 64 * 2;
    parallel_for(TASKS, [&](int64_t, int) {
        const TileRegisters registers;
        for (int64_t i = 0; i < rounds; ++i) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    });
#else
    constexpr int SUMS = ACCUMULATORS, WORTH = 64 * 2;
    parallel_for(TASKS, [&](int64_t, int) {
        I sums[SUMS], a = set(sink), b = set(sink + 1);
        for (auto& sum : sums) sum = set(0);
        for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
            for (int j = 0; j < SUMS; ++j) {
                pin(b);  // else the compiler multiplies only once where products and sums are two instructions
                sums[j] = MOESAIC_WORDS ? dot_group(sums[j], a, b) : dot_biased(sums[j], a, b);
            }
        }
        for (int j = 1; j < SUMS; ++j) sums[0] = add(sums[0], sums[j]);
        sink = largest(sums[0]);
    });
#endif
    return TASKS * rounds * SUMS * WORTH;
}

// Multiply and add bfloat16 values in registers, with all threads. Return the number of operations.
inline int64_t multiply_bf16(int64_t rounds) {
    constexpr int TASKS = 64;
#if MOESAIC_AMX
    constexpr int SUMS = 4, WORTH = 16 * 16 * 32 * 2;
    parallel_for(TASKS, [&](int64_t, int) {
        const TileRegisters registers;
        for (int64_t i = 0; i < rounds; ++i) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    });
#else
    constexpr int SUMS = ACCUMULATORS, WORTH = 32 * 2;
    parallel_for(TASKS, [&](int64_t, int) {
        F sums[SUMS];
        const I a = set(sink), b = set(sink + 1);
        for (auto& sum : sums) sum = zero();
        for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
            for (int j = 0; j < SUMS; ++j) sums[j] = dot_bf16(sums[j], a, b);
        }
        for (int j = 1; j < SUMS; ++j) sums[0] = add(sums[0], sums[j]);
        sink = largest(bits(sums[0]));
    });
#endif
    return TASKS * rounds * SUMS * WORTH;
}

}  // namespace moesaic::MOESAIC_ISA
