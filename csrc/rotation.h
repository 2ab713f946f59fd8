// The rotation of activations: random signs and a Hadamard transform, which spread outliers over all columns.
//
// A superblock of 256 columns, or each of its parts of 128 and 64 columns if it is narrower, is multiplied with its signs
// and then with the Hadamard matrix of ones and minus ones. Weights are stored rotated in the same way and divided by the
// size (moesaic/formats/_rotation.py), so products do not change. After the rotation, all columns have about the same
// magnitude, and rounding them with one scale loses little: QuaRot, arXiv:2404.00456.
#pragma once

#include "vec.h"

namespace moesaic::MOESAIC_ISA {

// Bit j of word i is set if column 32 i + j changes its sign: the bits of SHA-256 of "moesaic".
constexpr uint32_t SIGNS[8] = {0x47d705fd, 0x4859cab8, 0x247ffd7e, 0xfe63159b,
                               0x8accbde7, 0xb1499217, 0x0f6079bf, 0xfa073553};

// The sign bits of 256 columns.
struct SignBits {
    alignas(64) uint32_t at[256];

    constexpr SignBits() : at{} {
        for (int i = 0; i < 256; ++i) at[i] = (SIGNS[i / 32] >> i % 32 & 1) << 31;
    }
};
constexpr SignBits SIGN_BITS;

// In each pair of lanes D apart, return their sum in the first lane and their difference in the second.
template <int D>
MOESAIC_INLINE F butterfly(F x) {
    alignas(64) static constexpr auto SECOND = [] {
        struct { uint32_t at[16]; } masks{};
        for (int i = 0; i < 16; ++i) masks.at[i] = i & D ? 0x80000000u : 0;
        return masks;
    }();
    return add(swap_lanes<D>(x), from_bits(bit_xor(bits(x), load(SECOND.at))));
}

// Transform x [N vectors] by the Hadamard matrix of size 16 N.
template <int N>
MOESAIC_INLINE void transform(F* x) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) x[i] = butterfly<1>(butterfly<2>(butterfly<4>(butterfly<8>(x[i]))));
#pragma GCC unroll 4
    for (int d = 1; d < N; d *= 2) {
#pragma GCC unroll 8
        for (int pair = 0; pair < N / 2; ++pair) {
            const int i = pair / d * 2 * d + pair % d;
            const F a = x[i], b = x[i + d];
            x[i] = add(a, b);
            x[i + d] = subtract(a, b);
        }
    }
}

// Transform the columns of a superblock, 16 in each of `vectors` vectors: 4, 8, 12 or 16.
__attribute__((noinline)) inline void transform_superblock(F* x, int vectors) {
    if (vectors == 16) return transform<16>(x);
    if (vectors >= 8) transform<8>(x);
    if (vectors % 8) transform<4>(x + vectors - 4);
}

MOESAIC_INLINE void change_signs(F* x, int vectors) {
    for (int i = 0; i < vectors; ++i) x[i] = from_bits(bit_xor(bits(x[i]), load(SIGN_BITS.at + 16 * i)));
}

// Rotate the columns of a superblock of activations.
MOESAIC_INLINE void rotate(F* x, int vectors) {
    change_signs(x, vectors);
    transform_superblock(x, vectors);
}

// Restore the columns of a superblock of weights.
inline void restore(float* columns, int vectors) {
    F x[16];
    for (int i = 0; i < vectors; ++i) x[i] = load_float(columns + 16 * i);
    transform_superblock(x, vectors);
    change_signs(x, vectors);
    for (int i = 0; i < vectors; ++i) store_float(columns + 16 * i, x[i]);
}

}  // namespace moesaic::MOESAIC_ISA
