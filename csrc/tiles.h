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

#include "formats/formats.def"
#include "kernels.h"
#include "rotation.h"
#include "vec.h"

namespace moesaic::MOESAIC_ISA {

constexpr int ROWS = 32, SUPER = 256, PAD = 64;
constexpr int SMALLEST_SCALE = 4, SCALE_MASK = 3;

constexpr int64_t padded(int64_t columns) { return (columns + PAD - 1) / PAD * PAD; }
constexpr int64_t supers(int64_t columns) { return (columns + SUPER - 1) / SUPER; }

inline int width_of(int64_t columns, int64_t s) {
    const int64_t left = columns - s * SUPER;
    return int(left < SUPER ? left : SUPER);
}

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

}  // namespace moesaic::MOESAIC_ISA
