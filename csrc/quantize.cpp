// Quantizes weights to the integer formats: rotates them, and chooses the step, the scales and the codes that lose least.
//
// moesaic/formats/_tiles.py does the same in Python. Every row is independent, and all sums have a fixed order, so the
// bytes depend neither on the number of threads nor on the instruction set.

#include <cmath>

#include "packing.h"
#include "pool.h"
#include "tiles.h"

namespace moesaic::MOESAIC_ISA {

namespace {

constexpr int VECTORS = SUPER / 16;

// The positive levels of a format; the negative ones are their opposites.
template <class Format>
struct PositiveLevels {
    static constexpr int COUNT = 1 << (Format::BITS - 1);
    float at[COUNT];

    constexpr PositiveLevels() : at{} {
        for (int i = 0; i < COUNT; ++i) at[i] = float(Format::level(COUNT + i) - Format::BIAS);
    }
};
template <class Format>
constexpr PositiveLevels<Format> LEVELS;

MOESAIC_INLINE F absolute(F x) { return from_bits(bit_and(bits(x), set(0x7fffffff))); }

float sum_in_order(F x) {
    float lanes[16], sum = 0.0f;
    store_float(lanes, x);
    for (float lane : lanes) sum += lane;
    return sum;
}

// Return x divided by a step that is 0 only if x is; one division serves many weights.
MOESAIC_INLINE F quotient(F x, float step) { return mul(x, set(1.0f / (step > 0.0f ? step : 1.0f))); }

// Return the level nearest to a magnitude.
template <class Format>
MOESAIC_INLINE F nearest_level(F magnitude) {
    constexpr auto& values = LEVELS<Format>.at;
    F level = set(values[0]);
#pragma GCC unroll 8
    for (int i = 1; i < LEVELS<Format>.COUNT; ++i) {
        const I above = greater(magnitude, set((values[i - 1] + values[i]) / 2));
        level = add(level, from_bits(bit_and(above, bits(set(values[i] - values[i - 1])))));
    }
    return level;
}

// Return the codes of the levels nearest to x.
template <class Format>
MOESAIC_INLINE I nearest_codes(F x) {
    constexpr auto& values = LEVELS<Format>.at;
    constexpr int COUNT = LEVELS<Format>.COUNT;
    I index = set(0);
#pragma GCC unroll 8
    for (int i = 1; i < COUNT; ++i) {
        index = add(index, negate(greater(absolute(x), set((values[i - 1] + values[i]) / 2))));
    }
    // Codes are in the order of levels: COUNT + index for positive x, and COUNT - 1 - index otherwise.
    const I negative = bit_xor(greater(x, zero()), set(-1));
    return add(set(COUNT), bit_xor(index, negative));
}

// Write the step, the scales and the codes of a row of a superblock of rotated weights.
template <class Format>
void quantize_row(const QuantizeArgs& a, const F* rotated, int width, uint16_t& step, uint32_t& scales, uint8_t* codes) {
    const int vectors = width / 16;
    if constexpr (Format::GROUP == 0) {
        F most = zero();
        for (int i = 0; i < vectors; ++i) most = max(most, absolute(rotated[i]));
        step = float_to_bf16(largest_of(most) / 127.0f);
        const float unit = bf16_to_float(step);
        for (int i = 0; i < vectors; ++i) {
            const F v = max(set(-127.0f), min(set(127.0f), quotient(rotated[i], unit)));
            store_low_bytes(codes + 16 * i, add(to_int(v), set(128)));
        }
    } else {
        F squares = zero();
        for (int i = 0; i < vectors; ++i) squares = add(squares, mul(rotated[i], rotated[i]));
        const float usual = sqrtf(sum_in_order(squares) / float(width)) * a.usual_step;
        float least = INFINITY;
        I best = set(0);
        for (int64_t attempt = 0; attempt < a.tries; ++attempt) {
            const uint16_t rounded = float_to_bf16(usual * a.shares[attempt]);
            F error{};
            I scale = set(0);
            for (int s = 0; s <= SCALE_MASK; ++s) {
                const float unit = bf16_to_float(rounded) * float(SMALLEST_SCALE + s);
                F errors[VECTORS];
                for (int i = 0; i < VECTORS; ++i) errors[i] = zero();
                for (int i = 0; i < vectors; ++i) {
                    const F magnitude = absolute(rotated[i]);
                    const F lost = subtract(mul(nearest_level<Format>(quotient(magnitude, unit)), set(unit)), magnitude);
                    errors[i] = mul(lost, lost);
                }
                const F of_groups = sums_of(errors);
                if (s == 0) {
                    error = of_groups;
                } else {
                    const I less = greater(error, of_groups);
                    error = min(of_groups, error);
                    scale = bit_or(bit_and(less, set(s)), bit_and(bit_xor(less, set(-1)), scale));
                }
            }
            const float sum = sum_in_order(error);
            if (sum < least) least = sum, step = rounded, best = scale;
        }
        int32_t of_groups[16];
        store(of_groups, best);
        scales = 0;
        for (int i = 0; i < vectors; ++i) {
            scales |= uint32_t(of_groups[i]) << 2 * i;
            const float unit = bf16_to_float(step) * float(SMALLEST_SCALE + of_groups[i]);
            store_low_bytes(codes + 16 * i, nearest_codes<Format>(quotient(rotated[i], unit)));
        }
    }
}

// Return 16 weights as floats.
MOESAIC_INLINE F load_weights(Type type, const void* from, int64_t i) {
    switch (type) {
        case Type::bfloat16: return load_bf16((const uint16_t*)from + i);
        case Type::float16: return load_f16((const uint16_t*)from + i);
        default: return load_float((const float*)from + i);
    }
}

// Load the columns of a superblock of one row, with zeros beyond the matrix.
void load_row(const QuantizeArgs& a, int64_t row, int64_t begin, int width, F* to) {
    const int size = a.type == Type::float32 ? 4 : 2;
    for (int k = 0; k < width; k += 16) {
        const int64_t left = a.columns - begin - k, at = row * a.columns + begin + k;
        if (left >= 16) {
            to[k / 16] = load_weights(a.type, a.x, at);
        } else {
            alignas(64) uint8_t last[64] = {};
            if (left > 0) memcpy(last, (const uint8_t*)a.x + at * size, left * size);
            to[k / 16] = load_weights(a.type, last, 0);
        }
    }
}

// Divide a rotated superblock by the sizes of its Hadamard matrices.
void scale_down(F* x, int vectors) {
    int i = 0;
    for (int size = 16; size >= 4; size /= 2) {
        for (const int end = i + (vectors & size); i < end; ++i) x[i] = mul(x[i], set(1.0f / float(16 * size)));
    }
}

template <class Format>
void quantize_block(const QuantizeArgs& a, int64_t block) {
    uint8_t* out = a.weight + block * block_bytes<Format>(a.columns);
    const int64_t columns = padded(a.columns);
    for (int64_t begin = 0; begin < columns; begin += SUPER) {
        const int width = int(columns - begin < SUPER ? columns - begin : SUPER);
        const Sections<Format> sections(width);
        uint8_t codes[ROWS * SUPER];
        uint16_t steps[ROWS];
        uint32_t scales[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            F row[VECTORS];
            for (int i = 0; i < width / 16; ++i) row[i] = zero();
            if (block * ROWS + r < a.rows) load_row(a, block * ROWS + r, begin, width, row);
            rotate(row, width / 16);
            scale_down(row, width / 16);
            quantize_row<Format>(a, row, width, steps[r], scales[r], codes + r * SUPER);
        }
        memcpy(out, steps, sizeof steps);
        if (Format::GROUP) memcpy(out + sections.scales, scales, sizeof scales);
        write_planes(out + sections.codes, codes, width, Format::BITS);
        out += sections.end;
    }
}

}  // namespace

void quantize(const QuantizeArgs& a) {
    parallel_for((a.rows + ROWS - 1) / ROWS, [&](int64_t block, int) {
        switch (a.format) {
            case Format::int8: return quantize_block<Int8>(a, block);
            case Format::int4: return quantize_block<Int4>(a, block);
            case Format::int3: return quantize_block<Int3>(a, block);
            case Format::int2: return quantize_block<Int2>(a, block);
            default: return;
        }
    });
}

}  // namespace moesaic::MOESAIC_ISA
