// The vectors of vec.h with AVX2, each in two registers.
#pragma once

namespace moesaic::MOESAIC_ISA {

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

}  // namespace moesaic::MOESAIC_ISA
