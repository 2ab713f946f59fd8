// Integer weights times few tokens: codes are multiplied where they are unpacked.
#pragma once

#include "tiles.h"

namespace moesaic::MOESAIC_ISA {

// whole[half][t] = the integer sums of a superblock of int8
template <class Format, int N>
MOESAIC_INLINE void add_whole_codes(const Super<Format>& super, int width, const TokenTile& x, int64_t s, I (&whole)[2][N]) {
    constexpr int RUN_BYTES = ROWS * Format::RUN * Format::BITS / 8;
    const int8_t* q = x.q + s * SUPER * N;
    const uint8_t* codes = super.codes;
    for (int t = 0; t < N; ++t) whole[0][t] = whole[1][t] = set(-BIAS * x.total[s * N + t]);
    for (int k = 0; k < width; k += Format::RUN, codes += RUN_BYTES) {
        prefetch(codes + PREFETCH_BYTES);
        prefetch(codes + PREFETCH_BYTES + 64);
        Format::run(codes, [&](int j, I a, I b) __attribute__((always_inline)) {
            const I back = set(int32_t(0x01010101u * (128 - BIAS)));
            if (BIAS != 128) a = subtract_bytes(a, back), b = subtract_bytes(b, back);
#pragma GCC unroll 12
            for (int t = 0; t < N; ++t) {
                const I four = broadcast(q + t * SUPER + k + 4 * j);
                whole[0][t] = dot_biased(whole[0][t], a, four);
                whole[1][t] = dot_biased(whole[1][t], b, four);
            }
        });
    }
}

// whole[half][t] = the integer sums of a superblock of groups, for COUNT halves of the rows from FIRST on
template <class Format, int N, int FIRST, int COUNT>
MOESAIC_INLINE void add_whole_groups(const Super<Format>& super, int width, const TokenTile& x, int64_t s, I (&whole)[2][N]) {
    constexpr int RUN_BYTES = ROWS * Format::RUN * Format::BITS / 8, GROUPS = SPAN<Format> / Format::GROUP;
    const int8_t* q = x.q + s * SUPER * N;
    const int16_t* sums = x.sums + s * (SUPER / Format::GROUP) * N * 2;
    const uint8_t* codes = super.codes;
    const I packed[2] = {super.scales_of(0), super.scales_of(1)};
    const auto start_of = [&](int group, int t) __attribute__((always_inline)) {
        return start_group<Format::BIAS>(broadcast(sums + (group * N + t) * 2));
    };
    for (int h = FIRST; h < FIRST + COUNT; ++h) {
        for (int t = 0; t < N; ++t) whole[h][t] = set(0);
    }
    for (int quarter = 0; quarter < width / 64; ++quarter) {
        const I four_scales[2] = {byte_of_words(packed[0], quarter), byte_of_words(packed[1], quarter)};
#pragma GCC unroll 4
        for (int k = 0; k < 64; k += SPAN<Format>) {
            I part[GROUPS][2][N];
#pragma GCC unroll 2
            for (int g = 0; g < GROUPS; ++g) {
#pragma GCC unroll 12
                for (int t = 0; t < N; ++t) {
                    part[g][0][t] = part[g][1][t] = Format::DOUBLED ? set(0) : start_of(4 * quarter + k / Format::GROUP + g, t);
                }
            }
#pragma GCC unroll 2
            for (int run = 0; run < SPAN<Format>; run += Format::RUN, codes += RUN_BYTES) {
                for (int line = 0; line < RUN_BYTES; line += 64) prefetch(codes + PREFETCH_BYTES + line);
                Format::run(codes, [&](int j, I a, I b) __attribute__((always_inline)) {
                    // Codes are doubled once for the whole group, instead of each.
                    const I levels[2] = {Format::DOUBLED ? a : Format::levels(a), Format::DOUBLED ? b : Format::levels(b)};
                    I(&to)[2][N] = part[(run + 4 * j) / Format::GROUP];
#pragma GCC unroll 12
                    for (int t = 0; t < N; ++t) {
                        const I four = broadcast(q + t * SUPER + 64 * quarter + k + run + 4 * j);
#pragma GCC unroll 2
                        for (int h = FIRST; h < FIRST + COUNT; ++h) {
                            to[h][t] = dot_group(to[h][t], levels[h], four);
                            pin(to[h][t]);
                        }
                    }
                });
            }
#pragma GCC unroll 2
            for (int g = 0; g < GROUPS; ++g) {
#pragma GCC unroll 2
                for (int h = FIRST; h < FIRST + COUNT; ++h) {
                    const I scale = scale_of<SMALLEST_SCALE, SCALE_MASK>(four_scales[h], k / Format::GROUP + g);
#pragma GCC unroll 12
                    for (int t = 0; t < N; ++t) {
                        I sum = part[g][h][t];
                        if (Format::DOUBLED) sum = join_groups(double_group(sum), start_of(4 * quarter + k / Format::GROUP + g, t));
                        whole[h][t] = add_group(whole[h][t], sum, scale);
                    }
                }
            }
        }
    }
}

// One superblock of a GEMV with N tokens: sum[half][t] += (integer sum of the superblock) * step * scale.
template <class Format, int N>
MOESAIC_INLINE void gemv_superblock(const uint8_t* p, int width, const TokenTile& x, int64_t s, F (&sum)[2][N]) {
    const Super<Format> super(p, width);
    I whole[2][N];
    if constexpr (Format::GROUP == 0) {
        add_whole_codes<Format, N>(super, width, x, s, whole);
    } else if constexpr (ACCUMULATORS < 16 && N > 1) {  // the sums of all rows do not fit the registers
        add_whole_groups<Format, N, 0, 1>(super, width, x, s, whole);
        add_whole_groups<Format, N, 1, 1>(super, width, x, s, whole);
    } else {
        add_whole_groups<Format, N, 0, 2>(super, width, x, s, whole);
    }
#pragma GCC unroll 12
    for (int t = 0; t < N; ++t) {
        const F scale = set(x.scale[s * N + t]);
        for (int h = 0; h < 2; ++h) sum[h][t] = fma(to_float(whole[h][t]), mul(super.step(h), scale), sum[h][t]);
    }
}

// sum[t] [32 rows] = one block of 32 rows times each of N tokens.
template <class Format, int N>
__attribute__((noinline)) void gemv(const uint8_t* block, int64_t columns, const TokenTile& x, float* sum) {
    F total[2][N];
    for (int t = 0; t < N; ++t) total[0][t] = total[1][t] = zero();
    int64_t s = 0;
    for (int64_t left = padded(columns); left > 0; left -= SUPER, ++s) {
        const int width = int(left < SUPER ? left : SUPER);
        gemv_superblock<Format, N>(block, width, x, s, total);
        block += super_bytes<Format>(width);
    }
    for (int t = 0; t < N; ++t) {
        store_float(sum + t * ROWS, total[0][t]);
        store_float(sum + t * ROWS + 16, total[1][t]);
    }
}

}  // namespace moesaic::MOESAIC_ISA
