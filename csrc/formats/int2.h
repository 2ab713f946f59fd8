// Two bits per weight: bits 2 j and 2 j + 1 of the four bytes of a word are columns 4 j .. 4 j + 3.
#pragma once

#include "../vec.h"

namespace moesaic::MOESAIC_ISA {

struct Int2 {
    static constexpr int BITS = 2, GROUP = 16, BIAS = 3;
    static constexpr int RUN = 16;

    static constexpr bool DOUBLED = true;  // level() is twice the code

    static constexpr int level(int code) { return 2 * code; }
    static MOESAIC_INLINE I levels(I codes) { return shift_left<1>(codes); }

    template <class Body>
    static MOESAIC_INLINE void run(const uint8_t* p, Body body) {
        const I low = set(0x03030303), a = load(p), b = load(p + 64);
        body(0, bit_and(a, low), bit_and(b, low));
        body(1, bit_and(shift_right<2>(a), low), bit_and(shift_right<2>(b), low));
        body(2, bit_and(shift_right<4>(a), low), bit_and(shift_right<4>(b), low));
        body(3, bit_and(shift_right<6>(a), low), bit_and(shift_right<6>(b), low));
    }
};

}  // namespace moesaic::MOESAIC_ISA
