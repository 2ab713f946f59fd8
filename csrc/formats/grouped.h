// Codes of 2 to 8 bits whose scales csrc/grouped.h reads. Codes of 2, 3, 4 and 8 bits lie as in the integer formats.
#pragma once

#include "../vec.h"

namespace moesaic::MOESAIC_ISA {

struct Grouped {};

// Five bits: for each 32 columns, first the four lower bits as in int4, then the highest bits.
struct Bits5 {
    static constexpr int BITS = 5, RUN = 32;

    template <class Body>
    static MOESAIC_INLINE void run(const uint8_t* p, Body body) {
        const I e = load(p + 512), f = load(p + 576);
        two(p, body, Number<0>{}, shift_left<4>(e), shift_left<4>(f), shift_left<3>(e), shift_left<3>(f));
        two(p, body, Number<1>{}, shift_left<2>(e), shift_left<2>(f), shift_left<1>(e), shift_left<1>(f));
        two(p, body, Number<2>{}, e, f, shift_right<1>(e), shift_right<1>(f));
        two(p, body, Number<3>{}, shift_right<2>(e), shift_right<2>(f), shift_right<3>(e), shift_right<3>(f));
    }

  private:
    // Pass on the codes of the 8 columns of word N, whose highest bits are bit 4 of the bytes of c, d, e and f.
    template <class Body, int N>
    static MOESAIC_INLINE void two(const uint8_t* p, Body body, Number<N>, I c, I d, I e, I f) {
        const I low = set(0x0f0f0f0f), high = set(0x10101010), a = load(p + 128 * N), b = load(p + 128 * N + 64);
        body(2 * N, bit_or(bit_and(a, low), bit_and(c, high)), bit_or(bit_and(b, low), bit_and(d, high)));
        body(2 * N + 1, bit_or(bit_and(shift_right<4>(a), low), bit_and(e, high)),
             bit_or(bit_and(shift_right<4>(b), low), bit_and(f, high)));
    }
};

// Six bits: for each 32 columns, first the four lower bits as in int4, then the two highest as in int2.
struct Bits6 {
    static constexpr int BITS = 6, RUN = 32;

    template <class Body>
    static MOESAIC_INLINE void run(const uint8_t* p, Body body) {
        half(p, p + 512, body, Number<0>{});
        half(p + 256, p + 640, body, Number<4>{});
    }

  private:
    // Pass on the codes of 16 columns from the lower bits at p and the highest bits at q.
    template <class Body, int J>
    static MOESAIC_INLINE void half(const uint8_t* p, const uint8_t* q, Body body, Number<J>) {
        const I a = load(p), b = load(p + 64), c = load(p + 128), d = load(p + 192), e = load(q), f = load(q + 64);
        body(J, code(a, shift_left<4>(e)), code(b, shift_left<4>(f)));
        body(J + 1, code(shift_right<4>(a), shift_left<2>(e)), code(shift_right<4>(b), shift_left<2>(f)));
        body(J + 2, code(c, e), code(d, f));
        body(J + 3, code(shift_right<4>(c), shift_right<2>(e)), code(shift_right<4>(d), shift_right<2>(f)));
    }
    static MOESAIC_INLINE I code(I lower, I highest) {
        return bit_or(bit_and(lower, set(0x0f0f0f0f)), bit_and(highest, set(0x30303030)));
    }
};

}  // namespace moesaic::MOESAIC_ISA
