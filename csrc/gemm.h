// Integer weights times many tokens: a superblock is unpacked once, and then multiplied with tiles of tokens.
#pragma once

#include "amx.h"
#include "gemv.h"

namespace moesaic::MOESAIC_ISA {

#if MOESAIC_AMX
constexpr int PANEL_BIAS = 0;
#else
constexpr int PANEL_BIAS = BIAS;
#endif

// Whether a panel holds levels and their scales apart, because plain AVX2 adds products of levels in 16 bits: that is
// twice as fast as adding products of v.
template <class Format>
constexpr bool HAS_LEVELS = MOESAIC_WORDS && Format::GROUP != 0;

// An unpacked superblock.
struct alignas(64) Unpacked {
    uint8_t bytes[ROWS * SUPER];        // [width / 4][2 halves][16 rows][4]: v + PANEL_BIAS, or levels + Format::BIAS
    uint8_t scales[ROWS * SUPER / 4];   // of levels: [groups][2 halves][16 rows][4], as scale_of() returns them
};

// Unpack a superblock to levels and scales.
template <class Format>
__attribute__((noinline)) void unpack_levels(const uint8_t* p, int width, Unpacked& panel) {
    const Super<Format> super(p, width);
    constexpr int RUN_BYTES = ROWS * Format::RUN * Format::BITS / 8;
    for (int h = 0; h < 2; ++h) {
        const I packed = super.scales_of(h);
        for (int group = 0; group < width / Format::GROUP; ++group) {
            const I scale = scale_of<SMALLEST_SCALE, SCALE_MASK>(byte_of_words(packed, group / 4), group % 4);
            store(panel.scales + (2 * group + h) * 64, scale);
        }
    }
    const uint8_t* codes = super.codes;
    for (int k = 0; k < width; k += Format::RUN, codes += RUN_BYTES) {
        for (int line = 0; line < RUN_BYTES; line += 64) prefetch(codes + PREFETCH_BYTES + line);
        Format::run(codes, [&](int j, I a, I b) __attribute__((always_inline)) {
            store(panel.bytes + (k / 4 + j) * 128, Format::levels(a));
            store(panel.bytes + (k / 4 + j) * 128 + 64, Format::levels(b));
        });
    }
}

// Unpack a superblock to bytes v + PANEL_BIAS.
template <class Format>
__attribute__((noinline)) void unpack_superblock(const uint8_t* p, int width, uint8_t* panel) {
    const Super<Format> super(p, width);
    constexpr int RUN_BYTES = ROWS * Format::RUN * Format::BITS / 8;
    const uint8_t* codes = super.codes;
    if constexpr (Format::GROUP == 0) {
        const I offset = set(int32_t(0x01010101u * (128 - PANEL_BIAS)));
        for (int k = 0; k < width; k += Format::RUN, codes += RUN_BYTES) {
            for (int line = 0; line < RUN_BYTES; line += 64) prefetch(codes + PREFETCH_BYTES + line);
            Format::run(codes, [&](int j, I a, I b) __attribute__((always_inline)) {
                store(panel + (k / 4 + j) * 128, subtract_bytes(a, offset));
                store(panel + (k / 4 + j) * 128 + 64, subtract_bytes(b, offset));
            });
        }
    } else {
        constexpr int GROUPS = SPAN<Format> / Format::GROUP;
        const I packed[2] = {super.scales_of(0), super.scales_of(1)};
        for (int k = 0; k < width; k += SPAN<Format>) {
            // The product of a level and a scale fits a byte, so one 16-bit multiplication computes two products.
            I factor[GROUPS][2], offset[GROUPS][2];
            for (int g = 0; g < GROUPS; ++g) {
                for (int h = 0; h < 2; ++h) {
                    const int group = k / Format::GROUP + g;
                    const I scale = scale_of<SMALLEST_SCALE, SCALE_MASK>(byte_of_words(packed[h], group / 4), group % 4);
                    const I low = bit_and(scale, set(0xffff));
                    factor[g][h] = bit_or(low, shift_left<16>(low));
                    const I biases = multiply_words(factor[g][h], set(Format::BIAS * 0x01010101));
                    offset[g][h] = subtract_bytes(biases, set(int32_t(0x01010101u * PANEL_BIAS)));
                }
            }
            for (int run = 0; run < SPAN<Format>; run += Format::RUN, codes += RUN_BYTES) {
                for (int line = 0; line < RUN_BYTES; line += 64) prefetch(codes + PREFETCH_BYTES + line);
                Format::run(codes, [&](int j, I a, I b) __attribute__((always_inline)) {
                    const int g = (run + 4 * j) / Format::GROUP;
                    uint8_t* to = panel + ((k + run) / 4 + j) * 128;
                    store(to, subtract_bytes(multiply_words(Format::levels(a), factor[g][0]), offset[g][0]));
                    store(to + 64, subtract_bytes(multiply_words(Format::levels(b), factor[g][1]), offset[g][1]));
                });
            }
        }
    }
}

// One unpacked superblock times a tile of tokens: sum[t][row] += (integer sum of the superblock) * step * scale.
#if MOESAIC_AMX

// sum[row] += (integer sum of the superblock) * step * scale
MOESAIC_INLINE void add_scaled(float* sum, I low, I high, F low_step, F high_step, float scale) {
    const F factor = set(scale);
    store_float(sum, fma(to_float(low), mul(low_step, factor), load_float(sum)));
    store_float(sum + 16, fma(to_float(high), mul(high_step, factor), load_float(sum + 16)));
}

inline void gemm_tile(const uint8_t* p, const uint8_t* panel, int width, const TokenTile& x, int64_t s, float* sum) {
    // Tile registers 0 to 3 accumulate, 4 and 5 hold tokens, 6 and 7 hold rows. With up to 16 tokens, two pairs of
    // accumulators alternate: the latency of a product is longer than the interval at which products can start.
    alignas(64) int32_t whole[4][16][16];
    const int8_t* q = x.q + s * SUPER * x.n;
    const bool two = x.n > 16;
    compiler_barrier(panel);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (two) {
        for (int k = 0; k < width; k += 64, panel += 2048, q += 64) {
            _tile_loadd(6, panel, 128);
            _tile_loadd(4, q, SUPER);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, panel + 64, 128);
            _tile_dpbssd(1, 4, 7);
            _tile_loadd(5, q + 16 * SUPER, SUPER);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    } else {
        for (int k = 0; k < width; k += 64, panel += 2048, q += 64) {
            _tile_loadd(4, q, SUPER);
            _tile_loadd(6, panel, 128);
            _tile_loadd(7, panel + 64, 128);
            if (k % 128) {
                _tile_dpbssd(2, 4, 6);
                _tile_dpbssd(3, 4, 7);
            } else {
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(1, 4, 7);
            }
        }
    }
    _tile_stored(0, whole[0], 64);
    _tile_stored(1, whole[1], 64);
    _tile_stored(2, whole[2], 64);
    _tile_stored(3, whole[3], 64);
    const F low = load_bf16((const uint16_t*)p), high = load_bf16((const uint16_t*)p + 16);
    const float* scale = x.scale + s * x.n;
    if (two) {
        for (int t = 0; t < 16; ++t, sum += ROWS) add_scaled(sum, load(whole[0][t]), load(whole[1][t]), low, high, scale[t]);
        for (int t = 16; t < x.n; ++t, sum += ROWS) {
            add_scaled(sum, load(whole[2][t - 16]), load(whole[3][t - 16]), low, high, scale[t]);
        }
    } else {
        for (int t = 0; t < x.n; ++t, sum += ROWS) {
            const I a = add(load(whole[0][t]), load(whole[2][t])), b = add(load(whole[1][t]), load(whole[3][t]));
            add_scaled(sum, a, b, low, high, scale[t]);
        }
    }
}

#else

#if MOESAIC_WORDS

// One superblock of levels times N tokens.
template <class Format, int N>
__attribute__((noinline)) void gemm_levels_of(const uint8_t* p, const Unpacked& panel, int width, const TokenTile& x, int64_t s, float* sum) {
    const int16_t* sums = x.sums + s * (SUPER / Format::GROUP) * N * 2;
    for (int h = 0; h < 2; ++h) {
        const int8_t* q = x.q + s * SUPER * N;
        const uint8_t *levels = panel.bytes + 64 * h, *scales = panel.scales + 64 * h;
        I whole[N];
        for (int t = 0; t < N; ++t) whole[t] = set(0);
        for (int group = 0; group < width / Format::GROUP; ++group, scales += 128) {
            I part[N];
#pragma GCC unroll 12
            for (int t = 0; t < N; ++t) part[t] = start_group<Format::BIAS>(broadcast(sums + (group * N + t) * 2));
#pragma GCC unroll 4
            for (int k = 0; k < Format::GROUP; k += 4, levels += 128, q += 4) {
                const I a = load(levels);
#pragma GCC unroll 12
                for (int t = 0; t < N; ++t) {
                    part[t] = dot_group(part[t], a, broadcast(q + t * SUPER));
                    pin(part[t]);
                }
            }
            const I scale = load(scales);
#pragma GCC unroll 12
            for (int t = 0; t < N; ++t) whole[t] = add_group(whole[t], part[t], scale);
        }
        const F step = load_bf16((const uint16_t*)p + 16 * h);
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) {
            float* to = sum + t * ROWS + 16 * h;
            store_float(to, fma(to_float(whole[t]), mul(step, set(x.scale[s * N + t])), load_float(to)));
        }
    }
}

#endif

// COUNT halves of the rows of an unpacked superblock, from FIRST on, times N tokens.
template <int N, int FIRST, int COUNT>
MOESAIC_INLINE void gemm_rows(const uint8_t* p, const uint8_t* panel, int width, const TokenTile& x, int64_t s, float* sum) {
    const int8_t* q = x.q + s * SUPER * N;
    I whole[COUNT][N];
    for (int h = 0; h < COUNT; ++h) {
        for (int t = 0; t < N; ++t) whole[h][t] = set(-BIAS * x.total[s * N + t]);
    }
    for (int k = 0; k < width; k += 4, panel += 128, q += 4) {
        I a[COUNT];
        for (int h = 0; h < COUNT; ++h) a[h] = load(panel + 64 * (FIRST + h));
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) {
            const I four = broadcast(q + t * SUPER);
            for (int h = 0; h < COUNT; ++h) {
                whole[h][t] = dot_biased(whole[h][t], a[h], four);
                pin(whole[h][t]);
            }
        }
    }
    for (int h = 0; h < COUNT; ++h) {
        const F step = load_bf16((const uint16_t*)p + 16 * (FIRST + h));
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) {
            float* to = sum + t * ROWS + 16 * (FIRST + h);
            store_float(to, fma(to_float(whole[h][t]), mul(step, set(x.scale[s * N + t])), load_float(to)));
        }
    }
}

template <int N>
__attribute__((noinline)) void gemm_tile_of(const uint8_t* p, const uint8_t* panel, int width, const TokenTile& x, int64_t s, float* sum) {
    if constexpr (2 * TILE <= ACCUMULATORS) {
        gemm_rows<N, 0, 2>(p, panel, width, x, s, sum);
    } else {
        gemm_rows<N, 0, 1>(p, panel, width, x, s, sum);
        gemm_rows<N, 1, 1>(p, panel, width, x, s, sum);
    }
}

inline void gemm_tile(const uint8_t* p, const uint8_t* panel, int width, const TokenTile& x, int64_t s, float* sum) {
    with_number<TILE>(x.n, [&](auto n) { gemm_tile_of<n.value>(p, panel, width, x, s, sum); });
}

#endif

// One unpacked superblock times a tile of tokens, whatever the panel holds.
template <class Format>
void gemm_panel(const uint8_t* p, const Unpacked& panel, int width, const TokenTile& x, int64_t s, float* sum) {
#if MOESAIC_WORDS
    if constexpr (HAS_LEVELS<Format>) {
        return with_number<TILE>(x.n, [&](auto n) { gemm_levels_of<Format, n.value>(p, panel, width, x, s, sum); });
    }
#endif
    gemm_tile(p, panel.bytes, width, x, s, sum);
}

constexpr int GEMV_TOKENS = ACCUMULATORS < 16 ? ACCUMULATORS / 2 : 8;  // with at most this many tokens, codes are multiplied without unpacking to v

// The matrix product of an integer format; csrc/plain.h has the same interface for bfloat16.
template <class Format>
struct Products {
    using Tokens = TokenTile;

    // Bytes of scratch memory that gemm() needs.
    static int64_t workspace_bytes(int64_t, int) { return 0; }

    static int64_t bytes(const Matrix& m) { return m.blocks() * block_bytes<Format>(m.columns); }

    // sums[block][token][row] = `count` blocks of rows times every token of the tiles, in the order of the tiles.
    static void gemm(const Matrix& m, int64_t first, int count, const Tokens* tiles, int tile_count, uint8_t*, float* sums) {
        const int64_t stride = block_bytes<Format>(m.columns);
        const uint8_t* block = m.data + first * stride;
        if (tile_count == 1 && tiles->n <= GEMV_TOKENS) {
            for (int b = 0; b < count; ++b, block += stride, sums += tiles->n * ROWS) {
                with_number<GEMV_TOKENS>(tiles->n, [&](auto n) { gemv<Format, n.value>(block, m.columns, *tiles, sums); });
            }
            return;
        }
#if MOESAIC_AMX
        const TileRegisters registers;
#endif
        Unpacked panel;
        int64_t tokens = 0;
        for (int i = 0; i < tile_count; ++i) tokens += tiles[i].n;
        memset(sums, 0, sizeof(float) * ROWS * tokens * count);
        int64_t s = 0;
        // The activations of one superblock stay in the cache while all blocks are multiplied with them.
        for (int64_t left = padded(m.columns); left > 0; left -= SUPER, ++s) {
            const int width = int(left < SUPER ? left : SUPER);
            float* sum = sums;
            for (int b = 0; b < count; ++b) {
                const uint8_t* p = block + b * stride;
                if constexpr (HAS_LEVELS<Format>) {
                    unpack_levels<Format>(p, width, panel);
                } else {
                    unpack_superblock<Format>(p, width, panel.bytes);
                }
                for (int i = 0; i < tile_count; sum += ROWS * tiles[i].n, ++i) gemm_panel<Format>(p, panel, width, tiles[i], s, sum);
            }
            block += super_bytes<Format>(width);
        }
    }
};

}  // namespace moesaic::MOESAIC_ISA
