// Four bits per weight: the low halves of the four bytes of a word are columns 0 .. 3, the high halves columns 4 .. 7.
#pragma once

#include "../vec.h"

namespace moesaic::MOESAIC_ISA {

struct Int4 {
    static constexpr int BITS = 4, GROUP = 16, BIAS = 16;
    static constexpr int RUN = 8;
    alignas(64) static constexpr auto LEVELS = repeated({0, 3, 6, 8, 10, 12, 14, 15, 17, 18, 20, 22, 24, 26, 29, 32});

    static constexpr bool DOUBLED = false;

    static constexpr int level(int code) { return LEVELS.bytes[code]; }
    static MOESAIC_INLINE I levels(I codes) { return lookup(load(LEVELS.bytes), codes); }

    template <class Body>
    static MOESAIC_INLINE void run(const uint8_t* p, Body body) {
        const I low = set(0x0f0f0f0f), a = load(p), b = load(p + 64);
        body(0, bit_and(a, low), bit_and(b, low));
        body(1, bit_and(shift_right<4>(a), low), bit_and(shift_right<4>(b), low));
    }
};

}  // namespace moesaic::MOESAIC_ISA
