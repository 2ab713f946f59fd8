// Matrix products of bfloat16 weights with activations rounded to bfloat16, accumulated in float32.
//
// Each instruction set has its own order of summation. The order does not depend on the number of tokens, so one
// token alone and a hundred together give the same bits.
#pragma once

#include "amx.h"
#include "attention.h"
#include "tiles.h"

namespace moesaic::MOESAIC_ISA {

constexpr int STEP = 32;  // columns of a vector or tile of bfloat16

constexpr int64_t whole_steps(int64_t columns) { return (columns + STEP - 1) / STEP * STEP; }

// The rounded activations of n tokens.
struct BFloat16Tile {
    int n;
    int64_t columns;
#if MOESAIC_AMX
    uint16_t* q;  // [columns / 32][sixteens of tokens][16 pairs of columns][16 tokens][2]
    static int padded_tokens(int n) { return (n + 15) / 16 * 16; }
#else
    uint16_t* q;  // [n][columns]
    static int padded_tokens(int n) { return n; }
#endif

    static int64_t bytes(int64_t columns, int n) { return (2 * whole_steps(columns) * padded_tokens(n) + 63) / 64 * 64; }

    static BFloat16Tile at(uint8_t* memory, int64_t columns, int n) { return {n, whole_steps(columns), (uint16_t*)memory}; }

    // Round columns 256 s .. 256 s + width - 1 of token i. The caller pads x with zeros to a multiple of 64.
    void round(int i, int64_t s, int width, const float* x) const {
#if MOESAIC_AMX
        const int64_t width_tokens = padded_tokens(n);
        for (int64_t k = 0; k < whole_steps(width); k += STEP) {
            uint32_t pairs[STEP / 2];
            store(pairs, (I)_mm512_cvtne2ps_pbh(load_float(x + k + 16), load_float(x + k)));
            uint32_t* to = (uint32_t*)(q + (s * SUPER + k) * width_tokens + i / 16 * 512) + i % 16;
            for (int pair = 0; pair < STEP / 2; ++pair) to[16 * pair] = pairs[pair];
        }
#else
        for (int64_t k = 0; k < whole_steps(width); ++k) q[i * columns + s * SUPER + k] = float_to_bf16(x[k]);
#endif
    }
};


// Copy columns `from` .. `from` + `width` - 1 of row `row`, with zeros beyond the matrix. `width` is a multiple of STEP.
inline void copy_row(const Matrix& m, int64_t row, int64_t from, int64_t width, uint16_t* to) {
    int64_t copied = row < m.out ? m.columns - from : 0;
    copied = copied < 0 ? 0 : copied < width ? copied : width;
    memcpy(to, m.data + 2 * (row * m.columns + from), 2 * copied);
    memset(to + copied, 0, 2 * (width - copied));
}

#if MOESAIC_AMX

constexpr int64_t CHUNK = 2048;                 // columns of a block that stay in the L2 cache while all tokens are multiplied
constexpr int64_t ROW_PREFETCH_BYTES = 256;     // prefetch distance in each row if there is a single tile of tokens

// A block of 32 rows: its address, the bytes between rows, and the values between one STEP and the next.
struct Block {
    const uint16_t* rows;
    int64_t stride, step;
};

// Prefetches the next columns of the same rows.
struct PrefetchAhead {
    const uint8_t* rows;
    int64_t stride;

    MOESAIC_INLINE void prefetch() {
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(rows + r * stride, 0, 2);
        rows += 2 * STEP;
    }
};

// Prefetches `width` bytes of each row of another block, in memory order, `count` cache lines per call.
struct PrefetchNextBlock {
    const uint8_t* line;
    int64_t stride, width;
    int count;  // cache lines per call
    int64_t done = 0;

    MOESAIC_INLINE void prefetch() {
        for (int i = 0; i < count; ++i) {
            __builtin_prefetch(line + done, 0, 2);
            done += 64;
            if (done >= width) done = 0, line += stride;
        }
    }
};

// partial [32 rows][32 tokens] += columns of the block times the tokens of a tile; `first_pass`: = instead of +=.
template <class Ahead>
MOESAIC_INLINE void add_products(Block block, const BFloat16Tile& x, int64_t from, int64_t width, float* partial, bool first_pass, Ahead& ahead) {
    const uint16_t *high = block.rows, *low = high + 16 * block.stride / 2;
    const uint16_t* q = x.q + from * BFloat16Tile::padded_tokens(x.n);
    const bool two = x.n > 16;
    compiler_barrier(block.rows);
    if (first_pass) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, partial, 128);
        _tile_loadd(1, partial + 512, 128);
        _tile_loadd(2, partial + 16, 128);
        _tile_loadd(3, partial + 528, 128);
    }
    for (int64_t k = 0; k < width; k += STEP, high += block.step, low += block.step, q += two ? 1024 : 512) {
        ahead.prefetch();
        _tile_loadd(4, high, block.stride);
        _tile_loadd(6, q, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, low, block.stride);
        _tile_dpbf16ps(1, 5, 6);
        if (two) {
            _tile_loadd(7, q + 512, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, partial, 128);
    _tile_stored(1, partial + 512, 128);
    _tile_stored(2, partial + 16, 128);
    _tile_stored(3, partial + 528, 128);
}

// sums [n][32 rows] = transpose of partial [32 rows][32 tokens]
inline void transpose_sums(const float* partial, int n, float* sums) {
    for (int begin = 0; begin < n; begin += 16) {
        for (int half = 0; half < 2; ++half) {
            F x[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) x[i] = load_float(partial + (16 * half + i) * 32 + begin);
            transpose(x);
            for (int i = 0; i < 16 && begin + i < n; ++i) store_float(sums + (begin + i) * ROWS + 16 * half, x[i]);
        }
    }
}

#else

#if MOESAIC_BF16
constexpr int ROWS_AT_ONCE = 4, TOKENS_AT_ONCE = 6;  // as many as the registers hold
#elif MOESAIC_AVX512
constexpr int ROWS_AT_ONCE = 4, TOKENS_AT_ONCE = 4;
#else
constexpr int ROWS_AT_ONCE = 2, TOKENS_AT_ONCE = 1;
#endif

// sums[t][row] = row times token t. `stride` is the number of values between rows.
template <int N>
__attribute__((noinline)) void dot_rows(const uint16_t* rows, int64_t stride, const uint16_t* q, int64_t columns, float* sums) {
    F sum[ROWS_AT_ONCE][N];
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
        for (int t = 0; t < N; ++t) sum[r][t] = zero();
    }
    for (int64_t k = 0; k < columns; k += STEP) {
        I w[ROWS_AT_ONCE];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS_AT_ONCE; ++r) w[r] = load(rows + r * stride + k);
#pragma GCC unroll 6
        for (int t = 0; t < N; ++t) {
            const I x = load(q + t * columns + k);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS_AT_ONCE; ++r) sum[r][t] = dot_bf16(sum[r][t], w[r], x);
        }
    }
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
        for (int t = 0; t < N; ++t) sums[t * ROWS + r] = sum_of(sum[r][t]);
    }
}

#endif

// The matrix product of the bfloat16 format; csrc/tiles.h has the same interface for integer formats.
template <>
struct Products<BFloat16> {
    using Tokens = BFloat16Tile;

    static int64_t bytes(const Matrix& m) { return 2 * m.out * m.columns; }

#if MOESAIC_AMX
    static int64_t workspace_bytes(int64_t columns, int tiles) { return 2 * ROWS * whole_steps(columns) + 4096 * tiles; }

    // Rows are read in place; only blocks that reach beyond the matrix are copied. A single tile of tokens passes over
    // all columns at once. Several tiles pass over one CHUNK of columns after another, so that it stays in the cache.
    static void gemm(const Matrix& m, int64_t first, int count, const Tokens* tiles, int tile_count, uint8_t* workspace, float* sums) {
        const TileRegisters registers;
        const bool single = tile_count == 1;
        const int64_t columns = whole_steps(m.columns), chunk = single ? columns : CHUNK, stride = 2 * m.columns;
        uint16_t* panel = (uint16_t*)workspace;
        float* const partials = (float*)(workspace + 2 * ROWS * columns);
        for (int64_t from = 0; from < columns; from += chunk) {
            const int64_t width = columns - from < chunk ? columns - from : chunk;
            float *partial = partials, *sum = sums;
            for (int64_t b = first; b < first + count; ++b) {
                const uint8_t* here = m.data + b * ROWS * stride + 2 * from;
                const bool whole = (b + 1) * ROWS <= m.out && from + width <= m.columns;
                const auto pass = [&](Block block, auto ahead) {
                    for (int i = 0; i < tile_count; ++i, partial += 1024) {
                        add_products(block, tiles[i], from, width, partial, from == 0, ahead);
                        if (from + width == columns) transpose_sums(partial, tiles[i].n, sum);
                        sum += tiles[i].n * ROWS;
                    }
                };
                const uint8_t* next = b + 1 < first + count ? here + ROWS * stride : here - (count - 1) * ROWS * stride + 2 * chunk;
                Block block = {(const uint16_t*)here, stride, STEP};
                if (!whole) {
                    block = {panel, 2 * width, STEP};
                    for (int r = 0; r < ROWS; ++r) copy_row(m, b * ROWS + r, from, width, panel + r * width);
                }
                if (single) {
                    pass(block, PrefetchAhead{here + ROW_PREFETCH_BYTES, stride});
                } else {
                    pass(block, PrefetchNextBlock{next, stride, 2 * width, (ROWS + tile_count - 1) / tile_count});
                }
            }
        }
    }
#else
    static int64_t workspace_bytes(int64_t columns, int) { return 2 * ROWS * whole_steps(columns); }

    static void gemm(const Matrix& m, int64_t first, int count, const Tokens* tiles, int tile_count, uint8_t* workspace, float* sums) {
        for (int64_t block = first; block < first + count; ++block) {
            const uint16_t* rows = (const uint16_t*)m.data + block * ROWS * m.columns;
            int64_t stride = m.columns;
            if ((block + 1) * ROWS > m.out || m.columns % STEP) {
                stride = whole_steps(m.columns);
                for (int r = 0; r < ROWS; ++r) copy_row(m, block * ROWS + r, 0, stride, (uint16_t*)workspace + r * stride);
                rows = (const uint16_t*)workspace;
            }
            for (int i = 0; i < tile_count; ++i) {
                const Tokens& x = tiles[i];
                for (int r = 0; r < ROWS; r += ROWS_AT_ONCE) {
                    for (int t = 0; t < x.n; t += TOKENS_AT_ONCE) {
                        const int n = x.n - t < TOKENS_AT_ONCE ? x.n - t : TOKENS_AT_ONCE;
                        with_number<TOKENS_AT_ONCE>(n, [&](auto n) {
                            dot_rows<n.value>(rows + r * stride, stride, x.q + t * x.columns, x.columns, sums + t * ROWS + r);
                        });
                    }
                }
                sums += x.n * ROWS;
            }
        }
    }
#endif
};

}  // namespace moesaic::MOESAIC_ISA
