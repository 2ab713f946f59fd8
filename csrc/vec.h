// SIMD vectors of sixteen 32-bit lanes. A file that includes this header is compiled once for each instruction set:
// AVX-512 with VNNI, AVX-512 with BF16, AMX, AVX2, AVX2 with VNNI, and portable C++ (which the compiler maps to NEON and others).
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
#else
#define MOESAIC_ISA portable
#endif

#ifndef MOESAIC_AMX
#define MOESAIC_AMX 0
#endif
#ifndef MOESAIC_AVX2
#define MOESAIC_AVX2 0  // there are 16 registers of 256 bits
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

#if MOESAIC_AVX512

using I = __m512i;  // 16 int32, or 32 int16, or 64 bytes
using F = __m512;   // 16 float

constexpr int ACCUMULATORS = 24;  // vectors that the registers hold beside what is multiplied
constexpr int TILE = MOESAIC_AMX ? 32 : ACCUMULATORS / 2;  // tokens that are multiplied together, with 32 rows

MOESAIC_INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
MOESAIC_INLINE void store(void* p, I x) { _mm512_storeu_si512(p, x); }
MOESAIC_INLINE I set(int32_t x) { return _mm512_set1_epi32(x); }
MOESAIC_INLINE I broadcast(const void* p) { return _mm512_set1_epi32(word(p)); }
MOESAIC_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
MOESAIC_INLINE I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
template <int N>
MOESAIC_INLINE I shift_right(I a) { return _mm512_srli_epi32(a, N); }
template <int N>
MOESAIC_INLINE I shift_left(I a) { return _mm512_slli_epi32(a, N); }
template <int N>
MOESAIC_INLINE I shift_right_signed(I a) { return _mm512_srai_epi32(a, N); }
MOESAIC_INLINE I negate(I a) { return _mm512_sub_epi32(_mm512_setzero_si512(), a); }
MOESAIC_INLINE I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
MOESAIC_INLINE I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
MOESAIC_INLINE I multiply_words(I a, I b) { return _mm512_mullo_epi16(a, b); }
MOESAIC_INLINE I subtract_bytes(I a, I b) { return _mm512_sub_epi8(a, b); }
// Return entry i of a table of 16 bytes, which is repeated in each 16 bytes of `table`, for each byte i < 16.
MOESAIC_INLINE I lookup(I table, I index) { return _mm512_shuffle_epi8(table, index); }
// Return acc + the sum of four products in each lane: u has unsigned bytes, s signed bytes.
MOESAIC_INLINE I dot(I acc, I u, I s) { return _mm512_dpbusd_epi32(acc, u, s); }
// Weights v are passed to dot_biased as v + BIAS.
constexpr int BIAS = 128;
MOESAIC_INLINE I dot_biased(I acc, I w, I s) { return _mm512_dpbusd_epi32(acc, w, s); }
// Return acc + the sum of two products of signed 16-bit words in each lane.
MOESAIC_INLINE I dot_words(I acc, I a, I b) { return _mm512_dpwssd_epi32(acc, a, b); }
MOESAIC_INLINE I load_bytes(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
MOESAIC_INLINE I load_signed_bytes(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
MOESAIC_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
MOESAIC_INLINE I to_int(F x) { return _mm512_cvtps_epi32(x); }  // nearest, ties to even
MOESAIC_INLINE F zero() { return _mm512_setzero_ps(); }
MOESAIC_INLINE F set(float x) { return _mm512_set1_ps(x); }
MOESAIC_INLINE F load_float(const float* p) { return _mm512_loadu_ps(p); }
MOESAIC_INLINE void store_float(float* p, F x) { _mm512_storeu_ps(p, x); }
MOESAIC_INLINE F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
MOESAIC_INLINE F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
MOESAIC_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
MOESAIC_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
MOESAIC_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
MOESAIC_INLINE F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
MOESAIC_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
MOESAIC_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }  // b where one is NaN
MOESAIC_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
MOESAIC_INLINE I max(I a, I b) { return _mm512_max_epi32(a, b); }
MOESAIC_INLINE int32_t largest(I x) { return _mm512_reduce_max_epi32(x); }
MOESAIC_INLINE int32_t sum_of(I x) { return _mm512_reduce_add_epi32(x); }
MOESAIC_INLINE void store_low_bytes(void* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
MOESAIC_INLINE I bits(F a) { return _mm512_castps_si512(a); }
MOESAIC_INLINE F from_bits(I a) { return _mm512_castsi512_ps(a); }
MOESAIC_INLINE I greater(F a, F b) { return _mm512_movm_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ)); }  // -1 where a > b
MOESAIC_INLINE I shift_right_by(I a, int n) { return _mm512_srlv_epi32(a, _mm512_set1_epi32(n)); }
// Exchange lanes that are D apart: 8, 4, 2 or 1.
template <int D>
MOESAIC_INLINE F swap_lanes(F x) {
    if constexpr (D == 8) return _mm512_shuffle_f32x4(x, x, 0x4e);
    if constexpr (D == 4) return _mm512_shuffle_f32x4(x, x, 0xb1);
    if constexpr (D == 2) return _mm512_permute_ps(x, 0x4e);
    if constexpr (D == 1) return _mm512_permute_ps(x, 0xb1);
}

// Return in lane i the sum of all lanes of x[i]: lanes 8 apart are added first, then 4, 2 and 1 apart.
MOESAIC_INLINE F sums_of(const F* x) {
    F eights[8], fours[4];
    for (int i = 0; i < 8; ++i) {
        const F a = x[i % 4 + i / 4 * 8], b = x[i % 4 + i / 4 * 8 + 4];
        eights[i] = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; ++i) {
        fours[i] = add(_mm512_shuffle_f32x4(eights[i], eights[i + 4], 0x88), _mm512_shuffle_f32x4(eights[i], eights[i + 4], 0xdd));
    }
    const F a = add(_mm512_shuffle_ps(fours[0], fours[1], 0x44), _mm512_shuffle_ps(fours[0], fours[1], 0xee));
    const F b = add(_mm512_shuffle_ps(fours[2], fours[3], 0x44), _mm512_shuffle_ps(fours[2], fours[3], 0xee));
    return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
MOESAIC_INLINE float largest_of(F x) { return _mm512_reduce_max_ps(x); }

#elif MOESAIC_AVX2

struct I { __m256i a, b; };
struct F { __m256 a, b; };

constexpr int ACCUMULATORS = 6;
constexpr int TILE = MOESAIC_WORDS ? 4 : ACCUMULATORS;  // with 16 rows

MOESAIC_INLINE I load(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
MOESAIC_INLINE void store(void* p, I x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
MOESAIC_INLINE I set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
MOESAIC_INLINE I broadcast(const void* p) { return set(word(p)); }
#define MOESAIC_BOTH(name, function) \
    MOESAIC_INLINE I name(I x, I y) { return {function(x.a, y.a), function(x.b, y.b)}; }
MOESAIC_BOTH(add, _mm256_add_epi32)
MOESAIC_BOTH(bit_and, _mm256_and_si256)
MOESAIC_BOTH(bit_or, _mm256_or_si256)
MOESAIC_BOTH(bit_xor, _mm256_xor_si256)
MOESAIC_BOTH(multiply_words, _mm256_mullo_epi16)
MOESAIC_BOTH(subtract_bytes, _mm256_sub_epi8)
MOESAIC_BOTH(max, _mm256_max_epi32)
#undef MOESAIC_BOTH
MOESAIC_INLINE I lookup(I table, I index) {
    return {_mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b)};
}
template <int N>
MOESAIC_INLINE I shift_right(I x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
MOESAIC_INLINE I shift_right_by(I x, int n) {
    return {_mm256_srl_epi32(x.a, _mm_cvtsi32_si128(n)), _mm256_srl_epi32(x.b, _mm_cvtsi32_si128(n))};
}
template <int N>
MOESAIC_INLINE I shift_left(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N>
MOESAIC_INLINE I shift_right_signed(I x) { return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)}; }
MOESAIC_INLINE I negate(I x) {
    return {_mm256_sub_epi32(_mm256_setzero_si256(), x.a), _mm256_sub_epi32(_mm256_setzero_si256(), x.b)};
}
#if MOESAIC_WORDS
// u must be below 128, so that the sum of two products fits 16 bits.
MOESAIC_INLINE __m256i dot(__m256i acc, __m256i u, __m256i s) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
// Here weights are passed as v itself, and the sign of v moves to the activation.
constexpr int BIAS = 0;
MOESAIC_INLINE __m256i dot_biased(__m256i acc, __m256i v, __m256i s) {
    return dot(acc, _mm256_abs_epi8(v), _mm256_sign_epi8(s, v));
}
#else
MOESAIC_INLINE __m256i dot(__m256i acc, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
constexpr int BIAS = 128;
MOESAIC_INLINE __m256i dot_biased(__m256i acc, __m256i w, __m256i s) { return dot(acc, w, s); }
#endif
MOESAIC_INLINE I dot(I acc, I u, I s) { return {dot(acc.a, u.a, s.a), dot(acc.b, u.b, s.b)}; }
MOESAIC_INLINE I dot_biased(I acc, I v, I s) { return {dot_biased(acc.a, v.a, s.a), dot_biased(acc.b, v.b, s.b)}; }
MOESAIC_INLINE I dot_words(I acc, I x, I y) {
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(x.b, y.b))};
}
// Keep the compiler from adding in another order: it would need more registers than there are.
MOESAIC_INLINE void pin(I& x) { asm("" : "+x"(x.a), "+x"(x.b)); }
MOESAIC_INLINE I load_bytes(const void* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)p + 8)))};
}
MOESAIC_INLINE I load_signed_bytes(const void* p) {
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
            _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)p + 8)))};
}
MOESAIC_INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
MOESAIC_INLINE I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
MOESAIC_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
MOESAIC_INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
MOESAIC_INLINE F load_float(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MOESAIC_INLINE void store_float(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
MOESAIC_INLINE F load_bf16(const uint16_t* p) {
    const __m128i* q = (const __m128i*)p;
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16))};
}
MOESAIC_INLINE F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
MOESAIC_INLINE __m128i sum_or_max(__m256i x, bool is_sum) {
    const auto combine = [&](__m128i a, __m128i b) { return is_sum ? _mm_add_epi32(a, b) : _mm_max_epi32(a, b); };
    __m128i four = combine(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    four = combine(four, _mm_shuffle_epi32(four, 0x4e));
    return combine(four, _mm_shuffle_epi32(four, 0xb1));
}
MOESAIC_INLINE int32_t largest(I x) { return _mm_cvtsi128_si32(sum_or_max(_mm256_max_epi32(x.a, x.b), false)); }
MOESAIC_INLINE int32_t sum_of(I x) { return _mm_cvtsi128_si32(sum_or_max(_mm256_add_epi32(x.a, x.b), true)); }
MOESAIC_INLINE void store_low_bytes(void* p, I x) {
    const __m256i low = _mm256_set1_epi32(0xff);  // the conversions below would saturate
    const __m256i words = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
    const __m256i order = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(order), _mm256_extracti128_si256(order, 1)));
}
MOESAIC_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
MOESAIC_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
MOESAIC_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
MOESAIC_INLINE F subtract(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
MOESAIC_INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
MOESAIC_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
MOESAIC_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
MOESAIC_INLINE I bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
MOESAIC_INLINE F from_bits(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
MOESAIC_INLINE I greater(F x, F y) {  // -1 where x > y
    return bits({_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)});
}
// Exchange lanes that are D apart: 8, 4, 2 or 1.
template <int D>
MOESAIC_INLINE F swap_lanes(F x) {
    if constexpr (D == 8) return {x.b, x.a};
    if constexpr (D == 4) return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
    if constexpr (D == 2) return {_mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e)};
    if constexpr (D == 1) return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)};
}

#if MOESAIC_WORDS
// Sums of a group of 16 columns; the versions for other instruction sets are at the end of this file. Here, the sums of
// the first and of the last two bytes of each word are in separate 16-bit words: with levels of at most 32, products fit.
template <int BIAS_OF_LEVELS>
MOESAIC_INLINE I start_group(I pair) { return multiply_words(pair, set(int32_t(0x10001u * uint16_t(-BIAS_OF_LEVELS)))); }
MOESAIC_INLINE I dot_group(I acc, I u, I s) {
    return {_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(u.a, s.a)), _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(u.b, s.b))};
}
MOESAIC_INLINE I double_group(I x) { return {_mm256_add_epi16(x.a, x.a), _mm256_add_epi16(x.b, x.b)}; }
MOESAIC_INLINE I join_groups(I x, I y) { return {_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)}; }
MOESAIC_INLINE I byte_of_words(I x, int index) {
    const __m256i first = _mm256_set_epi32(0x800c800c, 0x80088008, 0x80048004, 0x80008000, 0x800c800c, 0x80088008, 0x80048004, 0x80008000);
    const __m256i at = _mm256_add_epi16(first, _mm256_set1_epi16(short(index)));
    return {_mm256_shuffle_epi8(x.a, at), _mm256_shuffle_epi8(x.b, at)};
}
template <int SMALLEST, int MASK>
MOESAIC_INLINE I scale_of(I four, int group) {
    const I shifted = {_mm256_srli_epi16(four.a, 2 * group), _mm256_srli_epi16(four.b, 2 * group)};
    return bit_or(bit_and(shifted, set(MASK * 0x10001)), set(SMALLEST * 0x10001));
}
#endif

// Return in lane i the sum of all lanes of x[i]: lanes 8 apart are added first, then 4, 2 and 1 apart.
MOESAIC_INLINE __m256 sums_of_eight(const F* x) {
    __m256 fours[4];
    for (int i = 0; i < 4; ++i) {
        const __m256 a = _mm256_add_ps(x[i].a, x[i].b), b = _mm256_add_ps(x[i + 4].a, x[i + 4].b);
        fours[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    const __m256 a = _mm256_add_ps(_mm256_shuffle_ps(fours[0], fours[1], 0x44), _mm256_shuffle_ps(fours[0], fours[1], 0xee));
    const __m256 b = _mm256_add_ps(_mm256_shuffle_ps(fours[2], fours[3], 0x44), _mm256_shuffle_ps(fours[2], fours[3], 0xee));
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}
MOESAIC_INLINE F sums_of(const F* x) { return {sums_of_eight(x), sums_of_eight(x + 8)}; }
MOESAIC_INLINE float largest_of(F x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#else

// Vector extensions of GCC and Clang; the compiler splits the vectors into those of the processor.
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef float F __attribute__((vector_size(64)));

constexpr int ACCUMULATORS = 4;
constexpr int TILE = ACCUMULATORS / 2;

template <class T>
MOESAIC_INLINE T load_as(const void* p) {
    T x;
    memcpy(&x, p, sizeof x);
    return x;
}

MOESAIC_INLINE I load(const void* p) { return load_as<I>(p); }
MOESAIC_INLINE void store(void* p, I x) { memcpy(p, &x, 64); }
MOESAIC_INLINE I set(int32_t x) { return I{} + x; }
MOESAIC_INLINE I broadcast(const void* p) { return set(word(p)); }
MOESAIC_INLINE I add(I a, I b) { return a + b; }
MOESAIC_INLINE I bit_and(I a, I b) { return a & b; }
MOESAIC_INLINE I bit_or(I a, I b) { return a | b; }
template <int N>
MOESAIC_INLINE I shift_right(I a) { return I(U(a) >> N); }
template <int N>
MOESAIC_INLINE I shift_left(I a) { return I(U(a) << N); }
template <int N>
MOESAIC_INLINE I shift_right_signed(I a) { return a >> N; }
MOESAIC_INLINE I negate(I a) { return -a; }
MOESAIC_INLINE I bit_xor(I a, I b) { return a ^ b; }
MOESAIC_INLINE I multiply_words(I a, I b) {
    const U x = U(a), y = U(b);
    return I(((x & 0xffff) * (y & 0xffff) & 0xffff) | ((x >> 16) * (y >> 16)) << 16);
}
MOESAIC_INLINE I subtract_bytes(I a, I b) {
    const U x = U(a), y = U(b);
    return I(((x | 0x80808080u) - (y & 0x7f7f7f7fu)) ^ ((x ^ ~y) & 0x80808080u));
}
MOESAIC_INLINE I lookup(I table, I index) {
    uint8_t entries[64], bytes[64];
    store(entries, table);
    store(bytes, index);
    for (int i = 0; i < 64; ++i) bytes[i] = entries[bytes[i]];
    return load(bytes);
}
MOESAIC_INLINE I dot(I acc, I u, I s) {
    for (int j = 0; j < 32; j += 8) acc += I(U(u) >> j & 255) * (I(U(s) << (24 - j)) >> 24);
    return acc;
}
constexpr int BIAS = 128;
MOESAIC_INLINE I dot_biased(I acc, I w, I s) { return dot(acc, w, s); }
MOESAIC_INLINE I dot_words(I acc, I a, I b) {
    return acc + (I(U(a) << 16) >> 16) * (I(U(b) << 16) >> 16) + (a >> 16) * (b >> 16);
}
MOESAIC_INLINE I load_bytes(const void* p) {
    I x;
    for (int i = 0; i < 16; ++i) x[i] = ((const uint8_t*)p)[i];
    return x;
}
MOESAIC_INLINE I load_signed_bytes(const void* p) {
    I x;
    for (int i = 0; i < 16; ++i) x[i] = ((const int8_t*)p)[i];
    return x;
}
MOESAIC_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
MOESAIC_INLINE I to_int(F x) {
    I y;
    for (int i = 0; i < 16; ++i) y[i] = x[i] == x[i] ? int32_t(__builtin_rintf(x[i])) : INT32_MIN;
    return y;
}
MOESAIC_INLINE F zero() { return F{}; }
MOESAIC_INLINE F set(float x) { return F{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
MOESAIC_INLINE F load_float(const float* p) { return load_as<F>(p); }
MOESAIC_INLINE void store_float(float* p, F x) { memcpy(p, &x, 64); }
MOESAIC_INLINE F load_bf16(const uint16_t* p) {
    F x;
    for (int i = 0; i < 16; ++i) x[i] = bf16_to_float(p[i]);
    return x;
}
MOESAIC_INLINE F load_f16(const uint16_t* p) {
    F x;
    for (int i = 0; i < 16; ++i) x[i] = half_to_float(p[i]);
    return x;
}
__attribute__((noinline)) inline F fma(F a, F b, F c) {
    for (int i = 0; i < 16; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return a;
}
MOESAIC_INLINE F mul(F a, F b) { return a * b; }
MOESAIC_INLINE F add(F a, F b) { return a + b; }
MOESAIC_INLINE F subtract(F a, F b) { return a - b; }
MOESAIC_INLINE F div(F a, F b) { return a / b; }
MOESAIC_INLINE I bits(F x) { return I(x); }
MOESAIC_INLINE F from_bits(I x) { return F(x); }
MOESAIC_INLINE I greater(F a, F b) { return I(a > b); }  // -1 where a > b
MOESAIC_INLINE I shift_right_by(I a, int n) { return I(U(a) >> uint32_t(n)); }
// Exchange lanes that are D apart: 8, 4, 2 or 1.
template <int D>
MOESAIC_INLINE F swap_lanes(F x) {
    F y;
    for (int i = 0; i < 16; ++i) y[i] = x[i ^ D];
    return y;
}
MOESAIC_INLINE I choose(I mask, I a, I b) { return (mask & a) | (~mask & b); }
MOESAIC_INLINE F min(F a, F b) { return from_bits(choose(I(a < b), bits(a), bits(b))); }
MOESAIC_INLINE F max(F a, F b) { return from_bits(choose(I(a > b), bits(a), bits(b))); }
MOESAIC_INLINE I max(I a, I b) { return choose(I(a > b), a, b); }
MOESAIC_INLINE int32_t largest(I x) {
    int32_t v[16], most;
    store(v, x);
    most = v[0];
    for (int i = 1; i < 16; ++i) most = v[i] > most ? v[i] : most;
    return most;
}
MOESAIC_INLINE int32_t sum_of(I x) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += x[i];
    return sum;
}
MOESAIC_INLINE void store_low_bytes(void* p, I x) {
    for (int i = 0; i < 16; ++i) ((uint8_t*)p)[i] = uint8_t(x[i]);
}
// Return in lane i the sum of all lanes of x[i]: lanes 8 apart are added first, then 4, 2 and 1 apart.
MOESAIC_INLINE F sums_of(const F* x) {
    F sums;
    for (int i = 0; i < 16; ++i) {
        float v[16];
        store_float(v, x[i]);
        for (int step = 8; step; step /= 2) {
            for (int j = 0; j < step; ++j) v[j] += v[j + step];
        }
        sums[i] = v[0];
    }
    return sums;
}
MOESAIC_INLINE float largest_of(F x) {
    float most = x[0];
    for (int i = 1; i < 16; ++i) most = most > x[i] ? most : x[i];
    return most;
}

#endif

#if !MOESAIC_AVX2
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
