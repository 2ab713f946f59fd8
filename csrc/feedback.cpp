// Error feedback (GPTQ, arXiv:2210.17323): 16 rows at once, one in each lane.
//
// Rows are independent, and all sums have a fixed order, so the bytes do not depend on the number of threads. The code
// is plain vectors of 16 floats; the compiler translates it for several instruction sets, and the loader chooses.

#include "feedback.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "packing.h"
#include "pool.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOESAIC_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#else
#define MOESAIC_CLONES
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are only passed to functions that are inlined

namespace moesaic {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));

namespace {

#define INLINE inline __attribute__((always_inline))

constexpr int ROWS = 32, LANES = 16, SUPER = 256, GROUP = 16;
constexpr int SCALES = 4, SMALLEST_SCALE = 4;
constexpr int AT_ONCE = 8;  // columns that get the errors of others at once

INLINE F set(float x) { return F{} + x; }

INLINE F rounded_to_bf16(F x) {
    const I bits = (I)x;
    return (F)((bits + 0x7fff + ((bits >> 16) & 1)) & int32_t(0xffff0000));
}

// A choice of codes for the weights of 16 rows, and its error.
template <int COLUMNS>
struct Choice {
    F loss, errors[COLUMNS];
    I codes[COLUMNS];
};

// Subtract the errors of `count` columns, times their rows of the factor, from the weights first .. last - 1.
INLINE void forward(F* x, const F* errors, int count, const float* factor, int64_t stride, int64_t first, int64_t last) {
    for (int64_t at = first; at < last; at += AT_ONCE) {  // widths are multiples of 16
        F sums[AT_ONCE];
        for (int i = 0; i < AT_ONCE; ++i) sums[i] = x[at + i];
        for (int j = 0; j < count; ++j) {
            const float* row = factor + j * stride + at;
            for (int i = 0; i < AT_ONCE; ++i) sums[i] -= errors[j] * row[i];
        }
        for (int i = 0; i < AT_ONCE; ++i) x[at + i] = sums[i];
    }
}

// Quantize a group with one unit for each row. `factor` is the group's part of the factor.
template <int HALF>
INLINE void quantize_group(const F* x, F unit, const float* levels, const float* factor, int64_t stride, Choice<GROUP>& to) {
    const F inverse = 1.0f / (unit > 0.0f ? unit : set(1.0f));
    F left[GROUP];
    for (int j = 0; j < GROUP; ++j) left[j] = x[j];
    to.loss = F{};
    for (int j = 0; j < GROUP; ++j) {
        const F target = left[j] * inverse, magnitude = target < 0.0f ? -target : target;
        F level = set(levels[0]);
        I index{};
        for (int i = 1; i < HALF; ++i) {
            const I above = magnitude > (levels[i - 1] + levels[i]) / 2;
            level += above ? set(levels[i] - levels[i - 1]) : F{};
            index -= above;
        }
        const I positive = target > 0.0f;
        to.codes[j] = positive ? HALF + index : HALF - 1 - index;
        const F error = (left[j] - (positive ? level : -level) * unit) / factor[j * stride + j];
        to.errors[j] = error;
        to.loss += error * error;
        for (int k = j + 1; k < GROUP; ++k) left[k] -= error * factor[j * stride + k];
    }
}

template <int COLUMNS>
INLINE void keep_better(I better, const Choice<COLUMNS>& one, Choice<COLUMNS>& best, int count) {
    best.loss = better ? one.loss : best.loss;
    for (int j = 0; j < count; ++j) {
        best.errors[j] = better ? one.errors[j] : best.errors[j];
        best.codes[j] = better ? one.codes[j] : best.codes[j];
    }
}

// The result for a superblock of 16 rows.
struct Super {
    Choice<SUPER> choice;
    F step;
    I scales[SUPER / GROUP];
};

template <int HALF>
INLINE void quantize_super(const F* x, int width, F step, const float* levels, const float* factor, int64_t stride, Super& to) {
    F left[SUPER];
    for (int j = 0; j < width; ++j) left[j] = x[j];
    to.step = step;
    to.choice.loss = F{};
    for (int begin = 0, g = 0; begin < width; begin += GROUP, ++g) {
        const float* inside = factor + begin * stride + begin;
        Choice<GROUP> best, one;
        to.scales[g] = I{};
        quantize_group<HALF>(left + begin, step * float(SMALLEST_SCALE), levels, inside, stride, best);
        for (int s = 1; s < SCALES; ++s) {
            quantize_group<HALF>(left + begin, step * float(SMALLEST_SCALE + s), levels, inside, stride, one);
            const I better = one.loss < best.loss;
            keep_better(better, one, best, GROUP);
            to.scales[g] = better ? I{} + s : to.scales[g];
        }
        to.choice.loss += best.loss;
        for (int j = 0; j < GROUP; ++j) {
            to.choice.errors[begin + j] = best.errors[j];
            to.choice.codes[begin + j] = best.codes[j];
        }
        forward(left, best.errors, GROUP, factor + begin * stride, stride, begin + GROUP, width);
    }
}

// Memory of a thread.
struct Memory {
    Super one, best;
    uint8_t codes[ROWS * SUPER];
    F x[];  // [2][columns]: a block of rows, 16 in each half
};

template <int HALF>
INLINE void quantize_block(const FeedBackArgs& a, int64_t block, Memory& m) {
    const int64_t columns = a.columns;
    const float* levels = a.levels + HALF;
    uint8_t* out = a.weight;
    for (int64_t begin = 0; begin < columns; begin += SUPER) {
        const int width = int(std::min<int64_t>(SUPER, columns - begin));
        out += block * (ROWS * (6 + width * a.bits / 8));
    }
    for (int half = 0; half < 2; ++half) {
        F* x = m.x + half * columns;
        for (int lane = 0; lane < LANES; ++lane) {
            const float* row = a.x + (block * ROWS + half * LANES + lane) * columns;
            for (int64_t j = 0; j < columns; ++j) x[j][lane] = row[j];
        }
    }
    for (int64_t begin = 0; begin < columns; begin += SUPER) {
        const int width = int(std::min<int64_t>(SUPER, columns - begin));
        const float* factor = a.factor + begin * columns + begin;
        uint16_t steps[ROWS];
        uint32_t scales[ROWS] = {};
        for (int half = 0; half < 2; ++half) {
            F* x = m.x + half * columns + begin;
            F squares{};
            for (int j = 0; j < width; ++j) squares += x[j] * x[j];
            F usual;
            for (int lane = 0; lane < LANES; ++lane) usual[lane] = sqrtf(squares[lane] / float(width)) * a.usual_step;
            for (int64_t t = 0; t < a.tries; ++t) {
                Super& to = t ? m.one : m.best;
                quantize_super<HALF>(x, width, rounded_to_bf16(usual * a.shares[t]), levels, factor, columns, to);
                if (!t) continue;
                const I better = m.one.choice.loss < m.best.choice.loss;
                keep_better(better, m.one.choice, m.best.choice, width);
                m.best.step = better ? m.one.step : m.best.step;
                for (int g = 0; g < width / GROUP; ++g) m.best.scales[g] = better ? m.one.scales[g] : m.best.scales[g];
            }
            forward(x - begin, m.best.choice.errors, width, a.factor + begin * columns, columns, begin + width, columns);
            for (int lane = 0; lane < LANES; ++lane) {
                const int row = half * LANES + lane;
                const float step = m.best.step[lane];
                memcpy(steps + row, (const uint8_t*)&step + 2, 2);
                for (int g = 0; g < width / GROUP; ++g) scales[row] |= uint32_t(m.best.scales[g][lane]) << 2 * g;
                for (int j = 0; j < width; ++j) m.codes[row * SUPER + j] = uint8_t(m.best.choice.codes[j][lane]);
            }
        }
        memcpy(out, steps, sizeof steps);
        memcpy(out + sizeof steps, scales, sizeof scales);
        out = write_planes(out + sizeof steps + sizeof scales, m.codes, width, a.bits);
    }
}

}  // namespace

MOESAIC_CLONES void feed_back_block2(const FeedBackArgs& a, int64_t block, Memory& m) { quantize_block<2>(a, block, m); }
MOESAIC_CLONES void feed_back_block3(const FeedBackArgs& a, int64_t block, Memory& m) { quantize_block<4>(a, block, m); }
MOESAIC_CLONES void feed_back_block4(const FeedBackArgs& a, int64_t block, Memory& m) { quantize_block<8>(a, block, m); }

void feed_back(const FeedBackArgs& a) {
    parallel_for(a.rows / ROWS, [&](int64_t block, int worker) {
        Memory& memory = *(Memory*)scratch(16 + worker, int64_t(sizeof(Memory)) + 2 * a.columns * int64_t(sizeof(F)));
        switch (a.bits) {
            case 2: return feed_back_block2(a, block, memory);
            case 3: return feed_back_block3(a, block, memory);
            default: return feed_back_block4(a, block, memory);
        }
    });
}

}  // namespace moesaic
