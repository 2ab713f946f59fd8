// The vectors of vec.h with NEON and its dot products (Armv8.2), each in four registers.
#pragma once

#include <arm_neon.h>

namespace moesaic::MOESAIC_ISA {

struct I { int32x4_t v[4]; };
struct F { float32x4_t v[4]; };

constexpr int ACCUMULATORS = 6;
constexpr int TILE = ACCUMULATORS;  // with 16 rows

// Apply a function of NEON vectors to each register.
template <class Body>
MOESAIC_INLINE I each_int(const Body& body) { return {{body(0), body(1), body(2), body(3)}}; }
template <class Body>
MOESAIC_INLINE F each_float(const Body& body) { return {{body(0), body(1), body(2), body(3)}}; }

MOESAIC_INLINE I load(const void* p) {
    return each_int([&](int i) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p + 16 * i)); });
}
MOESAIC_INLINE void store(void* p, I x) {
    for (int i = 0; i < 4; ++i) vst1q_u8((uint8_t*)p + 16 * i, vreinterpretq_u8_s32(x.v[i]));
}
MOESAIC_INLINE I set(int32_t x) { return each_int([&](int) { return vdupq_n_s32(x); }); }
MOESAIC_INLINE I broadcast(const void* p) { return set(word(p)); }
#define MOESAIC_EACH(name, expression) \
    MOESAIC_INLINE I name(I x, I y) { return each_int([&](int i) { return expression; }); }
MOESAIC_EACH(add, vaddq_s32(x.v[i], y.v[i]))
MOESAIC_EACH(bit_and, vandq_s32(x.v[i], y.v[i]))
MOESAIC_EACH(bit_or, vorrq_s32(x.v[i], y.v[i]))
MOESAIC_EACH(bit_xor, veorq_s32(x.v[i], y.v[i]))
MOESAIC_EACH(max, vmaxq_s32(x.v[i], y.v[i]))
MOESAIC_EACH(multiply_words, vreinterpretq_s32_s16(vmulq_s16(vreinterpretq_s16_s32(x.v[i]), vreinterpretq_s16_s32(y.v[i]))))
MOESAIC_EACH(subtract_bytes, vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_s32(x.v[i]), vreinterpretq_s8_s32(y.v[i]))))
MOESAIC_EACH(lookup, vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(x.v[i]), vreinterpretq_u8_s32(y.v[i]))))
#undef MOESAIC_EACH
template <int N>
MOESAIC_INLINE I shift_right(I x) {
    if constexpr (N == 0) return x;
    return each_int([&](int i) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x.v[i]), N ? N : 1)); });
}
template <int N>
MOESAIC_INLINE I shift_left(I x) { return each_int([&](int i) { return vshlq_n_s32(x.v[i], N); }); }
template <int N>
MOESAIC_INLINE I shift_right_signed(I x) { return each_int([&](int i) { return vshrq_n_s32(x.v[i], N); }); }
MOESAIC_INLINE I shift_right_by(I x, int n) {
    return each_int([&](int i) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x.v[i]), vdupq_n_s32(-n))); });
}
MOESAIC_INLINE I negate(I x) { return each_int([&](int i) { return vnegq_s32(x.v[i]); }); }
// u must be below 128: both bytes are multiplied as signed ones.
MOESAIC_INLINE I dot(I acc, I u, I s) {
    return each_int([&](int i) { return vdotq_s32(acc.v[i], vreinterpretq_s8_s32(u.v[i]), vreinterpretq_s8_s32(s.v[i])); });
}
// Here weights are passed as v itself.
constexpr int BIAS = 0;
MOESAIC_INLINE I dot_biased(I acc, I v, I s) { return dot(acc, v, s); }
MOESAIC_INLINE I dot_words(I acc, I x, I y) {
    return each_int([&](int i) {
        const int16x8_t a = vreinterpretq_s16_s32(x.v[i]), b = vreinterpretq_s16_s32(y.v[i]);
        return vaddq_s32(acc.v[i], vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
    });
}
MOESAIC_INLINE void pin(I& x) { asm("" : "+w"(x.v[0]), "+w"(x.v[1]), "+w"(x.v[2]), "+w"(x.v[3])); }
MOESAIC_INLINE I load_bytes(const void* p) {
    const uint8x16_t x = vld1q_u8((const uint8_t*)p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_high_u8(x);
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))}};
}
MOESAIC_INLINE I load_signed_bytes(const void* p) {
    const int8x16_t x = vld1q_s8((const int8_t*)p);
    const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
    return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
}
MOESAIC_INLINE F to_float(I x) { return each_float([&](int i) { return vcvtq_f32_s32(x.v[i]); }); }
MOESAIC_INLINE I to_int(F x) { return each_int([&](int i) { return vcvtnq_s32_f32(x.v[i]); }); }  // nearest, ties to even
MOESAIC_INLINE F set(float x) { return each_float([&](int) { return vdupq_n_f32(x); }); }
MOESAIC_INLINE F zero() { return set(0.0f); }
MOESAIC_INLINE F load_float(const float* p) { return each_float([&](int i) { return vld1q_f32(p + 4 * i); }); }
MOESAIC_INLINE void store_float(float* p, F x) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
MOESAIC_INLINE F load_bf16(const uint16_t* p) {
    return each_float([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
MOESAIC_INLINE F load_f16(const uint16_t* p) {
    return each_float([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
MOESAIC_INLINE I bits(F x) { return each_int([&](int i) { return vreinterpretq_s32_f32(x.v[i]); }); }
MOESAIC_INLINE F from_bits(I x) { return each_float([&](int i) { return vreinterpretq_f32_s32(x.v[i]); }); }
MOESAIC_INLINE F fma(F x, F y, F z) { return each_float([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); }); }
#define MOESAIC_EACH(name, expression) \
    MOESAIC_INLINE F name(F x, F y) { return each_float([&](int i) { return expression; }); }
MOESAIC_EACH(mul, vmulq_f32(x.v[i], y.v[i]))
MOESAIC_EACH(add, vaddq_f32(x.v[i], y.v[i]))
MOESAIC_EACH(subtract, vsubq_f32(x.v[i], y.v[i]))
MOESAIC_EACH(div, vdivq_f32(x.v[i], y.v[i]))
// The second argument where one is NaN, unlike vminq_f32() and vmaxq_f32().
MOESAIC_EACH(min, vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]))
MOESAIC_EACH(max, vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]))
#undef MOESAIC_EACH
MOESAIC_INLINE I greater(F x, F y) {  // -1 where x > y
    return each_int([&](int i) { return vreinterpretq_s32_u32(vcgtq_f32(x.v[i], y.v[i])); });
}
MOESAIC_INLINE int32_t largest(I x) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3])));
}
MOESAIC_INLINE int32_t sum_of(I x) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
}
MOESAIC_INLINE void store_low_bytes(void* p, I x) {
    const int16x8_t low = vmovn_high_s32(vmovn_s32(x.v[0]), x.v[1]), high = vmovn_high_s32(vmovn_s32(x.v[2]), x.v[3]);
    vst1q_s8((int8_t*)p, vmovn_high_s16(vmovn_s16(low), high));
}
// Exchange lanes that are D apart: 8, 4, 2 or 1.
template <int D>
MOESAIC_INLINE F swap_lanes(F x) {
    if constexpr (D == 8) return {{x.v[2], x.v[3], x.v[0], x.v[1]}};
    if constexpr (D == 4) return {{x.v[1], x.v[0], x.v[3], x.v[2]}};
    if constexpr (D == 2) return each_float([&](int i) { return vextq_f32(x.v[i], x.v[i], 2); });
    if constexpr (D == 1) return each_float([&](int i) { return vrev64q_f32(x.v[i]); });
}
// Return in lane i the sum of all lanes of x[i]: lanes 8 apart are added first, then 4, 2 and 1 apart.
MOESAIC_INLINE F sums_of(const F* x) {
    F sums;
    for (int i = 0; i < 4; ++i) {
        float32x2_t pairs[4];
        for (int j = 0; j < 4; ++j) {
            const F& y = x[4 * i + j];
            const float32x4_t four = vaddq_f32(vaddq_f32(y.v[0], y.v[2]), vaddq_f32(y.v[1], y.v[3]));
            pairs[j] = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        }
        sums.v[i] = vcombine_f32(vpadd_f32(pairs[0], pairs[1]), vpadd_f32(pairs[2], pairs[3]));
    }
    return sums;
}
MOESAIC_INLINE float largest_of(F x) {
    const F two = max(x, swap_lanes<8>(x));
    const float32x4_t four = max(two, swap_lanes<4>(two)).v[0];
    float most = vgetq_lane_f32(four, 0), v[4];
    vst1q_f32(v, four);
    for (int i = 1; i < 4; ++i) most = most > v[i] ? most : v[i];
    return most;
}

}  // namespace moesaic::MOESAIC_ISA
