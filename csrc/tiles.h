// Products of weights in integer formats and activations: blocks of 32 rows with up to TILE tokens at a time.
//
// Activations are rounded to whole numbers, x = scale * q with one scale for each token and 256
// columns. Weights are whole multiples of a step in the same 256 columns, so a product of the two is
// step * scale * (a whole number), and that number is exact in whatever order it is summed up. All
// kernels add up the superblocks of a row in order, in float32: one token alone and a hundred
// together, one thread and many, AMX and plain C++ give the same bits.
#pragma once

#include "amx.h"
#include "formats/int2.h"
#include "formats/int3.h"
#include "formats/int4.h"
#include "formats/int4_64.h"
#include "formats/int8.h"
#include "vec.h"

namespace moesaic::MOESAIC_ISA {

constexpr int ROWS = 32, SUPER = 256, PAD = 64;

constexpr int64_t padded(int64_t columns) { return (columns + PAD - 1) / PAD * PAD; }
constexpr int64_t supers(int64_t columns) { return (columns + SUPER - 1) / SUPER; }

// Where the sections of a superblock begin, and where it ends.
template <class Format>
struct Sections {
    int scales, offsets, codes, end;

    constexpr explicit Sections(int width) {
        const int groups = Format::GROUP ? width / Format::GROUP : 0;
        scales = 2 * ROWS;  // behind the steps
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

// A matrix of weights as it lies in memory, row after row, [out, columns].
struct Matrix {
    const uint8_t* data;
    int64_t out, columns;

    int64_t blocks() const { return (out + ROWS - 1) / ROWS; }
};

// The rounded activations of n tokens.
struct TokenTile {
    int n;
    int8_t* q;       // [supers][n][256]
    float* scale;    // [supers][n]
    int32_t* total;  // [supers][n]: sums of q over a superblock
    int16_t* sums;   // [columns / 64][n][2]: sums over 32 columns, two in a word
    int16_t* wide;   // [columns / 128, rounded up][n][2]: sums over 64

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

    // Round columns 256 s .. 256 s + width - 1 of token i; x holds them, zeros behind the last one up
    // to a multiple of 64.
    void round(int i, int64_t s, int width, const float* x) const {
        I most = set(0);
        for (int k = 0; k < padded(width); k += 16) most = max(most, bit_and(load(x + k), set(0x7fffffff)));
        // Sizes compare like their bits, and a NaN is above all of them: it comes out again.
        const int32_t top = largest(most);
        float size;
        memcpy(&size, &top, 4);
        const float inverse = size > 0.0f ? 127.0f / size : 0.0f;
        scale[s * n + i] = size / 127.0f;
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
            const int64_t place = (s * SUPER + k) / 32;
            sums[(place / 2 * n + i) * 2 + place % 2] = int16_t(sum);
            all += sum;
        }
        for (int k = 0; k < padded(width); k += 64) {
            const int64_t place = (s * SUPER + k) / 64;
            const int16_t* pair = sums + (place * n + i) * 2;
            wide[(place / 2 * n + i) * 2 + place % 2] = int16_t(pair[0] + pair[1]);
        }
        // The half of a last word that no columns belong to meets offsets of zero, but must be there.
        if (padded(width) % 128) {
            const int64_t place = (s * SUPER + padded(width)) / 64;
            wide[(place / 2 * n + i) * 2 + 1] = 0;
        }
        total[s * n + i] = all;
    }
};

// How far ahead weights are asked for, in bytes: hardware stops at the end of a page of 4 KiB.
constexpr int AHEAD = 2048;

// The numbers of a superblock, where its sections begin.
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

// sum[half][t] += (whole number of the superblock) * step * scale, for formats with scales.
template <class Format, int N>
MOESAIC_INLINE void few(const uint8_t* p, int width, const TokenTile& x, int64_t s, F (&sum)[2][N]) {
    const Super<Format> super(p, width);
    constexpr int RUN_BYTES = ROWS * Format::RUN * Format::BITS / 8;
    const int8_t* q = x.q + s * SUPER * N;
    const uint8_t* codes = super.codes;
    I whole[2][N];
    if constexpr (Format::GROUP == 0) {
        for (int t = 0; t < N; ++t) whole[0][t] = whole[1][t] = set(-BIAS * x.total[s * N + t]);
        for (int k = 0; k < width; k += Format::RUN, codes += RUN_BYTES) {
            prefetch(codes + AHEAD);
            prefetch(codes + AHEAD + 64);
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
                for (int line = 0; line < RUN_BYTES; line += 64) prefetch(codes + AHEAD + line);
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

// Unpack a superblock to v + PANEL_BIAS: [width / 4][2 halves][16 rows][4] bytes.
template <class Format>
__attribute__((noinline)) void expand(const uint8_t* p, int width, uint8_t* panel) {
    const Super<Format> super(p, width);
    constexpr int RUN_BYTES = ROWS * Format::RUN * Format::BITS / 8;
    const uint8_t* codes = super.codes;
    constexpr int GROUP = Format::GROUP ? Format::GROUP : PAD;
    for (int g = 0; g < width / GROUP; ++g) {
        I factor[2], offset[2];
        for (int h = 0; h < 2; ++h) {
            if constexpr (Format::GROUP != 0) {
                // A product of code and scale fits a byte, so one multiplication serves two of them.
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
            for (int line = 0; line < RUN_BYTES; line += 64) prefetch(codes + AHEAD + line);
            Format::run(codes, [&](int j, I a, I b) __attribute__((always_inline)) {
                if constexpr (Format::GROUP != 0) a = multiply_words(a, factor[0]), b = multiply_words(b, factor[1]);
                uint8_t* to = panel + ((g * GROUP + k) / 4 + j) * 128;
                store(to, subtract_bytes(a, offset[0]));
                store(to + 64, subtract_bytes(b, offset[1]));
            });
        }
    }
}

// sum[row] += (whole number of the superblock) * step * scale
MOESAIC_INLINE void add_scaled(float* sum, I low, I high, F low_step, F high_step, float scale) {
    const F factor = set(scale);
    store_float(sum, fma(to_float(low), mul(low_step, factor), load_float(sum)));
    store_float(sum + 16, fma(to_float(high), mul(high_step, factor), load_float(sum + 16)));
}

// sum[t][row] += (whole number of the superblock) * step * scale, from an unpacked superblock.
#if MOESAIC_AMX

inline void many(const uint8_t* p, const uint8_t* panel, int width, const TokenTile& x, int64_t s, float* sum) {
    // Tiles 0 to 3 add up, 4 and 5 are tokens, 6 and 7 are rows. With up to 16 tokens, the second pair of
    // sums takes every other step, as a product takes longer than the time to begin the next.
    alignas(64) int32_t whole[4][16][16];
    const int8_t* q = x.q + s * SUPER * x.n;
    const bool two = x.n > 16;
    settle(panel);
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
__attribute__((noinline)) void many_of(const uint8_t* p, const uint8_t* panel, int width, const TokenTile& x, int64_t s, float* sum) {
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

inline void many(const uint8_t* p, const uint8_t* panel, int width, const TokenTile& x, int64_t s, float* sum) {
    with_number<TILE>(x.n, [&](auto n) { many_of<n.value>(p, panel, width, x, s, sum); });
}

#endif

constexpr int FEW = TILE < 8 ? TILE : 8;  // up to here codes are used as they are, without unpacking to v

template <class Format, int N>
__attribute__((noinline)) void few_block(const uint8_t* block, int64_t columns, const TokenTile& x, float* sum) {
    F total[2][N];
    for (int t = 0; t < N; ++t) total[0][t] = total[1][t] = zero();
    int64_t s = 0;
    for (int64_t left = padded(columns); left > 0; left -= SUPER, ++s) {
        const int width = int(left < SUPER ? left : SUPER);
        few<Format, N>(block, width, x, s, total);
        block += super_bytes<Format>(width);
    }
    for (int t = 0; t < N; ++t) {
        store_float(sum + t * ROWS, total[0][t]);
        store_float(sum + t * ROWS + 16, total[1][t]);
    }
}

// What an integer format adds to the ops; csrc/plain.h has the same for bfloat16.
template <class Format>
struct Products {
    using Tokens = TokenTile;

    // Bytes that times() needs beside its sums.
    static int64_t room(int64_t, int) { return 0; }

    static int64_t bytes(const Matrix& m) { return m.blocks() * block_bytes<Format>(m.columns); }

    // sums[block][token][row] = `count` blocks of rows times every token of the tiles, in the tiles' order.
    static void times(const Matrix& m, int64_t first, int count, const Tokens* tiles, int tile_count, uint8_t*, float* sums) {
        const int64_t stride = block_bytes<Format>(m.columns);
        const uint8_t* block = m.data + first * stride;
        if (tile_count == 1 && tiles->n <= FEW) {
            for (int b = 0; b < count; ++b, block += stride, sums += tiles->n * ROWS) {
                with_number<FEW>(tiles->n, [&](auto n) { few_block<Format, n.value>(block, m.columns, *tiles, sums); });
            }
            return;
        }
#if MOESAIC_AMX
        const Tiles set_up;
#endif
        alignas(64) uint8_t panel[SUPER * ROWS];
        int64_t tokens = 0;
        for (int i = 0; i < tile_count; ++i) tokens += tiles[i].n;
        memset(sums, 0, sizeof(float) * ROWS * tokens * count);
        int64_t s = 0;
        // The tokens' part of a superblock stays in the cache for all blocks.
        for (int64_t left = padded(m.columns); left > 0; left -= SUPER, ++s) {
            const int width = int(left < SUPER ? left : SUPER);
            float* sum = sums;
            for (int b = 0; b < count; ++b) {
                const uint8_t* p = block + b * stride;
                expand<Format>(p, width, panel);
                for (int i = 0; i < tile_count; sum += ROWS * tiles[i].n, ++i) many(p, panel, width, tiles[i], s, sum);
            }
            block += super_bytes<Format>(width);
        }
    }
};

}  // namespace moesaic::MOESAIC_ISA
