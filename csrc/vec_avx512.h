// The vectors of vec.h with AVX-512.
#pragma once

namespace moesaic::MOESAIC_ISA {

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

}  // namespace moesaic::MOESAIC_ISA
