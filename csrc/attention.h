// Attention of queries over the keys and values of their own sequence, in float32 (FlashAttention, arXiv:2205.14135).
//
// Keys and values are processed in tiles of 64 positions. With few query rows (decoding), the kernel reads them
// in place; with many rows (prefill), it first converts the tile to float32. Query heads that share a key head (GQA)
// are rows of the same tile. An online softmax runs over the tiles of a chunk of 512 positions. The states of the
// chunks are then combined in order (split-K, as in Flash-Decoding). Tiles and chunks begin at multiples of 64 and
// 512 in every task, and every sum has a fixed order. A token therefore gets the same bits in a prompt and alone,
// with one thread and with many.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace moesaic::MOESAIC_ISA {

constexpr int TILE_KEYS = 64;               // positions of a tile
constexpr int64_t SOFTMAX_CHUNK = 512;      // positions that share one softmax state; a multiple of TILE_KEYS
constexpr int64_t IN_PLACE_ROWS = 8;        // with at most this many rows, keys and values are read in place
constexpr float MASKED = -1e30f;            // score of a masked key; finite, so that no difference is NaN
constexpr float MIN_MAGNITUDE = 0x1p-100f;  // heads whose largest magnitude is not above this are stored as zeros, so that 127 / x is finite

MOESAIC_INLINE uint16_t float_to_half(float f) {
    const Half h = Half(f);
    uint16_t x;
    memcpy(&x, &h, 2);
    return x;
}

constexpr int64_t padded_floats(int64_t count) { return (count + 15) / 16 * 16; }

// Convert `width` values to float32, then append zeros up to `padded_size` values.
MOESAIC_INLINE void read(const void* x, Type type, int64_t at, int64_t width, float* to, int64_t padded_size) {
    switch (type) {
        case Type::float32: memcpy(to, (const float*)x + at, sizeof(float) * width); break;
        case Type::bfloat16:
            for (int64_t k = 0; k < width; ++k) to[k] = bf16_to_float(((const uint16_t*)x)[at + k]);
            break;
        default:
            for (int64_t k = 0; k < width; ++k) to[k] = half_to_float(((const uint16_t*)x)[at + k]);
    }
    for (int64_t k = width; k < padded_size; ++k) to[k] = 0.0f;
}

MOESAIC_INLINE void write(void* y, Type type, int64_t at, int64_t width, const float* from) {
    switch (type) {
        case Type::float32: memcpy((float*)y + at, from, sizeof(float) * width); break;
        case Type::bfloat16:
            for (int64_t k = 0; k < width; ++k) ((uint16_t*)y)[at + k] = float_to_bf16(from[k]);
            break;
        default:
            for (int64_t k = 0; k < width; ++k) ((uint16_t*)y)[at + k] = float_to_half(from[k]);
    }
}

MOESAIC_INLINE float sum_of(F x) {
    F all[16];
    for (auto& vector : all) vector = zero();
    all[0] = x;
    float v[16];
    store_float(v, sums_of(all));
    return v[0];
}

MOESAIC_INLINE float exp_of(float x) {
    float v[16];
    store_float(v, exp(set(x)));
    return v[0];
}

// Round the key or value x of one head to int8: x = scale * to[.], to nearest, ties to even. The caller pads `x`
// with zeros to a multiple of 16. If a value is not finite, the scale is NaN.
inline void round_head(const float* x, int64_t size, int8_t* to, float* scale) {
    I most = set(0);
    for (int64_t k = 0; k < size; k += 16) most = max(most, bit_and(load(x + k), set(0x7fffffff)));
    const int32_t max_bits = largest(most);  // magnitudes are ordered like their bits; NaN and infinity are the largest
    float magnitude;
    memcpy(&magnitude, &max_bits, 4);
    if (max_bits >= 0x7f800000) {
        memset(to, 0, size);
        *scale = __builtin_nanf("");
        return;
    }
    *scale = magnitude / 127.0f;
    const F factor = set(magnitude > MIN_MAGNITUDE ? 127.0f / magnitude : 0.0f);
    for (int64_t k = 0; k < size; k += 16) {
        int32_t q[16];
        store(q, to_int(mul(load_float(x + k), factor)));
        for (int64_t i = 0; i < 16 && k + i < size; ++i) to[k + i] = int8_t(q[i]);
    }
}

// Convert `width` values of a cache to float32, then append zeros up to `padded_size`. The scale is not applied.
MOESAIC_INLINE void read_cached(const void* x, Type type, int64_t at, int64_t width, float* to, int64_t padded_size) {
    int64_t k = 0;
    if (type == Type::int8) {
        const int8_t* from = (const int8_t*)x + at;
        for (; k + 16 <= width; k += 16) store_float(to + k, to_float(load_signed_bytes(from + k)));
        for (; k < width; ++k) to[k] = float(from[k]);
        for (; k < padded_size; ++k) to[k] = 0.0f;
    } else if (type == Type::bfloat16) {
        const uint16_t* from = (const uint16_t*)x + at;
        for (; k + 16 <= width; k += 16) store_float(to + k, load_bf16(from + k));
        for (; k < width; ++k) to[k] = bf16_to_float(from[k]);
        for (; k < padded_size; ++k) to[k] = 0.0f;
    } else {
        read(x, type, at, width, to, padded_size);
    }
}

// Keys and values of consecutive key heads of one sequence, in the blocks of its table or, without a cache, in k and v.
struct KeyValues {
    const void *keys, *values;
    const float *key_scales, *value_scales;  // for int8
    Type type;
    const int64_t* table;  // null: position j is row `first` + j
    int64_t first, block, kv_heads, head, heads, size, padded_size;  // heads: counted from `head`

    // Set rows[j] to the cache row of position tile + j, for begin <= j < end.
    void find_rows(int64_t tile, int begin, int end, int64_t* rows) const {
        if (!table) {
            for (int j = begin; j < end; ++j) rows[j] = first + tile + j;
            return;
        }
        int64_t at = (tile + begin) / block, offset = (tile + begin) % block;
        for (int j = begin; j < end; ++j) {
            rows[j] = table[at] * block + offset;
            if (++offset == block) {
                ++at;
                offset = 0;
            }
        }
    }
};

// The positions at + first .. at + count - 1 with their cache rows, and the cache rows of the next tile.
struct KeyTile {
    int64_t at;
    int first, count, next_count;  // next_count: positions of the next tile that will be read
    int64_t rows[TILE_KEYS], next[TILE_KEYS];
};

// Keys or values of one tile, converted to float32.
struct FloatRows {
    const float* rows;
    int64_t padded_size;
    bool scaled;
    float scale[TILE_KEYS];

    MOESAIC_INLINE F load(int j, int64_t k) const { return load_float(rows + j * padded_size + k); }
    MOESAIC_INLINE void prefetch_next(int, int64_t) const {}
};

// Keys or values of one tile, read in place; a row is a multiple of 32 values.
template <Type TYPE>
struct InPlaceRows {
    static constexpr int BYTES = TYPE == Type::int8 ? 1 : TYPE == Type::float32 ? 4 : 2;
    static constexpr bool scaled = TYPE == Type::int8;
    const char *row[TILE_KEYS], *next[TILE_KEYS];  // each row, and the row of the next tile to prefetch with it
    float scale[TILE_KEYS];

    // Point at the rows of head i, and choose the share of the next tile that head i prefetches: the heads of a
    // position are adjacent in memory. Positions outside the tile's range point at a row inside it.
    void set(const void* all, const float* scales, const KeyValues& c, int64_t i, const KeyTile& tile) {
        const auto row_at = [&](int64_t at) { return (const char*)all + at * c.size * BYTES; };
        int64_t next_row = i * TILE_KEYS / c.heads, head = i * TILE_KEYS % c.heads;
        for (int j = 0; j < TILE_KEYS; ++j) {
            const int64_t at = tile.rows[j < tile.first || j >= tile.count ? tile.first : j] * c.kv_heads + c.head + i;
            row[j] = next[j] = row_at(at);
            if (scaled) scale[j] = scales[at];
            if (next_row < tile.next_count) {
                const int64_t next_at = tile.next[next_row] * c.kv_heads + c.head + head;
                next[j] = row_at(next_at);
                if (scaled) prefetch(scales + next_at);
            }
            if (++head == c.heads) {
                head = 0;
                ++next_row;
            }
        }
    }

    MOESAIC_INLINE F load(int j, int64_t k) const {
        const char* at = row[j] + k * BYTES;
        if (TYPE == Type::int8) return to_float(load_signed_bytes(at));
        return TYPE == Type::float32 ? load_float((const float*)at) : load_bf16((const uint16_t*)at);
    }
    MOESAIC_INLINE void prefetch_next(int j, int64_t size) const {
        for (int64_t at = 0; at < size * BYTES; at += 64) __builtin_prefetch(next[j] + at, 0, 2);
    }
};

// State of an online softmax over some rows.
struct SoftmaxState {
    float* out;                // [rows][padded_size], sums of e^(score - max_score) * value
    float *max_score, *total;  // [rows]: the largest score, and the sum of e^(score - max_score)

    static constexpr int64_t floats(int64_t rows, int64_t padded_size) { return rows * (padded_size + 2); }

    static SoftmaxState at(float* memory, int64_t rows, int64_t padded_size) {
        return {memory, memory + rows * padded_size, memory + rows * (padded_size + 1)};
    }

    void clear(int64_t rows, int64_t padded_size) const {
        memset(out, 0, sizeof(float) * rows * padded_size);
        memset(total, 0, sizeof(float) * rows);
        for (int64_t r = 0; r < rows; ++r) max_score[r] = MASKED;
    }

    // Combine with the state of the same rows over the positions that follow.
    void combine(const SoftmaxState& next, int64_t rows, int64_t padded_size) const {
        for (int64_t r = 0; r < rows; ++r) {
            const float most = max_score[r] > next.max_score[r] ? max_score[r] : next.max_score[r];
            const float own_scale = exp_of(max_score[r] - most), next_scale = exp_of(next.max_score[r] - most);
            max_score[r] = most;
            total[r] = total[r] * own_scale + next.total[r] * next_scale;
            for (int64_t k = r * padded_size; k < (r + 1) * padded_size; k += 16) {
                store_float(out + k, fma(load_float(next.out + k), set(next_scale), mul(load_float(out + k), set(own_scale))));
            }
        }
    }
};

// The rows (query, head) of one task, and its scratch memory.
struct QueryRows {
    int64_t rows, heads, padded_size;  // of one key head: row r is head r % heads of query r / heads; padded_size: head size, rounded up to 32
    const int64_t* positions;   // [queries], consecutive
    int64_t window;             // a query at position p sees p - window + 1 .. p; 0: 0 .. p
    float* q;                   // [key heads][rows][padded_size], scaled
    float* sums;                // [key heads][rows][16]: lanes of the sum of e^(score - max_score)
    float* scores;              // [rows][TILE_KEYS]
    float *keys, *values;       // [TILE_KEYS][padded_size]

    static constexpr int64_t floats(int64_t key_heads, int64_t rows, int64_t padded_size) {
        return key_heads * rows * (padded_size + 16) + rows * TILE_KEYS + 2 * TILE_KEYS * padded_size;
    }
};

// Turn the scores of row r in one tile into softmax weights. If the largest score rises, rescale the state.
inline void online_softmax(const QueryRows& x, const SoftmaxState& state, int64_t r, const KeyTile& tile, const float* key_scales,
                   const float* value_scales) {
    float* s = x.scores + r * TILE_KEYS;
    const int wide = int(padded_floats(tile.count));
    const int64_t last = x.positions[r / x.heads] - tile.at, window = x.window ? last - x.window + 1 : 0;
    const int begin = int(window < 0 ? 0 : window < TILE_KEYS ? window : TILE_KEYS);
    const int end = int(last + 1 < tile.count ? last + 1 : tile.count);
    if (begin >= end) {
        memset(s, 0, sizeof(float) * wide);
        return;
    }
    if (key_scales) {
        for (int j = 0; j < wide; j += 16) store_float(s + j, mul(load_float(s + j), load_float(key_scales + j)));
    }
    for (int j = 0; j < begin; ++j) s[j] = MASKED;
    for (int j = end; j < wide; ++j) s[j] = MASKED;
    F most = load_float(s);
    for (int j = 16; j < wide; j += 16) most = max(most, load_float(s + j));
    const float before = state.max_score[r], tile_max = largest_of(most), max_score = tile_max > before ? tile_max : before;
    F sum = load_float(x.sums + r * 16);
    if (max_score != before) {
        const F scale = exp(set(before - max_score));
        sum = mul(sum, scale);
        float* out = state.out + r * x.padded_size;
        for (int64_t k = 0; k < x.padded_size; k += 16) store_float(out + k, mul(load_float(out + k), scale));
        state.max_score[r] = max_score;
    }
    for (int j = 0; j < wide; j += 16) {
        const F p = exp(add(load_float(s + j), set(-max_score)));
        store_float(s + j, value_scales ? mul(p, load_float(value_scales + j)) : p);
        sum = add(sum, p);
    }
    store_float(x.sums + r * 16, sum);
}

// scores[r + i][j] = q[r + i] . keys[j] for i < N. Each lane sums every sixteenth product; then the lanes are summed.
template <int N, class Rows>
__attribute__((noinline)) void score(const QueryRows& x, int64_t r, const Rows& keys, int count) {
    constexpr int HELD = ACCUMULATORS >= 16 ? 16 : 4;  // sums that the registers hold
    constexpr int KEYS_PER_REDUCTION = 16 / N;         // keys whose lanes are summed together
    constexpr int KEYS_AT_ONCE = HELD / N;     // keys that are multiplied together
    const float* q = x.q + r * x.padded_size;
    for (int j = 0; j < count; j += KEYS_PER_REDUCTION) {
        F sums[16];
        if (r == 0) {
            for (int i = j; i < j + KEYS_PER_REDUCTION; ++i) keys.prefetch_next(i, x.padded_size);
        }
        for (int b = 0; b < KEYS_PER_REDUCTION; b += KEYS_AT_ONCE) {
            F sum[N][KEYS_AT_ONCE];
            for (auto& row : sum) {
                for (auto& lanes : row) lanes = zero();
            }
            for (int64_t k = 0; k < x.padded_size; k += 16) {
                F key[KEYS_AT_ONCE];
#pragma GCC unroll 16
                for (int i = 0; i < KEYS_AT_ONCE; ++i) key[i] = keys.load(j + b + i, k);
#pragma GCC unroll 4
                for (int i = 0; i < N; ++i) {
                    const F one = load_float(q + i * x.padded_size + k);
#pragma GCC unroll 16
                    for (int c = 0; c < KEYS_AT_ONCE; ++c) sum[i][c] = fma(one, key[c], sum[i][c]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) {
#pragma GCC unroll 16
                for (int c = 0; c < KEYS_AT_ONCE; ++c) sums[i * KEYS_PER_REDUCTION + b + c] = sum[i][c];
            }
        }
        float dots[16];
        store_float(dots, sums_of(sums));
        for (int i = 0; i < N; ++i) memcpy(x.scores + (r + i) * TILE_KEYS + j, dots + i * KEYS_PER_REDUCTION, sizeof(float) * KEYS_PER_REDUCTION);
    }
}

// out[r + i] += sum over j of scores[r + i][j] * values[j] for i < N, in the order of j
template <int N, class Rows>
__attribute__((noinline)) void add_values(const QueryRows& x, const SoftmaxState& state, int64_t r, const Rows& values, int count) {
    int countdown = 1, next_row = 0;
    for (int64_t k = 0; k < x.padded_size; k += 32) {
        F sum[N][2];
        float* out = state.out + r * x.padded_size + k;
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            sum[i][0] = load_float(out + i * x.padded_size);
            sum[i][1] = load_float(out + i * x.padded_size + 16);
        }
        const float* p = x.scores + r * TILE_KEYS;
        for (int j = 0; j < count; ++j) {
            const F a = values.load(j, k), b = values.load(j, k + 16);
            if (r == 0 && --countdown == 0) {  // spreads the prefetches evenly over all columns
                values.prefetch_next(next_row++, x.padded_size);
                countdown = int(x.padded_size / 32);
            }
#pragma GCC unroll 12
            for (int i = 0; i < N; ++i) {
                const F one = set(p[i * TILE_KEYS + j]);
                sum[i][0] = fma(one, a, sum[i][0]);
                sum[i][1] = fma(one, b, sum[i][1]);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            store_float(out + i * x.padded_size, sum[i][0]);
            store_float(out + i * x.padded_size + 16, sum[i][1]);
        }
    }
}

// Call body(n, r) for consecutive groups of rows r .. r + n - 1: n is MOST, then 4, 2 and 1 for the rest.
template <int MOST, class Body>
MOESAIC_INLINE void for_row_groups(int64_t rows, const Body& body, int64_t r = 0) {
    for (; r + MOST <= rows; r += MOST) body(Number<MOST>{}, r);
    if constexpr (MOST > 1) for_row_groups<(MOST > 4 ? 4 : MOST / 2)>(rows, body, r);
}

// Add one tile of keys and values to the state of every row.
template <class Rows>
void attend_tile(const QueryRows& x, const SoftmaxState& state, const Rows& keys, const Rows& values, const KeyTile& tile) {
    const float *key_scales = keys.scaled ? keys.scale : nullptr, *value_scales = values.scaled ? values.scale : nullptr;
    for_row_groups<4>(x.rows, [&](auto n, int64_t r) { score<n.value>(x, r, keys, tile.count); });
    for (int64_t r = 0; r < x.rows; ++r) online_softmax(x, state, r, tile, key_scales, value_scales);
    for_row_groups<ACCUMULATORS / 2>(x.rows, [&](auto n, int64_t r) { add_values<n.value>(x, state, r, values, tile.count); });
}

// Call body(i, x, tile) for each tile of the positions begin .. end - 1 and each key head i with its rows x.
// `until` is the end of the positions that the rows see; the tile after `end` is prefetched up to there.
template <class Body>
void for_each_tile(const QueryRows& all, const KeyValues& c, int64_t begin, int64_t end, int64_t until, const Body& body) {
    const auto within = [&](int64_t at) { return at >= until ? 0 : int(until - at < TILE_KEYS ? until - at : TILE_KEYS); };
    KeyTile tile;
    tile.first = int(begin % TILE_KEYS);
    tile.at = begin - tile.first;
    c.find_rows(tile.at, tile.first, within(tile.at), tile.next);
    for (; tile.at < end; tile.at += TILE_KEYS, tile.first = 0) {
        tile.count = within(tile.at);
        tile.next_count = within(tile.at + TILE_KEYS);
        memcpy(tile.rows, tile.next, sizeof tile.rows);
        c.find_rows(tile.at + TILE_KEYS, 0, tile.next_count, tile.next);
        for (int64_t i = 0; i < c.heads; ++i) {
            QueryRows x = all;
            x.q += i * x.rows * x.padded_size;
            x.sums += i * x.rows * 16;
            body(i, x, tile);
        }
    }
}

// Compute, for each key head, the softmax state of its rows over the positions begin .. end - 1, which lie within one
// chunk. Every position must be visible to one of the rows: the block of an invisible one may have been freed.
inline void attend_chunk(const QueryRows& all, const KeyValues& c, int64_t begin, int64_t end, int64_t until, float* states) {
    const auto state_of = [&](int64_t i) {
        return SoftmaxState::at(states + i * SoftmaxState::floats(all.rows, all.padded_size), all.rows, all.padded_size);
    };
    for (int64_t i = 0; i < c.heads; ++i) state_of(i).clear(all.rows, all.padded_size);
    memset(all.sums, 0, sizeof(float) * 16 * all.rows * c.heads);
    const auto in_place = [&](auto type) {
        InPlaceRows<Type(type.value)> keys, values;
        for_each_tile(all, c, begin, end, until, [&](int64_t i, const QueryRows& x, const KeyTile& tile) {
            keys.set(c.keys, c.key_scales, c, i, tile);
            values.set(c.values, c.value_scales, c, i, tile);
            attend_tile(x, state_of(i), keys, values, tile);
        });
    };
    const auto as_floats = [&] {
        const bool scaled = c.type == Type::int8;
        FloatRows keys = {all.keys, all.padded_size, scaled, {}}, values = {all.values, all.padded_size, scaled, {}};
        for_each_tile(all, c, begin, end, until, [&](int64_t i, const QueryRows& x, const KeyTile& tile) {
            const int64_t filled = padded_floats(tile.count);
            memset(x.keys, 0, sizeof(float) * x.padded_size * tile.first);
            memset(x.values, 0, sizeof(float) * x.padded_size * tile.first);
            for (int j = tile.first; j < tile.count; ++j) {
                const int64_t at = tile.rows[j] * c.kv_heads + c.head + i;
                read_cached(c.keys, c.type, at * c.size, c.size, x.keys + j * x.padded_size, x.padded_size);
                read_cached(c.values, c.type, at * c.size, c.size, x.values + j * x.padded_size, x.padded_size);
                if (scaled) {
                    keys.scale[j] = c.key_scales[at];
                    values.scale[j] = c.value_scales[at];
                }
            }
            memset(x.keys + tile.count * x.padded_size, 0, sizeof(float) * x.padded_size * (filled - tile.count));
            attend_tile(x, state_of(i), keys, values, tile);
        });
    };
    if (all.rows > IN_PLACE_ROWS || all.padded_size != c.size || c.type == Type::float16) {
        as_floats();
    } else if (c.type == Type::int8) {
        in_place(Number<int(Type::int8)>{});
    } else if (c.type == Type::bfloat16) {
        in_place(Number<int(Type::bfloat16)>{});
    } else {
        in_place(Number<int(Type::float32)>{});
    }
    for (int64_t i = 0; i < c.heads; ++i) {
        for (int64_t r = 0; r < all.rows; ++r) state_of(i).total[r] = sum_of(load_float(all.sums + (i * all.rows + r) * 16));
    }
}

}  // namespace moesaic::MOESAIC_ISA
