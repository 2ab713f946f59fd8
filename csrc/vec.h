// SIMD vectors of sixteen 32-bit lanes. A file that includes this header is compiled once for each instruction set:
// AVX-512 with VNNI, AVX-512 with BF16, AMX, AVX2, AVX2 with VNNI, NEON with dot products, and portable C++.
//
// Everything is in the namespace MOESAIC_ISA, so that the linker cannot mix code of two instruction sets. For the same
// reason, nothing here may call a template of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define MOESAIC_AVX512 1
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define MOESAIC_ISA amx
#define MOESAIC_AMX 1
#elif defined(__AVX512BF16__)
#define MOESAIC_ISA avx512bf16
#define MOESAIC_BF16 1
#else
#define MOESAIC_ISA avx512
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define MOESAIC_AVX2 1
#if defined(__AVXVNNI__)
#define MOESAIC_ISA avxvnni
#else
#define MOESAIC_ISA avx2
#define MOESAIC_WORDS 1
#endif
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define MOESAIC_ISA neon
#define MOESAIC_NEON 1
#else
#define MOESAIC_ISA portable
#endif

#ifndef MOESAIC_AMX
#define MOESAIC_AMX 0
#endif
#ifndef MOESAIC_AVX2
#define MOESAIC_AVX2 0  // there are 16 registers of 256 bits
#endif
#ifndef MOESAIC_NEON
#define MOESAIC_NEON 0
#endif
#ifndef MOESAIC_WORDS
#define MOESAIC_WORDS 0  // products of bytes are added in 16 bits: there is no instruction that adds four of them
#endif

#define MOESAIC_INLINE inline __attribute__((always_inline))

namespace moesaic::MOESAIC_ISA {

// An integer as a type, to select a template.
template <int N>
struct Number {
    static constexpr int value = N;
};

// Call body with n, 1 <= n <= MOST, as a Number.
template <int MOST, class Body>
MOESAIC_INLINE void with_number(int n, const Body& body) {
    if constexpr (MOST > 0) {
        if (n == MOST) {
            body(Number<MOST>{});
        } else {
            with_number<MOST - 1>(n, body);
        }
    }
}

MOESAIC_INLINE int32_t word(const void* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

MOESAIC_INLINE float bf16_to_float(uint16_t x) {
    const uint32_t wide = uint32_t(x) << 16;
    float f;
    memcpy(&f, &wide, 4);
    return f;
}

// Round to nearest, ties to even; NaN stays NaN.
MOESAIC_INLINE uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__aarch64__)
typedef __fp16 Half;  // On AArch64, GCC supports _Float16 only since version 13.
#else
typedef _Float16 Half;
#endif

MOESAIC_INLINE float half_to_float(uint16_t x) {
    Half h;
    memcpy(&h, &x, 2);
    return float(h);
}

MOESAIC_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace moesaic::MOESAIC_ISA

// Each of these files defines the types I and F of vectors, and the same functions over them.
#if MOESAIC_AVX512
#include "vec_avx512.h"
#elif MOESAIC_AVX2
#include "vec_avx2.h"
#elif MOESAIC_NEON
#include "vec_neon.h"
#else
#include "vec_portable.h"
#endif

namespace moesaic::MOESAIC_ISA {

#if !MOESAIC_AVX2 && !MOESAIC_NEON
MOESAIC_INLINE void pin(I&) {}  // there are enough registers
#endif

#if !MOESAIC_WORDS

// The sum of a group of 16 columns, whose weights are s * (u - BIAS_OF_LEVELS) with unsigned bytes u. `pair` holds two
// sums of q over the group, which together cover all columns.
template <int BIAS_OF_LEVELS>
MOESAIC_INLINE I start_group(I pair) { return dot_words(set(0), pair, set(int32_t(0x10001u * uint16_t(-BIAS_OF_LEVELS)))); }
MOESAIC_INLINE I dot_group(I acc, I u, I s) { return dot(acc, u, s); }
MOESAIC_INLINE I double_group(I x) { return add(x, x); }
MOESAIC_INLINE I join_groups(I x, I y) { return add(x, y); }
// Return byte number `index` of each word.
MOESAIC_INLINE I byte_of_words(I x, int index) { return bit_and(shift_right_by(x, 8 * index), set(255)); }
// Return scale number `group` of the four in each byte that byte_of_words returned, as a factor of add_group.
template <int SMALLEST, int MASK>
MOESAIC_INLINE I scale_of(I four, int group) { return bit_or(bit_and(shift_right_by(four, 2 * group), set(MASK)), set(SMALLEST)); }

#endif

// Return whole + the sum of a group times its scale; the sum fits 16 bits.
MOESAIC_INLINE I add_group(I whole, I part, I scale) { return dot_words(whole, part, scale); }

// Return acc + the sum of two products of bfloat16 numbers in each lane.
MOESAIC_INLINE F dot_bf16(F acc, I a, I b) {
#if MOESAIC_BF16
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    const I high = set(int32_t(0xffff0000));
    acc = fma(from_bits(shift_left<16>(a)), from_bits(shift_left<16>(b)), acc);
    return fma(from_bits(bit_and(a, high)), from_bits(bit_and(b, high)), acc);
#endif
}

// Sixteen bytes four times, as `lookup` needs them.
struct RepeatedBytes {
    uint8_t bytes[64];
};
constexpr RepeatedBytes repeated(const uint8_t (&table)[16]) {
    RepeatedBytes all{};
    for (int i = 0; i < 64; ++i) all.bytes[i] = table[i % 16];
    return all;
}

// Return e^x within 2 ulp; 0 below -87.3, infinity above 88.7, NaN for NaN.
MOESAIC_INLINE F exp(F x) {
    const F bounded = max(set(-104.0f), min(set(104.0f), x));  // min and max return the second argument if it is NaN
    const I n = to_int(mul(bounded, set(1.44269504f)));
    const F whole = to_float(n);
    F r = fma(whole, set(-0.693359375f), bounded);
    r = fma(whole, set(2.12194440e-4f), r);
    F p = set(1.9875691500e-4f);  // Cephes, expf
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set(1.0f)));
    // Multiply by 2^n in two steps, because n may be outside the exponent range of normal numbers.
    const I half = shift_right_signed<1>(n), rest = add(n, negate(half));
    const F first = from_bits(shift_left<23>(add(half, set(127)))), second = from_bits(shift_left<23>(add(rest, set(127))));
    return mul(mul(p, first), second);
}

}  // namespace moesaic::MOESAIC_ISA
