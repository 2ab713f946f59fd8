// Matrix products of integer weights with activations: blocks of 32 rows times tiles of up to TILE tokens.
//
// Activations are rotated (csrc/rotation.h) and rounded to integers: x = scale * q, with one scale for each token and
// superblock of 256 columns. Weights are integer multiples v of a step within the same superblock. A product over a
// superblock is therefore step * scale * (an integer), and the integer is exact in every order of summation. All kernels
// add the superblocks of a row in order, in float32. One token or a hundred, one thread or many, AMX or portable C++ give
// the same bits.
//
// With fewer than 8 bits, v = s * level, with s = 4 .. 7 for each group of 16 columns. Kernels read a level as the
// unsigned byte level + Format::BIAS, and start each sum at -BIAS times the sum of q over the group.
#pragma once

#include "amx.h"
#include "formats/formats.def"
#include "kernels.h"
#include "rotation.h"
#include "vec.h"

namespace moesaic::MOESAIC_ISA {

constexpr int ROWS = 32, SUPER = 256, PAD = 64;
constexpr int SMALLEST_SCALE = 4, SCALE_MASK = 3;

constexpr int64_t padded(int64_t columns) { return (columns + PAD - 1) / PAD * PAD; }
constexpr int64_t supers(int64_t columns) { return (columns + SUPER - 1) / SUPER; }

// Byte offsets of the sections of a superblock, and its size.
template <class Format>
struct Sections {
    int scales, codes, end;

    constexpr explicit Sections(int width) {
        scales = 2 * ROWS;  // after the steps
        codes = scales + (Format::GROUP ? 4 * ROWS : 0);
        end = codes + ROWS * width * Format::BITS / 8;
    }
};

template <class Format>
constexpr int64_t super_bytes(int width) {
    return Sections<Format>(width).end;
}

template <class Format>
constexpr int64_t block_bytes(int64_t columns) {
    const int64_t whole = padded(columns) / SUPER, rest = padded(columns) % SUPER;
    return whole * super_bytes<Format>(SUPER) + (rest ? super_bytes<Format>(int(rest)) : 0);
}

// A weight matrix [out, columns] in memory.
struct Matrix {
    const uint8_t* data;
    int64_t out, columns;
    const Grouping* grouping;  // null for formats other than `grouped`

    int64_t blocks() const { return (out + ROWS - 1) / ROWS; }
};

// The rounded activations of n tokens.
struct TokenTile {
    int n;
    int8_t* q;       // [supers][n][256]
    float* scale;    // [supers][n]
    int32_t* total;  // [supers][n]: sum of q over a superblock
    int16_t* sums;   // [columns / 16][n][2]: sums of q over columns 4 i, 4 i + 1 of a group, and over 4 i + 2, 4 i + 3

    static int64_t bytes(int64_t columns, int n) {
        const int64_t s = supers(columns);
        return (n * (SUPER * s + 8 * s + padded(columns) / 16 * 4) + 63) / 64 * 64;
    }

    static TokenTile at(uint8_t* memory, int64_t columns, int n) {
        const int64_t s = supers(columns);
        TokenTile t;
        t.n = n;
        t.q = (int8_t*)memory;
        t.scale = (float*)(t.q + n * SUPER * s);
        t.total = (int32_t*)(t.scale + n * s);
        t.sums = (int16_t*)(t.total + n * s);
        return t;
    }

    // Round columns 256 s .. 256 s + width - 1 of token i. The caller pads x with zeros to a multiple of 64.
    void round(int i, int64_t s, int width, const float* x) const {
        const int vectors = int(padded(width)) / 16;
        F rotated[SUPER / 16];
        for (int k = 0; k < vectors; ++k) rotated[k] = load_float(x + 16 * k);
        rotate(rotated, vectors);
        I most = set(0);
        for (int k = 0; k < vectors; ++k) most = max(most, bit_and(bits(rotated[k]), set(0x7fffffff)));
        // Magnitudes are ordered like their bits and NaN is the largest, so NaN reaches the scale.
        const int32_t max_bits = largest(most);
        float magnitude;
        memcpy(&magnitude, &max_bits, 4);
        const F factor = set(magnitude > 0x1p-100f ? 127.0f / magnitude : 0.0f);  // the quotient must be finite
        scale[s * n + i] = magnitude / 127.0f;
        int32_t all = 0;
        int8_t* to = q + (s * n + i) * SUPER;
        for (int k = 0; k < vectors; ++k) {
            const I rounded = to_int(mul(rotated[k], factor));
            store_low_bytes(to + 16 * k, rounded);
            const int32_t sum = sum_of(rounded), first = sum_of(bit_and(rounded, load(FIRST_PAIRS)));
            int16_t* pair = sums + ((s * (SUPER / 16) + k) * n + i) * 2;
            pair[0] = int16_t(first);
            pair[1] = int16_t(sum - first);
            all += sum;
        }
        total[s * n + i] = all;
    }

  private:
    alignas(64) static constexpr int32_t FIRST_PAIRS[16] = {-1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0};
};

// Prefetch distance of weights in bytes. The hardware prefetcher stops at the end of a 4 KiB page.
constexpr int PREFETCH_BYTES = 2048;

// Pointers to the sections of a superblock.
template <class Format>
struct Super {
    const uint8_t *steps, *scales, *codes;

    MOESAIC_INLINE Super(const uint8_t* p, int width) {
        const Sections<Format> at(width);
        steps = p;
        scales = p + at.scales;
        codes = p + at.codes;
    }

    MOESAIC_INLINE F step(int half) const { return load_bf16((const uint16_t*)steps + 16 * half); }
    // The scales of 16 groups of each row, two bits each.
    MOESAIC_INLINE I scales_of(int half) const { return load(scales + 64 * half); }
};

// The columns whose codes are unpacked together, in whole groups, and the number of these groups.
template <class Format>
constexpr int SPAN = Format::RUN > Format::GROUP ? Format::RUN : Format::GROUP;

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

// whole[half][t] = the integer sums of a superblock of groups
template <class Format, int N>
MOESAIC_INLINE void add_whole_groups(const Super<Format>& super, int width, const TokenTile& x, int64_t s, I (&whole)[2][N]) {
    constexpr int RUN_BYTES = ROWS * Format::RUN * Format::BITS / 8, GROUPS = SPAN<Format> / Format::GROUP;
    const int8_t* q = x.q + s * SUPER * N;
    const int16_t* sums = x.sums + s * (SUPER / Format::GROUP) * N * 2;
    const uint8_t* codes = super.codes;
    const I packed[2] = {super.scales_of(0), super.scales_of(1)};
    for (int t = 0; t < N; ++t) whole[0][t] = whole[1][t] = set(0);
    for (int quarter = 0; quarter < width / 64; ++quarter) {
        const I four_scales[2] = {byte_of_words(packed[0], quarter), byte_of_words(packed[1], quarter)};
#pragma GCC unroll 4
        for (int k = 0; k < 64; k += SPAN<Format>) {
            I part[GROUPS][2][N];
#pragma GCC unroll 2
            for (int g = 0; g < GROUPS; ++g) {
#pragma GCC unroll 12
                for (int t = 0; t < N; ++t) {
                    const I pair = broadcast(sums + ((4 * quarter + k / Format::GROUP + g) * N + t) * 2);
                    part[g][0][t] = part[g][1][t] = start_group<Format::BIAS>(pair);
                }
            }
#pragma GCC unroll 2
            for (int run = 0; run < SPAN<Format>; run += Format::RUN, codes += RUN_BYTES) {
                for (int line = 0; line < RUN_BYTES; line += 64) prefetch(codes + PREFETCH_BYTES + line);
                Format::run(codes, [&](int j, I a, I b) __attribute__((always_inline)) {
                    const I low = Format::levels(a), high = Format::levels(b);
                    I(&to)[2][N] = part[(run + 4 * j) / Format::GROUP];
#pragma GCC unroll 12
                    for (int t = 0; t < N; ++t) {
                        const I four = broadcast(q + t * SUPER + 64 * quarter + k + run + 4 * j);
                        to[0][t] = dot_group(to[0][t], low, four);
                        to[1][t] = dot_group(to[1][t], high, four);
                    }
                });
            }
#pragma GCC unroll 2
            for (int g = 0; g < GROUPS; ++g) {
                const I low = scale_of<SMALLEST_SCALE, SCALE_MASK>(four_scales[0], k / Format::GROUP + g);
                const I high = scale_of<SMALLEST_SCALE, SCALE_MASK>(four_scales[1], k / Format::GROUP + g);
#pragma GCC unroll 12
                for (int t = 0; t < N; ++t) {
                    whole[0][t] = add_group(whole[0][t], part[g][0][t], low);
                    whole[1][t] = add_group(whole[1][t], part[g][1][t], high);
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
    } else {
        add_whole_groups<Format, N>(super, width, x, s, whole);
    }
#pragma GCC unroll 12
    for (int t = 0; t < N; ++t) {
        const F scale = set(x.scale[s * N + t]);
        for (int h = 0; h < 2; ++h) sum[h][t] = fma(to_float(whole[h][t]), mul(super.step(h), scale), sum[h][t]);
    }
}

#if MOESAIC_AMX
constexpr int PANEL_BIAS = 0;
#else
constexpr int PANEL_BIAS = BIAS;
#endif

// Unpack a superblock to bytes v + PANEL_BIAS: [width / 4][2 halves][16 rows][4].
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

// sum[row] += (integer sum of the superblock) * step * scale
MOESAIC_INLINE void add_scaled(float* sum, I low, I high, F low_step, F high_step, float scale) {
    const F factor = set(scale);
    store_float(sum, fma(to_float(low), mul(low_step, factor), load_float(sum)));
    store_float(sum + 16, fma(to_float(high), mul(high_step, factor), load_float(sum + 16)));
}

// One unpacked superblock times a tile of tokens: sum[t][row] += (integer sum of the superblock) * step * scale.
#if MOESAIC_AMX

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

template <int N>
__attribute__((noinline)) void gemm_tile_of(const uint8_t* p, const uint8_t* panel, int width, const TokenTile& x, int64_t s, float* sum) {
    const int8_t* q = x.q + s * SUPER * N;
    I whole[2][N];
#pragma GCC unroll 12
    for (int t = 0; t < N; ++t) whole[0][t] = whole[1][t] = set(-BIAS * x.total[s * N + t]);
    for (int k = 0; k < width; k += 4, panel += 128, q += 4) {
        const I a = load(panel), b = load(panel + 64);
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) {
            const I four = broadcast(q + t * SUPER);
            whole[0][t] = dot_biased(whole[0][t], a, four);
            whole[1][t] = dot_biased(whole[1][t], b, four);
        }
    }
    const F low = load_bf16((const uint16_t*)p), high = load_bf16((const uint16_t*)p + 16);
#pragma GCC unroll 12
    for (int t = 0; t < N; ++t, sum += ROWS) add_scaled(sum, whole[0][t], whole[1][t], low, high, x.scale[s * N + t]);
}

inline void gemm_tile(const uint8_t* p, const uint8_t* panel, int width, const TokenTile& x, int64_t s, float* sum) {
    with_number<TILE>(x.n, [&](auto n) { gemm_tile_of<n.value>(p, panel, width, x, s, sum); });
}

#endif

constexpr int GEMV_TOKENS = TILE < 8 ? TILE : 8;  // with at most this many tokens, codes are multiplied without unpacking to v

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
        alignas(64) uint8_t panel[SUPER * ROWS];
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
                unpack_superblock<Format>(p, width, panel);
                for (int i = 0; i < tile_count; sum += ROWS * tiles[i].n, ++i) gemm_tile(p, panel, width, tiles[i], s, sum);
            }
            block += super_bytes<Format>(width);
        }
    }
};

}  // namespace moesaic::MOESAIC_ISA
