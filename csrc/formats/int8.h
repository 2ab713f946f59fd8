// Eight bits per weight: v + 128, no scales. moesaic/formats/_tiles.py describes the memory layout.
#pragma once

#include "../vec.h"

namespace moesaic::MOESAIC_ISA {

struct Int8 {
    static constexpr int BITS = 8, GROUP = 0;
    static constexpr int RUN = 4;  // columns that one call of run() unpacks

    // Call body(j, q0, q1) with columns 4 j .. 4 j + 3 of rows 0 .. 15 (q0) and of rows 16 .. 31 (q1).
    template <class Body>
    static MOESAIC_INLINE void run(const uint8_t* p, Body body) {
        body(0, load(p), load(p + 64));
    }
};

}  // namespace moesaic::MOESAIC_ISA
