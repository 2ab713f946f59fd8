// Three bits per weight: for each 32 columns, first the two lower bits as in int2, then the highest bits.
#pragma once

#include "../vec.h"

namespace moesaic::MOESAIC_ISA {

struct Int3 {
    static constexpr int BITS = 3, GROUP = 16, BIAS = 16;
    static constexpr int RUN = 32;
    alignas(64) static constexpr auto LEVELS = repeated({0, 6, 10, 14, 18, 22, 26, 32, 0, 0, 0, 0, 0, 0, 0, 0});

    static constexpr bool DOUBLED = false;

    static constexpr int level(int code) { return LEVELS.bytes[code]; }
    static MOESAIC_INLINE I levels(I codes) { return lookup(load(LEVELS.bytes), codes); }

    template <class Body>
    static MOESAIC_INLINE void run(const uint8_t* p, Body body) {
        const I a = load(p), b = load(p + 64), c = load(p + 128), d = load(p + 192);
        const I e = load(p + 256), f = load(p + 320);
        body(0, code(a, shift_left<2>(e)), code(b, shift_left<2>(f)));
        body(1, code(shift_right<2>(a), shift_left<1>(e)), code(shift_right<2>(b), shift_left<1>(f)));
        body(2, code(shift_right<4>(a), e), code(shift_right<4>(b), f));
        body(3, code(shift_right<6>(a), shift_right<1>(e)), code(shift_right<6>(b), shift_right<1>(f)));
        body(4, code(c, shift_right<2>(e)), code(d, shift_right<2>(f)));
        body(5, code(shift_right<2>(c), shift_right<3>(e)), code(shift_right<2>(d), shift_right<3>(f)));
        body(6, code(shift_right<4>(c), shift_right<4>(e)), code(shift_right<4>(d), shift_right<4>(f)));
        body(7, code(shift_right<6>(c), shift_right<5>(e)), code(shift_right<6>(d), shift_right<5>(f)));
    }

  private:
    static MOESAIC_INLINE I code(I lower, I highest) {
        return bit_or(bit_and(lower, set(0x03030303)), bit_and(highest, set(0x04040404)));
    }
};

}  // namespace moesaic::MOESAIC_ISA
