// Matrix products of codes with a floating-point scale for each group of columns, as the files of others hold them.
//
// A weight is scale * level - offset. Activations are rounded to x = scale * q, with one scale for each 32 columns. The
// dot product of levels and q within a group and 32 columns is an exact integer. It is multiplied by both scales and
// added in float32, in the order of the columns; offsets follow at the end of each superblock. The order does not
// depend on the number of tokens or on the instruction set, so the bits do not, either.
//
// The scales of a superblock are expanded before they are multiplied with any token, and so are its codes if there are
// several tokens (csrc/panel.h). So only few loops are compiled for each format.
#pragma once

#include "panel.h"

namespace moesaic::MOESAIC_ISA {

constexpr int STRIPE = 32;               // columns of activations that share a scale
constexpr int STRIPES = SUPER / STRIPE;  // in a superblock

// A rounded superblock of one token.
struct alignas(64) RoundedColumns {
    int8_t q[SUPER];
    float scale[STRIPES];
    int32_t sums[STRIPES];         // of q over 32 columns
    int32_t half_sums[GROUPS];     // of q over 16 columns
    float negative_sums[STRIPES];  // -scale times the sums, which offsets are multiplied by
    float negative_half_sums[GROUPS];

    // Round the 32 columns x of a stripe.
    void round(int stripe, const float* x) {
        const I a = load(x), b = load(x + 16), positive = set(0x7fffffff);
        // Magnitudes are ordered like their bits and NaN is the largest, so NaN reaches the scale.
        const int32_t most = largest(max(bit_and(a, positive), bit_and(b, positive)));
        float magnitude;
        memcpy(&magnitude, &most, 4);
        const F factor = set(magnitude > 0x1p-100f ? 127.0f / magnitude : 0.0f);  // the quotient must be finite
        const I low = to_int(mul(from_bits(a), factor)), high = to_int(mul(from_bits(b), factor));
        store_low_bytes(q + STRIPE * stripe, low);
        store_low_bytes(q + STRIPE * stripe + 16, high);
        const int32_t both[2] = {sum_of(low), sum_of(high)};
        scale[stripe] = magnitude / 127.0f;
        sums[stripe] = both[0] + both[1];
        negative_sums[stripe] = -scale[stripe] * float(sums[stripe]);
        for (int i = 0; i < 2; ++i) {
            half_sums[2 * stripe + i] = both[i];
            negative_half_sums[2 * stripe + i] = -scale[stripe] * float(both[i]);
        }
    }
};

// The rounded activations of n tokens.
struct GroupedTile {
    int n;
    RoundedColumns* columns;  // [supers][n]

    // A tile register reads 16 tokens, also where fewer are left.
    static int64_t bytes(int64_t columns, int n) { return int64_t(sizeof(RoundedColumns)) * (supers(columns) * n + 15); }
    static GroupedTile at(uint8_t* memory, int64_t, int n) { return {n, (RoundedColumns*)memory}; }

    // Round columns 256 s .. 256 s + width - 1 of token i. The caller pads x with zeros to a multiple of 64.
    void round(int i, int64_t s, int width, const float* x) const {
        RoundedColumns& to = columns[s * n + i];
        // Columns beyond the matrix must be zero: the padding of a weight may be wider than that of x.
        if (padded(width) < SUPER) memset(&to, 0, sizeof to);
        for (int k = 0; k < padded(width); k += STRIPE) to.round(k / STRIPE, x + k);
    }
};

// The bytes that are multiplied. Only plain AVX2 tells them apart: it has no signed bytes with a bias, and adds the
// products of a stripe in 16 bits if the bytes are at most 15.
enum Bytes { UNSIGNED, SIGNED, SMALL };

// acc + the dot products of four bytes with four q; in 16 bits if they are small
template <int KIND>
MOESAIC_INLINE I dot_bytes(I acc, I bytes, I q) {
    if constexpr (KIND == SIGNED) return dot_biased(acc, bytes, q);
    if constexpr (KIND == SMALL) return dot_group(acc, bytes, q);
    return dot(acc, bytes, q);
}

// The sum of the dot products of some columns: `first`, and what dot_bytes() added to start_dots().
template <int KIND>
MOESAIC_INLINE I start_dots(I first) { return KIND == SMALL ? set(0) : first; }
template <int KIND>
MOESAIC_INLINE I finish_dots(I dots, I first) { return KIND == SMALL ? dot_words(first, dots, set(0x00010001)) : dots; }

// -bias times the sum of q over the columns of part number `at`.
template <bool Sixteen>
MOESAIC_INLINE I start(const RoundedColumns& x, int at, int bias) {
    return set(-bias * (Sixteen ? x.half_sums[at] : x.sums[at]));
}

// The order of all sums of one token and one row of a superblock: for each stripe, the scaled dot products of its one
// or two groups, times the scale of the activations. For each stripe or half of it, offset times the sum of x. Both sums
// times their factors are then added to those of the previous superblocks.
template <bool Sixteen>
MOESAIC_INLINE F add_part(F scaled, I dots, F scale, int part) {
    return Sixteen && part ? fma(to_float(dots), scale, scaled) : mul(to_float(dots), scale);
}

// Sums of 32 rows and N tokens.
template <int N>
struct Sums {
    F v[2][N];

    MOESAIC_INLINE Sums() {
        for (int t = 0; t < N; ++t) v[0][t] = v[1][t] = zero();
    }
    // sum += factors times these sums
    MOESAIC_INLINE void add_to(float* sum, const float* factors) const {
        for (int h = 0; h < 2; ++h) {
            const F factor = load_float(factors + 16 * h);
            for (int t = 0; t < N; ++t) {
                float* to = sum + t * ROWS + 16 * h;
                store_float(to, fma(v[h][t], factor, load_float(to)));
            }
        }
    }
};

// sum[t] [32 rows] -= offsets times the sums of each of N tokens
template <bool Sixteen, int N>
MOESAIC_INLINE void subtract_offsets_of(const Panel& panel, const RoundedColumns* x, float* sum) {
    constexpr int COLUMNS = Sixteen ? 16 : STRIPE;
    Sums<N> sums;
    for (int i = 0; i < panel.width / COLUMNS; ++i) {
        const float* offsets = panel.offsets + (COLUMNS * i >> panel.shift) * ROWS;
        const F low = load_float(offsets), high = load_float(offsets + 16);
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) {
            const F total = set(Sixteen ? x[t].negative_half_sums[i] : x[t].negative_sums[i]);
            sums.v[0][t] = fma(low, total, sums.v[0][t]);
            sums.v[1][t] = fma(high, total, sums.v[1][t]);
        }
    }
    sums.add_to(sum, panel.offset_factors);
}

template <bool Sixteen>
__attribute__((noinline)) void subtract_offsets(const Panel& panel, const RoundedColumns* x, int n, float* sum) {
    int t = 0;
    for (; t + 4 <= n; t += 4) subtract_offsets_of<Sixteen, 4>(panel, x + t, sum + t * ROWS);
    for (; t < n; ++t) subtract_offsets_of<Sixteen, 1>(panel, x + t, sum + t * ROWS);
}

// sum [32 rows] += the superblock with these codes times one token. Codes are multiplied where they are unpacked, after
// each of TABLES conversions.
template <class Codes, int KIND, bool Sixteen, int TABLES, class Convert>
__attribute__((noinline)) void multiply_codes(const uint8_t* codes, const Panel& panel, const RoundedColumns& x, float* sum, const Convert* convert) {
    constexpr int PARTS = Sixteen ? 2 : 1, BYTES = ROWS * Codes::RUN * Codes::BITS / 8;
    Sums<TABLES> sums;
    for (int stripe = 0; stripe < panel.width / STRIPE; ++stripe) {
        I dots[PARTS][2][TABLES];
        for (int part = 0; part < PARTS; ++part) {
            for (int table = 0; table < TABLES; ++table) {
                const I first = start<Sixteen>(x, PARTS * stripe + part, panel.bias[table]);
                dots[part][0][table] = dots[part][1][table] = start_dots<KIND>(first);
            }
        }
#pragma GCC unroll 8
        for (int k = 0; k < STRIPE; k += Codes::RUN, codes += BYTES) {
            for (int line = 0; line < BYTES; line += 64) prefetch(codes + PREFETCH_BYTES + line);
            Codes::run(codes, [&](int j, I a, I b) __attribute__((always_inline)) {
                const I four = broadcast(x.q + STRIPE * stripe + k + 4 * j);
                const int part = Sixteen ? (k + 4 * j) / 16 : 0;
#pragma GCC unroll 2
                for (int table = 0; table < TABLES; ++table) {
                    I(&to)[2][TABLES] = dots[part];
                    to[0][table] = dot_bytes<KIND>(to[0][table], convert[table](a), four);
                    to[1][table] = dot_bytes<KIND>(to[1][table], convert[table](b), four);
                    pin(to[0][table]);
                    pin(to[1][table]);
                }
            });
        }
        const F scale = set(x.scale[stripe]);
        for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 2
            for (int table = 0; table < TABLES; ++table) {
                F scaled = zero();
#pragma GCC unroll 2
                for (int part = 0; part < PARTS; ++part) {
                    const float* scales = panel.scales_at(STRIPE / PARTS * (PARTS * stripe + part));
                    const I first = start<Sixteen>(x, PARTS * stripe + part, panel.bias[table]);
                    const I whole = finish_dots<KIND>(dots[part][h][table], first);
                    scaled = add_part<Sixteen>(scaled, whole, load_float(scales + 16 * h), part);
                }
                sums.v[h][table] = fma(scaled, scale, sums.v[h][table]);
            }
        }
    }
    for (int table = 0; table < TABLES; ++table) {
        Sums<1> own;
        own.v[0][0] = sums.v[0][table], own.v[1][0] = sums.v[1][table];
        own.add_to(sum, panel.factors[table]);
    }
    if (panel.has_offsets) subtract_offsets_of<Sixteen, 1>(panel, &x, sum);
}

constexpr int TOKENS = ACCUMULATORS / 2;  // tokens whose accumulators for 32 rows fit the vector registers

// sum[t] [32 rows] += panel times each of N tokens. `Sixteen` says that a group has 16 columns.
template <int KIND, bool Sixteen, int N>
__attribute__((noinline)) void multiply_panel_by(const Panel& panel, int table, const RoundedColumns* x, float* sum) {
    constexpr int PARTS = Sixteen ? 2 : 1, WIDTH = STRIPE / PARTS;
    const uint8_t* codes = panel.codes;
    Sums<N> sums;
    for (int stripe = 0; stripe < panel.width / STRIPE; ++stripe) {
        F scaled[2][N];
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; ++part) {
            const int at = PARTS * stripe + part;
            I dots[2][N];
#pragma GCC unroll 12
            for (int t = 0; t < N; ++t) dots[0][t] = dots[1][t] = start_dots<KIND>(start<Sixteen>(x[t], at, panel.bias[table]));
            for (int k = 0; k < WIDTH; k += 4, codes += 128) {
                const I a = load(codes), b = load(codes + 64);
#pragma GCC unroll 12
                for (int t = 0; t < N; ++t) {
                    const I four = broadcast(x[t].q + WIDTH * at + k);
                    dots[0][t] = dot_bytes<KIND>(dots[0][t], a, four);
                    dots[1][t] = dot_bytes<KIND>(dots[1][t], b, four);
                    pin(dots[0][t]);
                    pin(dots[1][t]);
                }
            }
            const float* scales = panel.scales_at(WIDTH * at);
            for (int h = 0; h < 2; ++h) {
                const F scale = load_float(scales + 16 * h);
#pragma GCC unroll 12
                for (int t = 0; t < N; ++t) {
                    const I whole = finish_dots<KIND>(dots[h][t], start<Sixteen>(x[t], at, panel.bias[table]));
                    scaled[h][t] = add_part<Sixteen>(scaled[h][t], whole, scale, part);
                    if (part + 1 < PARTS) continue;
                    sums.v[h][t] = fma(scaled[h][t], set(x[t].scale[stripe]), sums.v[h][t]);
                }
            }
        }
    }
    sums.add_to(sum, panel.factors[table]);
    if (panel.has_offsets) subtract_offsets<Sixteen>(panel, x, N, sum);
}

// Call body with two constants: the kind of the bytes, and whether groups have 16 columns.
template <class Body>
MOESAIC_INLINE void with_kind(const Grouping& g, int table, const Body& body) {
    const auto with_group = [&](auto kind) { g.group == 16 ? body(kind, Number<1>{}) : body(kind, Number<0>{}); };
    if constexpr (MOESAIC_WORDS) {
        if (g.bits <= 4 && !g.tables) return with_group(Number<SMALL>{});
    }
    if constexpr (BIAS == 0) {
        if (is_wide(g, table)) return with_group(Number<SIGNED>{});
    }
    with_group(Number<UNSIGNED>{});
}

// sum[t] [32 rows] += panel times each of n tokens
inline void multiply_panel(const Grouping& g, int table, const Panel& panel, const RoundedColumns* x, int n, float* sum) {
    with_kind(g, table, [&](auto kind, auto sixteen) {
        for (int t = 0; t < n; t += TOKENS) {
            with_number<TOKENS>(n - t < TOKENS ? n - t : TOKENS, [&](auto count) {
                multiply_panel_by<kind.value, sixteen.value, count.value>(panel, table, x + t, sum + t * ROWS);
            });
        }
    });
}

// sum [32 rows] += the superblock at p times one token
inline void multiply_one(const Grouping& g, const uint8_t* p, const Panel& panel, const RoundedColumns& x, float* sum) {
    const uint8_t* codes = p + GroupedLayout{g}.codes_at(panel.width);
    with_kind(g, 0, [&](auto bytes, auto sixteen) {
        if (g.tables == 2) {
            const Looked both[2] = {lookup_of(g, 0, panel.bias[0]), lookup_of(g, 1, panel.bias[1])};
            return multiply_codes<Int4, UNSIGNED, sixteen.value, 2>(codes, panel, x, sum, both);
        }
        with_codes<false>(g, 0, panel.bias[0], [&](auto kind, auto convert) {
            constexpr bool LOOKED = __is_same(decltype(convert), Looked), EIGHT = kind.BITS == 8;
            // Each type of codes is compiled with the kinds that it has.
            constexpr int KIND = BIAS == 0 && (EIGHT || (LOOKED && bytes.value == SIGNED)) ? SIGNED
                                 : MOESAIC_WORDS && !LOOKED && kind.BITS <= 4             ? SMALL
                                                                                          : UNSIGNED;
            multiply_codes<decltype(kind), KIND, sixteen.value, 1>(codes, panel, x, sum, &convert);
        });
    });
}

#if MOESAIC_AMX

constexpr int TILE_TOKENS = 16;  // with at least this many tokens, tile registers are faster than vectors

// Tile registers multiply stripes of levels. In groups of 16 columns, they would be half empty, and vectors are as fast.
// The levels of 8 bits with an offset do not fit a signed byte.
inline bool fits_tiles(const Grouping& g) { return g.group > 16 && (g.bits < 8 || g.offset == Grouping::NONE); }

using StripeDots = int32_t[2][32][16];  // [halves][tokens][rows]

// dots = `count` stripes of the panel times up to 32 tokens
MOESAIC_INLINE void multiply_stripes(const uint8_t* codes, const int8_t* q, int count, bool two, StripeDots* dots) {
    constexpr int STRIDE = sizeof(RoundedColumns);
    compiler_barrier(codes);
    for (int i = 0; i < count; ++i, codes += STRIPE * ROWS, q += STRIPE) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(4, q, STRIDE);
        _tile_loadd(6, codes, 128);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, codes + 64, 128);
        _tile_dpbssd(1, 4, 7);
        if (two) {
            _tile_zero(2);
            _tile_zero(3);
            _tile_loadd(5, q + 16 * STRIDE, STRIDE);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, dots[i][0][0], 64);
        _tile_stored(1, dots[i][1][0], 64);
        if (two) {
            _tile_stored(2, dots[i][0][16], 64);
            _tile_stored(3, dots[i][1][16], 64);
        }
    }
    compiler_barrier(dots);
}

// sum[t] += factor times the scaled products of `count` stripes
MOESAIC_INLINE void add_stripes(const StripeDots* dots, const Panel& panel, int table, int count, const RoundedColumns* x, int n, float* sum) {
    for (int h = 0; h < 2; ++h) {
        F scales[STRIPES];
        for (int i = 0; i < count; ++i) scales[i] = load_float(panel.scales_at(STRIPE * i) + 16 * h);
        const F factor = load_float(panel.factors[table] + 16 * h);
        for (int t = 0; t < n; ++t) {
            float* to = sum + t * ROWS + 16 * h;
            F total = zero();
#pragma GCC unroll 8
            for (int i = 0; i < count; ++i) {
                total = fma(mul(to_float(load(dots[i][h][t])), scales[i]), set(x[t].scale[i]), total);
            }
            store_float(to, fma(total, factor, load_float(to)));
        }
    }
}

// sum[t] [32 rows] += panel times each of n tokens: all products of a superblock are stored before they are scaled.
__attribute__((noinline)) inline void multiply_tiles(const Panel& panel, int table, const RoundedColumns* x, int n, float* sum) {
    alignas(64) StripeDots dots[STRIPES];
    const int count = panel.width / STRIPE;
    multiply_stripes(panel.codes, x->q, count, n > 16, dots);
    if (count == STRIPES) {
        add_stripes(dots, panel, table, STRIPES, x, n, sum);
    } else {
        add_stripes(dots, panel, table, count, x, n, sum);
    }
    if (panel.has_offsets) subtract_offsets<false>(panel, x, n, sum);
}

#else

inline void multiply_tiles(const Panel&, int, const RoundedColumns*, int, float*) {}

#endif

// The matrix product of the grouped format; csrc/tiles.h has the same interface for integer formats.
template <>
struct Products<Grouped> {
    using Tokens = GroupedTile;

    static int64_t workspace_bytes(int64_t, int) { return 0; }

    static int64_t bytes(const Matrix& m) { return m.blocks() * GroupedLayout{*m.grouping}.block_bytes(m.columns); }

    static void gemm(const Matrix& m, int64_t first, int count, const Tokens* tiles, int tile_count, uint8_t*, float* sums) {
        int64_t tokens = 0;
        for (int i = 0; i < tile_count; ++i) tokens += tiles[i].n;
        memset(sums, 0, sizeof(float) * ROWS * tokens * count);
#if MOESAIC_AMX
        if (tokens >= TILE_TOKENS && fits_tiles(*m.grouping)) {
            const TileRegisters registers(STRIPE);
            return gemm(m, first, count, tiles, tile_count, tokens, true, sums);
        }
#endif
        gemm(m, first, count, tiles, tile_count, tokens, false, sums);
    }

  private:
    static void gemm(const Matrix& m, int64_t first, int count, const Tokens* tiles, int tile_count, int64_t tokens, bool use_tiles, float* sums) {
        const Grouping& g = *m.grouping;
        const GroupedLayout layout{g};
        const int64_t stride = layout.block_bytes(m.columns), columns = layout.padded_columns(m.columns);
        const uint8_t* blocks = m.data + first * stride;
        Panel panel;
        panel.shift = __builtin_ctz(g.group);
        panel.has_offsets = g.offset != Grouping::NONE;
        for (int table = 0; table < 2; ++table) panel.bias[table] = use_tiles ? 0 : vector_bias(g, table);
        const auto superblock = [&](int b, int64_t s) {
            const int64_t left = columns - s * SUPER;
            panel.width = int(left < SUPER ? left : SUPER);
            const uint8_t* p = blocks + b * stride + s * layout.bytes(SUPER);
            expand_scales(g, p, panel);
            set_factors(g, p, panel);
            if (tokens == 1) return multiply_one(g, p, panel, tiles->columns[s], sums + b * ROWS);
            for (int table = 0; table < (g.tables ? g.tables : 1); ++table) {
                with_codes<MOESAIC_AMX>(g, table, panel.bias[table], [&](auto kind, auto convert) {
                    unpack_codes<decltype(kind)>(p + layout.codes_at(panel.width), panel.width, panel.codes, convert);
                });
                float* sum = sums + b * tokens * ROWS;
                for (int i = 0; i < tile_count; sum += ROWS * tiles[i].n, ++i) {
                    const RoundedColumns* x = tiles[i].columns + s * tiles[i].n;
                    if (use_tiles) {
                        multiply_tiles(panel, table, x, tiles[i].n, sum);
                    } else {
                        multiply_panel(g, table, panel, x, tiles[i].n, sum);
                    }
                }
            }
        };
        if (tile_count == 1) {  // reads the memory in its order
            for (int b = 0; b < count; ++b) {
                for (int64_t s = 0; s < supers(columns); ++s) superblock(b, s);
            }
        } else {  // the activations of a superblock stay in the cache while all blocks are multiplied with them
            for (int64_t s = 0; s < supers(columns); ++s) {
                for (int b = 0; b < count; ++b) superblock(b, s);
            }
        }
    }
};

}  // namespace moesaic::MOESAIC_ISA
