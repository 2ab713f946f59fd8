// Matrix products of integer weights with activations: blocks of 32 rows times tiles of up to TILE tokens.
//
// Activations are rounded to integers: x = scale * q, with one scale for each token and superblock of 256 columns.
// Weights are integer multiples of a step within the same superblock. A product over a superblock is therefore
// step * scale * (an integer), and the integer is exact in every order of summation. All kernels add the superblocks
// of a row in order, in float32. One token or a hundred, one thread or many, AMX or portable C++ give the same bits.
#pragma once

#include "amx.h"
#include "formats/formats.def"
#include "kernels.h"
#include "vec.h"

namespace moesaic::MOESAIC_ISA {

constexpr int ROWS = 32, SUPER = 256, PAD = 64;

constexpr int64_t padded(int64_t columns) { return (columns + PAD - 1) / PAD * PAD; }
constexpr int64_t supers(int64_t columns) { return (columns + SUPER - 1) / SUPER; }

// Byte offsets of the sections of a superblock, and its size.
template <class Format>
struct Sections {
    int scales, offsets, codes, end;

    constexpr explicit Sections(int width) {
        const int groups = Format::GROUP ? width / Format::GROUP : 0;
        scales = 2 * ROWS;  // after the steps
        offsets = scales + (groups * 16 + 63) / 64 * 64;
        codes = offsets + (groups * ROWS + 63) / 64 * 64;
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
    int16_t* sums;   // [columns / 64][n][2]: sums of q over 32 columns, in pairs
    int16_t* wide;   // [columns / 128, rounded up][n][2]: sums of q over 64 columns, in pairs

    static int64_t bytes(int64_t columns, int n) {
        const int64_t k = padded(columns), s = supers(columns);
        return (n * (SUPER * s + 8 * s + k / 64 * 4 + (k + 127) / 128 * 4) + 63) / 64 * 64;
    }

    static TokenTile at(uint8_t* memory, int64_t columns, int n) {
        const int64_t k = padded(columns), s = supers(columns);
        TokenTile t;
        t.n = n;
        t.q = (int8_t*)memory;
        t.scale = (float*)(t.q + n * SUPER * s);
        t.total = (int32_t*)(t.scale + n * s);
        t.sums = (int16_t*)(t.total + n * s);
        t.wide = t.sums + n * (k / 32);
        return t;
    }

    // Round columns 256 s .. 256 s + width - 1 of token i. The caller pads x with zeros to a multiple of 64.
    void round(int i, int64_t s, int width, const float* x) const {
        I most = set(0);
        for (int k = 0; k < padded(width); k += 16) most = max(most, bit_and(load(x + k), set(0x7fffffff)));
        // Magnitudes are ordered like their bits and NaN is the largest, so NaN reaches the scale.
        const int32_t max_bits = largest(most);
        float magnitude;
        memcpy(&magnitude, &max_bits, 4);
        const float inverse = magnitude > 0.0f ? 127.0f / magnitude : 0.0f;
        scale[s * n + i] = magnitude / 127.0f;
        int32_t all = 0;
        const F factor = set(inverse);
        int8_t* to = q + (s * n + i) * SUPER;
        for (int k = 0; k < padded(width); k += 32, to += 32) {
            int32_t q32[32], sum = 0;
            store(q32, to_int(mul(load_float(x + k), factor)));
            store(q32 + 16, to_int(mul(load_float(x + k + 16), factor)));
            for (int j = 0; j < 32; ++j) {
                to[j] = int8_t(q32[j]);
                sum += to[j];
            }
            const int64_t index = (s * SUPER + k) / 32;
            sums[(index / 2 * n + i) * 2 + index % 2] = int16_t(sum);
            all += sum;
        }
        for (int k = 0; k < padded(width); k += 64) {
            const int64_t index = (s * SUPER + k) / 64;
            const int16_t* pair = sums + (index * n + i) * 2;
            wide[(index / 2 * n + i) * 2 + index % 2] = int16_t(pair[0] + pair[1]);
        }
        // The second half of the last pair has no columns. Its offset is zero, but it must be initialized.
        if (padded(width) % 128) {
            const int64_t index = (s * SUPER + padded(width)) / 64;
            wide[(index / 2 * n + i) * 2 + 1] = 0;
        }
        total[s * n + i] = all;
    }
};

// Prefetch distance of weights in bytes. The hardware prefetcher stops at the end of a 4 KiB page.
constexpr int PREFETCH_BYTES = 2048;

// Pointers to the sections of a superblock.
template <class Format>
struct Super {
    const uint8_t *steps, *scales, *offsets, *codes;

    MOESAIC_INLINE Super(const uint8_t* p, int width) {
        const Sections<Format> at(width);
        steps = p;
        scales = p + at.scales;
        offsets = p + at.offsets;
        codes = p + at.codes;
    }

    MOESAIC_INLINE F step(int half) const { return load_bf16((const uint16_t*)steps + 16 * half); }
    MOESAIC_INLINE I scale(int group, int half) const {
        const I both = load_bytes(scales + 16 * group);
        return half ? shift_right<4>(both) : bit_and(both, set(15));
    }
    MOESAIC_INLINE I offset_pair(int pair, int half) const { return load_words_of_bytes(offsets + 64 * pair + 32 * half); }
};

// One superblock of a GEMV with N tokens: sum[half][t] += (integer sum of the superblock) * step * scale.
template <class Format, int N>
MOESAIC_INLINE void gemv_superblock(const uint8_t* p, int width, const TokenTile& x, int64_t s, F (&sum)[2][N]) {
    const Super<Format> super(p, width);
    constexpr int RUN_BYTES = ROWS * Format::RUN * Format::BITS / 8;
    const int8_t* q = x.q + s * SUPER * N;
    const uint8_t* codes = super.codes;
    I whole[2][N];
    if constexpr (Format::GROUP == 0) {
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
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) {
            const F scale = set(x.scale[s * N + t]);
            for (int h = 0; h < 2; ++h) sum[h][t] = fma(to_float(whole[h][t]), mul(super.step(h), scale), sum[h][t]);
        }
    } else {
        const int16_t* sums = Format::GROUP == 32 ? x.sums + s * (SUPER / 32) * N : x.wide + s * (SUPER / 64) * N;
        F scaled[2][N];
        for (int t = 0; t < N; ++t) {
            scaled[0][t] = scaled[1][t] = zero();
            whole[0][t] = whole[1][t] = set(0);
        }
        const int groups = width / Format::GROUP;
        for (int g = 0; g < groups; ++g) {
            if (g % 2 == 0) {
                const I low = super.offset_pair(g / 2, 0), high = super.offset_pair(g / 2, 1);
#pragma GCC unroll 12
                for (int t = 0; t < N; ++t) {
                    const I pair = broadcast(sums + (g / 2 * N + t) * 2);
                    whole[0][t] = dot_words(whole[0][t], low, pair);
                    whole[1][t] = dot_words(whole[1][t], high, pair);
                }
            }
            I part[2][N];
            for (int t = 0; t < N; ++t) part[0][t] = part[1][t] = set(0);
#pragma GCC unroll 4
            for (int k = 0; k < Format::GROUP; k += Format::RUN, codes += RUN_BYTES) {
                for (int line = 0; line < RUN_BYTES; line += 64) prefetch(codes + PREFETCH_BYTES + line);
                Format::run(codes, [&](int j, I a, I b) __attribute__((always_inline)) {
#pragma GCC unroll 12
                    for (int t = 0; t < N; ++t) {
                        const I four = broadcast(q + t * SUPER + g * Format::GROUP + k + 4 * j);
                        part[0][t] = dot(part[0][t], a, four);
                        part[1][t] = dot(part[1][t], b, four);
                    }
                });
            }
            const F low = to_float(super.scale(g, 0)), high = to_float(super.scale(g, 1));
#pragma GCC unroll 12
            for (int t = 0; t < N; ++t) {
                scaled[0][t] = fma(to_float(part[0][t]), low, scaled[0][t]);  // exact: below 2^24
                scaled[1][t] = fma(to_float(part[1][t]), high, scaled[1][t]);
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) {
            const F scale = set(x.scale[s * N + t]), factor = set(float(Format::FACTOR));
            for (int h = 0; h < 2; ++h) {
                const F v = fms(scaled[h][t], factor, to_float(whole[h][t]));
                sum[h][t] = fma(v, mul(super.step(h), scale), sum[h][t]);
            }
        }
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
    constexpr int GROUP = Format::GROUP ? Format::GROUP : PAD;
    for (int g = 0; g < width / GROUP; ++g) {
        I factor[2], offset[2];
        for (int h = 0; h < 2; ++h) {
            if constexpr (Format::GROUP != 0) {
                // The product of a code and a scale fits a byte, so one 16-bit multiplication computes two products.
                const I scale = super.scale(g, h), pair = super.offset_pair(g / 2, h);
                factor[h] = multiply_words(bit_or(scale, shift_left<16>(scale)), set(Format::FACTOR * 0x10001));
                const I own = bit_and(g % 2 ? shift_right<16>(pair) : pair, set(0xff));
                const I two = bit_or(own, shift_left<8>(own));
                offset[h] = subtract_bytes(bit_or(two, shift_left<16>(two)), set(int32_t(0x01010101u * PANEL_BIAS)));
            } else {
                offset[h] = set(int32_t(0x01010101u * (128 - PANEL_BIAS)));
            }
        }
        for (int k = 0; k < GROUP; k += Format::RUN, codes += RUN_BYTES) {
            for (int line = 0; line < RUN_BYTES; line += 64) prefetch(codes + PREFETCH_BYTES + line);
            Format::run(codes, [&](int j, I a, I b) __attribute__((always_inline)) {
                if constexpr (Format::GROUP != 0) a = multiply_words(a, factor[0]), b = multiply_words(b, factor[1]);
                uint8_t* to = panel + ((g * GROUP + k) / 4 + j) * 128;
                store(to, subtract_bytes(a, offset[0]));
                store(to + 64, subtract_bytes(b, offset[1]));
            });
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
