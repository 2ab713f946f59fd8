// Attention of some queries over the keys and values of their own sequence, in float32.
//
// Few queries (decoding) take keys row by row; many (prefill) take them in turned tiles of 32, so
// that each lane is a key and no sum goes across lanes. Softmax is kept up to date tile by tile
// (arXiv:2205.14135). Heads that share keys and values (GQA) are rows of the same tile.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace moesaic::MOESAIC_ISA {

constexpr int KEYS = 32;
constexpr float NEVER = -1e30f;  // a score that is not seen; finite, so that no difference is a NaN

#if defined(__aarch64__)
typedef __fp16 Half;  // GCC knows _Float16 there from version 13 on only
#else
typedef _Float16 Half;
#endif

MOESAIC_INLINE float half_to_float(uint16_t x) {
    Half h;
    memcpy(&h, &x, 2);
    return float(h);
}

MOESAIC_INLINE uint16_t float_to_half(float f) {
    const Half h = Half(f);
    uint16_t x;
    memcpy(&x, &h, 2);
    return x;
}

MOESAIC_INLINE float read_one(const void* x, Type type, int64_t at) {
    switch (type) {
        case Type::float32: return ((const float*)x)[at];
        case Type::bfloat16: return bf16_to_float(((const uint16_t*)x)[at]);
        default: return half_to_float(((const uint16_t*)x)[at]);
    }
}

MOESAIC_INLINE void write_one(void* y, Type type, int64_t at, float f) {
    switch (type) {
        case Type::float32: ((float*)y)[at] = f; break;
        case Type::bfloat16: ((uint16_t*)y)[at] = float_to_bf16(f); break;
        default: ((uint16_t*)y)[at] = float_to_half(f);
    }
}

// Copy `width` values to float32 and fill up with zeros to `room`.
MOESAIC_INLINE void read(const void* x, Type type, int64_t at, int64_t width, float* to, int64_t room) {
    switch (type) {
        case Type::float32: memcpy(to, (const float*)x + at, sizeof(float) * width); break;
        case Type::bfloat16:
            for (int64_t k = 0; k < width; ++k) to[k] = bf16_to_float(((const uint16_t*)x)[at + k]);
            break;
        default:
            for (int64_t k = 0; k < width; ++k) to[k] = half_to_float(((const uint16_t*)x)[at + k]);
    }
    for (int64_t k = width; k < room; ++k) to[k] = 0.0f;
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
    float v[16];
    store_float(v, x);
    for (int step = 8; step; step /= 2) {
        for (int i = 0; i < step; ++i) v[i] += v[i + step];
    }
    return v[0];
}

MOESAIC_INLINE float largest_of(F x) {
    float v[16];
    store_float(v, x);
    for (int step = 8; step; step /= 2) {
        for (int i = 0; i < step; ++i) v[i] = v[i] > v[i + step] ? v[i] : v[i + step];
    }
    return v[0];
}

// Where key or value j of a sequence lies: in the blocks of its table, or row by row in this step's own.
struct Rows {
    const void* base;
    Type type;
    const int64_t* table;  // null: row `first` + j
    int64_t first, block, stride, offset;

    MOESAIC_INLINE int64_t at(int64_t j) const {
        return (table ? table[j / block] * block + j % block : first + j) * stride + offset;
    }
};

// The rows (query, head) of one task, with room for what softmax carries along.
struct Queries {
    int64_t rows, size, room;  // room: size rounded up to 32
    float* q;                  // [rows][room], scaled
    float* out;                // [rows][room]
    float *top, *total;        // [rows]: largest score so far, and the sum of exponentials below it
    float* scores;             // [rows][KEYS]
};

// Turn the scores of one tile into weights; what came before is scaled to the new largest score.
inline void soften(const Queries& x, int64_t r) {
    float* s = x.scores + r * KEYS;
    const F a = load_float(s), b = load_float(s + 16);
    const float before = x.top[r], most = largest_of(max(a, b)), top = most > before ? most : before;
    const F minus = set(-top);
    const F p = exp(add(a, minus)), q = exp(add(b, minus));
    store_float(s, p);
    store_float(s + 16, q);
    float scale[16];
    store_float(scale, exp(set(before - top)));
    x.total[r] = x.total[r] * scale[0] + sum_of(add(p, q));
    x.top[r] = top;
    if (scale[0] != 1.0f) {
        const F c = set(scale[0]);
        for (int64_t k = 0; k < x.room; k += 16) store_float(x.out + r * x.room + k, mul(load_float(x.out + r * x.room + k), c));
    }
}

// scores[r][j] = q[r] . turned[.][j]
template <int N>
__attribute__((noinline)) void score_rows(const Queries& x, int64_t r, const float* turned) {
    F sum[N][2];
    for (int i = 0; i < N; ++i) sum[i][0] = sum[i][1] = zero();
    const float* q = x.q + r * x.room;
    for (int64_t k = 0; k < x.size; ++k) {
        const F a = load_float(turned + k * KEYS), b = load_float(turned + k * KEYS + 16);
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            const F one = set(q[i * x.room + k]);
            sum[i][0] = fma(one, a, sum[i][0]);
            sum[i][1] = fma(one, b, sum[i][1]);
        }
    }
    for (int i = 0; i < N; ++i) {
        store_float(x.scores + (r + i) * KEYS, sum[i][0]);
        store_float(x.scores + (r + i) * KEYS + 16, sum[i][1]);
    }
}

// out[r] += sum over j of scores[r][j] * values[j]
template <int N>
__attribute__((noinline)) void add_values(const Queries& x, int64_t r, const float* values) {
    for (int64_t k = 0; k < x.room; k += 32) {
        F sum[N][2];
        float* out = x.out + r * x.room + k;
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            sum[i][0] = load_float(out + i * x.room);
            sum[i][1] = load_float(out + i * x.room + 16);
        }
        const float* p = x.scores + r * KEYS;
        for (int j = 0; j < KEYS; ++j) {
            const F a = load_float(values + j * x.room + k), b = load_float(values + j * x.room + k + 16);
#pragma GCC unroll 12
            for (int i = 0; i < N; ++i) {
                const F one = set(p[i * KEYS + j]);
                sum[i][0] = fma(one, a, sum[i][0]);
                sum[i][1] = fma(one, b, sum[i][1]);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            store_float(out + i * x.room, sum[i][0]);
            store_float(out + i * x.room + 16, sum[i][1]);
        }
    }
}

// Call body(n, r) for rows r .. r + n - 1 until all rows had their turn, TILE at a time and then one by one.
template <class Body>
MOESAIC_INLINE void in_tiles(int64_t rows, const Body& body) {
    int64_t r = 0;
    for (; r + TILE <= rows; r += TILE) body(Number<TILE>{}, r);
    for (; r < rows; ++r) body(Number<1>{}, r);
}

// 16 values from a row, as float32; `at` + 16 lies within the row.
MOESAIC_INLINE F load_as_float(const void* x, Type type, int64_t at) {
    if (type == Type::float32) return load_float((const float*)x + at);
    if (type == Type::bfloat16) return load_bf16((const uint16_t*)x + at);
    float v[16];
    for (int i = 0; i < 16; ++i) v[i] = half_to_float(((const uint16_t*)x)[at + i]);
    return load_float(v);
}

// A few rows, all of which see keys begin .. end - 1.
template <int N>
__attribute__((noinline)) void attend_few(const Queries& x, int64_t r, const Rows& keys, const Rows& values, int64_t begin, int64_t end) {
    const int64_t whole = x.size / 16 * 16;
    for (int64_t first = begin; first < end; first += KEYS) {
        const int count = int(end - first < KEYS ? end - first : KEYS);
        int64_t value_at[KEYS];
        for (int j = 0; j < count; ++j) {
            const int64_t at = keys.at(first + j);
            value_at[j] = values.at(first + j);
            F sum[N];
            for (int i = 0; i < N; ++i) sum[i] = zero();
            for (int64_t k = 0; k < whole; k += 16) {
                const F key = load_as_float(keys.base, keys.type, at + k);
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) sum[i] = fma(load_float(x.q + (r + i) * x.room + k), key, sum[i]);
            }
            for (int i = 0; i < N; ++i) {
                float score = sum_of(sum[i]);
                for (int64_t k = whole; k < x.size; ++k) {
                    score += x.q[(r + i) * x.room + k] * read_one(keys.base, keys.type, at + k);
                }
                x.scores[(r + i) * KEYS + j] = score;
            }
        }
        for (int i = 0; i < N; ++i) {
            for (int j = count; j < KEYS; ++j) x.scores[(r + i) * KEYS + j] = NEVER;
            soften(x, r + i);
        }
        const float* p = x.scores + r * KEYS;
        float* out = x.out + r * x.room;
        for (int64_t k = 0; k < whole; k += 16) {
            F sum[N];
            for (int i = 0; i < N; ++i) sum[i] = load_float(out + i * x.room + k);
            for (int j = 0; j < count; ++j) {
                const F value = load_as_float(values.base, values.type, value_at[j] + k);
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) sum[i] = fma(set(p[i * KEYS + j]), value, sum[i]);
            }
            for (int i = 0; i < N; ++i) store_float(out + i * x.room + k, sum[i]);
        }
        for (int64_t k = whole; k < x.size; ++k) {
            for (int j = 0; j < count; ++j) {
                const float value = read_one(values.base, values.type, value_at[j] + k);
                for (int i = 0; i < N; ++i) out[i * x.room + k] += p[i * KEYS + j] * value;
            }
        }
    }
}

// Rows of several queries: row r is a query at position positions[r / heads], which sees
// positions - window + 1 .. itself (all from 0 on if window is 0).
inline void attend_many(const Queries& x, int64_t heads, const int64_t* positions, int64_t window, const Rows& keys,
                        const Rows& values, float* turned, float* tile) {
    const int64_t end = positions[x.rows / heads - 1] + 1;
    int64_t begin = window ? positions[0] - window + 1 : 0;
    if (begin < 0) begin = 0;
    for (int64_t first = begin; first < end; first += KEYS) {
        const int count = int(end - first < KEYS ? end - first : KEYS);
        for (int j = 0; j < KEYS; ++j) {
            float row[1024];
            if (j < count) {
                read(keys.base, keys.type, keys.at(first + j), x.size, row, x.size);
                read(values.base, values.type, values.at(first + j), x.size, tile + j * x.room, x.room);
            } else {
                memset(row, 0, sizeof(float) * x.size);
                memset(tile + j * x.room, 0, sizeof(float) * x.room);
            }
            for (int64_t k = 0; k < x.size; ++k) turned[k * KEYS + j] = row[k];
        }
        in_tiles(x.rows, [&](auto n, int64_t r) { score_rows<n.value>(x, r, turned); });
        for (int64_t r = 0; r < x.rows; ++r) {
            const int64_t place = positions[r / heads];
            const int64_t from = window && place - window + 1 > first ? place - window + 1 - first : 0;
            const int64_t until = place + 1 - first < KEYS ? place + 1 - first : KEYS;
            float* s = x.scores + r * KEYS;
            for (int64_t j = 0; j < from && j < KEYS; ++j) s[j] = NEVER;
            for (int64_t j = until < 0 ? 0 : until; j < KEYS; ++j) s[j] = NEVER;
            soften(x, r);
        }
        in_tiles(x.rows, [&](auto n, int64_t r) { add_values<n.value>(x, r, tile); });
    }
}

}  // namespace moesaic::MOESAIC_ISA
