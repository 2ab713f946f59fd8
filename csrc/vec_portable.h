// The vectors of vec.h in portable C++.
#pragma once

namespace moesaic::MOESAIC_ISA {

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

}  // namespace moesaic::MOESAIC_ISA
