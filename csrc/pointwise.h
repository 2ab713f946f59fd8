// The ops without a packed weight, but for attention and sampling. Each value of each token has one order of operations,
// in float32, whatever the instruction set and the number of tokens.
#pragma once

#include <cmath>

#include "attention.h"
#include "kernels.h"
#include "pool.h"
#include "vec.h"

namespace moesaic::MOESAIC_ISA {

// silu(gate) * up
MOESAIC_INLINE F gated(F gate, F up) { return div(mul(gate, up), add(set(1.0f), exp(mul(gate, set(-1.0f))))); }

inline void rms_norm(const NormArgs& a) {
    parallel_for_or_inline(a.tokens, a.tokens * a.size * COST_PER_VALUE, [&](int64_t t, int worker) {
        const int64_t padded_size = padded_floats(a.size);
        float* x = (float*)scratch(16 + worker, sizeof(float) * padded_size);
        read(a.x, a.type, t * a.size, a.size, x, padded_size);
        F sum = zero();
        for (int64_t k = 0; k < padded_size; k += 16) sum = fma(load_float(x + k), load_float(x + k), sum);
        const float scale = 1.0f / __builtin_sqrtf(sum_of(sum) / float(a.size) + a.eps);
        for (int64_t k = 0; k < a.size; ++k) x[k] = x[k] * scale * a.weight[k];
        write(a.y, a.type, t * a.size, a.size, x);
    });
}

inline void rope(const RopeArgs& a) {
    const int64_t half = a.size / 2;
    parallel_for_or_inline(a.tokens, a.tokens * a.heads * a.size * COST_PER_VALUE, [&](int64_t t, int worker) {
        float* x = (float*)scratch(16 + worker, sizeof(float) * a.size * 2);
        float* y = x + a.size;
        const float *cos = a.cos + t * half, *sin = a.sin + t * half;
        for (int64_t h = 0; h < a.heads; ++h) {
            const int64_t at = (t * a.heads + h) * a.size;
            read(a.x, a.type, at, a.size, x, a.size);
            for (int64_t i = 0; i < half; ++i) {
                y[i] = x[i] * cos[i] - x[i + half] * sin[i];
                y[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
            }
            write(a.y, a.type, at, a.size, y);
        }
    });
}

inline void rotary(const RotaryArgs& a) {
    parallel_for_or_inline(a.tokens, a.tokens * a.size * COST_PER_VALUE, [&](int64_t t, int) {
        for (int64_t i = 0; i < a.size; ++i) {
            const float angle = float(a.positions[t]) * a.frequencies[i];
            a.cos[t * a.size + i] = std::cos(angle);
            a.sin[t * a.size + i] = std::sin(angle);
        }
    });
}

constexpr int64_t VALUES = 512;  // of a task of combine()

// y[i] = body(x[i], z[i]) for `count` values of a type
template <class Body>
void combine(Type type, int64_t count, const void* x, const void* z, void* y, const Body& body) {
    parallel_for_or_inline((count + VALUES - 1) / VALUES, count * COST_PER_VALUE, [&](int64_t task, int) {
        float a[VALUES], b[VALUES];
        const int64_t at = task * VALUES, width = count - at < VALUES ? count - at : VALUES, padded_size = padded_floats(width);
        read(x, type, at, width, a, padded_size);
        read(z, type, at, width, b, padded_size);
        for (int64_t k = 0; k < padded_size; k += 16) store_float(a + k, body(load_float(a + k), load_float(b + k)));
        write(y, type, at, width, a);
    });
}

inline void add(const AddArgs& a) {
    combine(a.type, a.count, a.a, a.b, a.y, [](F x, F z) __attribute__((always_inline)) { return add(x, z); });
}

inline void swiglu(const SwigluArgs& a) {
    combine(a.type, a.count, a.gate, a.up, a.y, [](F g, F u) __attribute__((always_inline)) { return gated(g, u); });
}

// The dot product of x, padded with zeros to a multiple of 16, and of a row that is not padded.
inline float dot_row(const float* x, const float* row, int64_t size) {
    F sum = zero();
    int64_t k = 0;
    for (; k + 16 <= size; k += 16) sum = fma(load_float(x + k), load_float(row + k), sum);
    if (k < size) {
        float rest[16];
        read(row, Type::float32, k, size - k, rest, 16);
        sum = fma(load_float(x + k), load_float(rest), sum);
    }
    return sum_of(sum);
}

// NaN is larger than all numbers, as torch.topk has it.
inline bool is_larger(float a, float b) { return a > b || (a != a && b == b); }

// ids and scores [choices] = the largest logits, and their softmax.
inline void choose_experts(const float* logits, const RouteArgs& a, int64_t* ids, float* scores) {
    float total = 0;
    for (int64_t j = 0; j < a.choices; ++j) {
        int64_t best = -1;
        for (int64_t e = 0; e < a.experts; ++e) {
            bool taken = false;
            for (int64_t i = 0; i < j; ++i) taken |= ids[i] == e;
            if (!taken && (best < 0 || is_larger(logits[e], logits[best]))) best = e;
        }
        ids[j] = best;
        scores[j] = exp_of(logits[best] - logits[ids[0]]);
        total += scores[j];
    }
    for (int64_t j = 0; j < a.choices; ++j) scores[j] /= total;
}

inline void route(const RouteArgs& a) {
    parallel_for_or_inline(a.tokens, a.tokens * a.size * (a.experts + COST_PER_VALUE), [&](int64_t t, int worker) {
        const int64_t padded_size = padded_floats(a.size);
        float* x = (float*)scratch(16 + worker, sizeof(float) * (padded_size + a.experts));
        float* logits = x + padded_size;
        read(a.x, a.type, t * a.size, a.size, x, padded_size);
        for (int64_t e = 0; e < a.experts; ++e) logits[e] = dot_row(x, a.weight + e * a.size, a.size);
        choose_experts(logits, a, a.ids + t * a.choices, a.scores + t * a.choices);
    });
}

inline void finite(const FiniteArgs& a) {
    parallel_for_or_inline(a.rows, a.rows * a.size, [&](int64_t r, int) {
        float x[VALUES];
        I most = set(0);
        for (int64_t at = 0; at < a.size; at += VALUES) {
            const int64_t width = a.size - at < VALUES ? a.size - at : VALUES, padded_size = padded_floats(width);
            read(a.x, a.type, r * a.size + at, width, x, padded_size);
            for (int64_t k = 0; k < padded_size; k += 16) most = max(most, bit_and(load(x + k), set(0x7fffffff)));
        }
        a.y[r] = largest(most) < 0x7f800000;  // magnitudes are ordered like their bits, and infinity comes after all numbers
    });
}

inline void argmax(const ArgmaxArgs& a) {
    parallel_for_or_inline(a.rows, a.rows * a.size, [&](int64_t r, int) {
        const float* x = a.x + r * a.size;
        const int64_t whole = a.size / 16 * 16;
        F most = set(x[0]);
        for (int64_t k = 0; k < whole; k += 16) most = max(most, load_float(x + k));
        float best = largest_of(most);
        for (int64_t k = whole; k < a.size; ++k) best = x[k] > best ? x[k] : best;
        int64_t first = 0;
        while (first + 1 < a.size && x[first] != best) ++first;
        a.ids[r] = first;
    });
}

}  // namespace moesaic::MOESAIC_ISA
